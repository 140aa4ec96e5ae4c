"""Examples of many jobs, laid end to end in one row of tokens.

A job's share of an optimizer step is cut into chunks by a rule that looks at that job alone; a micro-batch is a few
chunks of any jobs side by side. Sums over tokens (dA, dB, the loss) run over a chunk, so a neighbour changes what lies
beside a chunk but never what is added up inside it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_core.data.dataset import Example
from lora_core.kernels.transfer import to_device

ROW_MULTIPLE = 8
"""Chunks are padded to this many rows where rows depend on it. On CPU a product's last rows, left over when a thread's
share is cut into fours, may take another kernel with another rounding (fp32: seen at 1 to 3 rows with one thread, 5 to
7 and 9 to 11 with two, up to 27 with sixteen; fp64: at any number). And kernels round by the alignment of their input,
which for 50 features depends on where a chunk starts.
"""


class Columns(NamedTuple):
    """The rows of a chunk in numpy, which wakes no threads: torch's, on a host of 16 cores, took 17 ms a batch.

    `lengths` of its documents; ids, positions and the example of each row, int64 `[rows]`; the rows that are labels.
    """

    lengths: tuple[int, ...]
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    examples: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Chunk:
    """Examples of one job, with each one's place in the optimizer step (over all ranks). `step` is that step; None
    where they are not trained on. Its rows are a multiple of `row_multiple` (see `exactness.py`).
    """

    job: str
    examples: tuple[tuple[int, Example], ...]
    step: int | None
    row_multiple: int = ROW_MULTIPLE

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for _, example in self.examples)

    @property
    def rows(self) -> int:
        """Rows that it takes in a batch: its tokens and padding."""
        return self.tokens + -self.tokens % self.row_multiple

    @cached_property
    def columns(self) -> Columns:
        """Its rows, made once: a micro-batch that was made ready may have to be made again."""
        ids, supervised = array("q"), bytearray()
        lengths, places = [], []
        for place, example in self.examples:
            assert not example.labels_mask[0]
            ids.extend(example.ids)
            supervised += bytes(example.labels_mask)
            lengths.append(len(example.ids))
            places.append(place)
        if padding := self.rows - self.tokens:
            ids.extend([0] * padding)
            supervised += bytes(padding)
            lengths.append(padding)
            places.append(0)
        sizes = np.array(lengths)
        positions = np.arange(len(ids)) - np.repeat(sizes.cumsum() - sizes, sizes)
        mask = np.frombuffer(supervised, dtype=np.bool_)
        # A buffer is read ten times as fast as a list.
        all_ids = np.frombuffer(ids, dtype=np.int64)
        return Columns(tuple(lengths), all_ids, positions, np.repeat(np.array(places), sizes), mask.nonzero()[0])


@dataclass(frozen=True)
class PackedChunk:
    """Where a chunk of a step lies in a batch: `rows` tokens; `label_rows` int64 [n] (indices into the batch) predict
    `labels` int64 [n].

    `row_examples` and `row_tokens` int64 [rows] give each row's example in the step and token in its document. The last
    rows may be padding, a document of its own without labels.
    """

    job: str
    step: int | None
    rows: int
    label_rows: Tensor
    labels: Tensor
    row_examples: Tensor
    row_tokens: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """ids and positions int64 `[1, tokens]`; `lengths` of the documents in it, padding included; the chunks in
    order.
    """

    ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    chunks: tuple[PackedChunk, ...]

    @property
    def labels(self) -> list[tuple[Tensor, Tensor]]:
        """(rows, labels) of each chunk."""
        return [(chunk.label_rows, chunk.labels) for chunk in self.chunks]


def cut_into_chunks(
    job: str,
    examples: Iterable[tuple[int, Example]],
    limit: int,
    step: int | None,
    row_multiple: int = ROW_MULTIPLE,
) -> list[Chunk]:
    """Consecutive examples, together at most `limit` tokens a chunk; a longer example is a chunk of its own."""
    chunks: list[Chunk] = []
    current: list[tuple[int, Example]] = []
    tokens = 0
    for position, example in examples:
        if current and tokens + len(example.ids) > limit:
            chunks.append(Chunk(job, tuple(current), step, row_multiple))
            current, tokens = [], 0
        current.append((position, example))
        tokens += len(example.ids)
    if current:
        chunks.append(Chunk(job, tuple(current), step, row_multiple))
    return chunks


def pack(chunks: Sequence[Chunk], device: torch.device) -> PackedBatch:
    """Lay the chunks end to end: positions restart with each document, and no document's first token is a label.

    All of it is put together on the CPU and moved in one piece.
    """
    columns = [chunk.columns for chunk in chunks]
    rows, counts = [chunk.rows for chunk in chunks], [len(of_chunk.labels) for of_chunk in columns]
    starts = np.cumsum([0, *rows[:-1]])
    ids = np.concatenate([of_chunk.ids for of_chunk in columns])
    labels = np.concatenate([of_chunk.labels + start for of_chunk, start in zip(columns, starts, strict=True)])
    positions = np.concatenate([of_chunk.positions for of_chunk in columns])
    examples = np.concatenate([of_chunk.examples for of_chunk in columns])
    parts = ids, positions, examples, labels - 1, ids[labels]
    moved = to_device(torch.from_numpy(np.concatenate(parts)), device).split([len(part) for part in parts])
    of_chunks = zip(
        moved[3].split(counts), moved[4].split(counts), moved[2].split(rows), moved[1].split(rows), strict=True
    )
    packed = [
        PackedChunk(chunk.job, chunk.step, chunk.rows, *part) for chunk, part in zip(chunks, of_chunks, strict=True)
    ]
    lengths = tuple(length for of_chunk in columns for length in of_chunk.lengths)
    return PackedBatch(moved[0][None], moved[1][None], lengths, tuple(packed))
