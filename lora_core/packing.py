"""Examples of many jobs, laid end to end in one row of tokens.

A job's share of an optimizer step is cut into chunks by a rule that looks at that job alone; a micro-batch is a few
chunks of any jobs side by side. Sums over tokens (dA, dB, the loss) run over a chunk, so a neighbour changes what lies
beside a chunk but never what is added up inside it.
"""

from __future__ import annotations

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
    """Lay the chunks end to end: positions restart with each document, and no document's first token is a label."""
    ids: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    packed: list[PackedChunk] = []
    for chunk in chunks:
        start = len(ids)
        label_rows: list[int] = []
        labels: list[int] = []
        row_examples: list[int] = []
        for place, example in chunk.examples:
            assert not example.labels_mask[0]
            label_rows += [len(ids) + t - 1 for t, supervised in enumerate(example.labels_mask) if supervised]
            labels += [token for token, supervised in zip(example.ids, example.labels_mask, strict=True) if supervised]
            ids += example.ids
            positions += range(len(example.ids))
            lengths.append(len(example.ids))
            row_examples += [place] * len(example.ids)
        padding = -(len(ids) - start) % ROW_MULTIPLE
        if padding:
            ids += [0] * padding
            positions += range(padding)
            lengths.append(padding)
            row_examples += [0] * padding
        packed.append(
            PackedChunk(
                chunk.job,
                len(ids) - start,
                torch.tensor(label_rows, dtype=torch.int64, device=device),
                torch.tensor(labels, dtype=torch.int64, device=device),
                torch.tensor(row_examples, dtype=torch.int64, device=device),
                torch.tensor(positions[start:], dtype=torch.int64, device=device),
            )
        )
    return PackedBatch(
        torch.tensor([ids], dtype=torch.int64, device=device),
        torch.tensor([positions], dtype=torch.int64, device=device),
        tuple(lengths),
        tuple(packed),
    )
