"""Chunks of a micro-batch with all that is made for them before the first kernel: it can be made, and moved to the
device, while that still computes what came before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.data.packing import Chunk, PackedBatch, pack
from lora_core.models.base import BaseModel
from lora_core.models.hooks.bank import Segment
from lora_core.models.llama.decoder import Batch, Rows
from lora_core.training.active_job import LiveJob


@dataclass(frozen=True)
class ReadyBatch:
    """Chunks laid end to end, and how they go through the base: through the decoder, or, where that is None, as these
    segments through the hooks.
    """

    packed: PackedBatch
    in_decoder: Batch | None
    segments: Sequence[Segment] = ()


def make_ready(base: BaseModel, live: Mapping[str, LiveJob], chunks: Sequence[Chunk]) -> ReadyBatch:
    """Through the decoder if these jobs have kernel args."""
    packed = pack(chunks, base.device)
    if live[chunks[0].job].kernel_args is None:
        jobs = [(live[chunk.job], chunk) for chunk in packed.chunks]
        segments = [Segment(job.adapter, chunk.padded_tokens, job.dropout_keys(chunk)) for job, chunk in jobs]
        return ReadyBatch(packed, None, segments)
    assert base.decoder is not None
    places = {job: place for place, job in enumerate(dict.fromkeys(chunk.job for chunk in chunks))}
    views = [view for job in places if (view := live[job].kernel_args) is not None]
    assert len(views) == len(places)
    rows = decoder_rows(packed, [places[chunk.job] for chunk in chunks], joined_dropout_keys(live, packed))
    return ReadyBatch(packed, base.decoder.batch(rows, views))


def joined_dropout_keys(live: Mapping[str, LiveJob], batch: PackedBatch) -> Tensor | None:
    """int64 `[T]`, zero for rows of jobs without dropout; None where all are without."""
    keys = [(chunk, live[chunk.job].dropout_keys(chunk)) for chunk in batch.chunks]
    if all(of_chunk is None for _, of_chunk in keys):
        return None
    return torch.cat([torch.zeros_like(chunk.positions) if k is None else k for chunk, k in keys])


def decoder_rows(batch: PackedBatch, places: Sequence[int], dropout_keys: Tensor | None = None) -> Rows:
    """The batch as the decoder takes it; `places` say which adapter each chunk has."""
    segments = [(place, chunk.padded_tokens) for place, chunk in zip(places, batch.chunks, strict=True)]
    return Rows(batch.ids[0], batch.positions[0], batch.lengths, segments, dropout_keys)
