"""Examples of many jobs, laid end to end in one row of tokens.

A job's share of an optimizer step is cut into chunks by a rule that looks at that job alone; a micro-batch is a few
chunks of any jobs side by side. Sums over tokens (dA, dB, the loss) run over a chunk, so a neighbour changes what lies
beside a chunk but never what is added up inside it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.dataset import Example

ROW_MULTIPLE = 8
"""Chunks are padded to this many rows. On CPU a product's last rows, left over when a thread's share is cut into fours,
may take another kernel with another rounding (fp32: seen at 5 to 7 and 9 to 11 rows with two threads, up to 27 with
sixteen; fp64: at any number). And kernels round by the alignment of their input, which for 50 features depends on where
a chunk starts.
"""


@dataclass(frozen=True)
class Chunk:
    """Examples of one job, with each one's place in the optimizer step (over all ranks)."""

    job: str
    examples: tuple[tuple[int, Example], ...]

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for _, example in self.examples)

    @property
    def rows(self) -> int:
        """Rows that it takes in a batch: its tokens and padding."""
        return self.tokens + -self.tokens % ROW_MULTIPLE


@dataclass(frozen=True)
class PackedChunk:
    """Where a chunk lies in a batch: `rows` tokens; `label_rows` int64 [n] (indices into the batch) predict `labels`
    int64 [n].

    `row_examples` and `row_tokens` int64 [rows] give each row's example in the step and token in its document. The last
    rows may be padding, a document of its own without labels.
    """

    job: str
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


def cut_into_chunks(job: str, examples: Iterable[tuple[int, Example]], limit: int) -> list[Chunk]:
    """Consecutive examples, together at most `limit` tokens a chunk; a longer example is a chunk of its own."""
    chunks: list[Chunk] = []
    current: list[tuple[int, Example]] = []
    tokens = 0
    for position, example in examples:
        if current and tokens + len(example.ids) > limit:
            chunks.append(Chunk(job, tuple(current)))
            current, tokens = [], 0
        current.append((position, example))
        tokens += len(example.ids)
    if current:
        chunks.append(Chunk(job, tuple(current)))
    return chunks


def pack(chunks: Sequence[Chunk], device: torch.device) -> PackedBatch:
    """Lay the chunks end to end: positions restart with each document, and no document's first token is a label.

    All of it is put together on the CPU and moved in a few pieces, since a GPU has nothing to do meanwhile.
    """
    ids: list[int] = []
    supervised: list[bool] = []
    lengths: list[int] = []
    places: list[int] = []
    for chunk in chunks:
        for place, example in chunk.examples:
            assert not example.labels_mask[0]
            ids += example.ids
            supervised += example.labels_mask
            lengths.append(len(example.ids))
            places.append(place)
        if padding := chunk.rows - chunk.tokens:
            ids += [0] * padding
            supervised += [False] * padding
            lengths.append(padding)
            places.append(0)
    rows = [chunk.rows for chunk in chunks]
    # A buffer is read ten times as fast as a list.
    all_ids = torch.frombuffer(array("q", ids), dtype=torch.int64)
    mask = torch.frombuffer(bytearray(supervised), dtype=torch.bool)
    sizes = torch.tensor(lengths)
    label_places = mask.nonzero()[:, 0]
    counts = [int(part.sum()) for part in mask.split(rows)]
    positions = torch.arange(len(ids)) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    examples = torch.repeat_interleave(torch.tensor(places), sizes)
    moved = [part.to(device) for part in (all_ids, positions, label_places - 1, all_ids[label_places], examples)]
    parts = zip(moved[2].split(counts), moved[3].split(counts), moved[4].split(rows), moved[1].split(rows), strict=True)
    packed = [PackedChunk(chunk.job, chunk.rows, *part) for chunk, part in zip(chunks, parts, strict=True)]
    return PackedBatch(moved[0][None], moved[1][None], tuple(lengths), tuple(packed))
