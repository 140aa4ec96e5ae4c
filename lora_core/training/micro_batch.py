"""Chunks of a micro-batch with all that is made for them before the first kernel: it can be made, and moved to the
device, while that still computes what came before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_core.data.packing import Chunk, PackedBatch, pack
from lora_core.models.forward import Forward, Ready
from lora_core.training.active_job import LiveJob


@dataclass(frozen=True)
class ReadyBatch:
    """Chunks laid end to end, and the same as the base's path takes them."""

    packed: PackedBatch
    ready: Ready


def make_ready(forward: Forward, live: Mapping[str, LiveJob], chunks: Sequence[Chunk]) -> ReadyBatch:
    """Of chunks of jobs that are in training."""
    packed = pack(chunks, forward.device)
    jobs = [live[chunk.job] for chunk in packed.chunks]
    keys = [job.dropout_keys(chunk) for job, chunk in zip(jobs, packed.chunks, strict=True)]
    return ReadyBatch(packed, forward.ready(packed, [job.bound for job in jobs], keys))
