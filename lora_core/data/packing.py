"""Examples of many jobs, laid end to end in one row of tokens.

A job's share of an optimizer step is chunked by a rule that looks at that job alone; a micro-batch is a few
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

PAD_TO_MULTIPLE_OF = 8
"""Chunks are padded to a multiple of this where rows of products depend on it. On CPU a product's last rows, left
over when a thread's share is cut into fours, may take another kernel with another rounding (fp32: seen at 1 to 3 rows
with one thread, 5 to 7 and 9 to 11 with two, up to 27 with sixteen; fp64: at any number). And kernels round by the
alignment of their input, which for 50 features depends on where a chunk starts.
"""


class TokenArrays(NamedTuple):
    """A chunk's tokens in numpy, which wakes no threads: torch's, on a host of 16 cores, took 17 ms a batch.

    `lengths` of its documents; ids, positions and the example's index of each token, int64 `[tokens]`; the indices of
    the tokens that are labels. Padding is the last document.
    """

    lengths: tuple[int, ...]
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    example_indices: NDArray[np.int64]
    label_indices: NDArray[np.int64]


@dataclass(frozen=True)
class Chunk:
    """Examples of one job, with each one's index in the optimizer step (over all ranks). `step` is that step; None
    where they are not trained on. Its tokens are padded to a multiple of `pad_to_multiple_of` (see `exactness.py`).
    With `reference` they are for what the job started from.
    """

    job: str
    examples: tuple[tuple[int, Example], ...]
    step: int | None
    pad_to_multiple_of: int = PAD_TO_MULTIPLE_OF
    reference: bool = False

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for _, example in self.examples)

    @property
    def padded_tokens(self) -> int:
        """How many tokens it takes in a batch, padding included."""
        return self.tokens + -self.tokens % self.pad_to_multiple_of

    @cached_property
    def arrays(self) -> TokenArrays:
        """Lay out its tokens, once: a micro-batch that was made ready may have to be made again."""
        ids, supervised = array("q"), bytearray()
        lengths, indices = [], []
        for index, example in self.examples:
            assert not example.labels_mask[0]
            ids.extend(example.ids)
            supervised += bytes(example.labels_mask)
            lengths.append(len(example.ids))
            indices.append(index)
        if padding := self.padded_tokens - self.tokens:
            ids.extend([0] * padding)
            supervised += bytes(padding)
            lengths.append(padding)
            indices.append(0)
        sizes = np.array(lengths)
        positions = np.arange(len(ids)) - np.repeat(sizes.cumsum() - sizes, sizes)
        mask = np.frombuffer(supervised, dtype=np.bool_)
        # A buffer is read ten times as fast as a list.
        all_ids = np.frombuffer(ids, dtype=np.int64)
        return TokenArrays(tuple(lengths), all_ids, positions, np.repeat(np.array(indices), sizes), mask.nonzero()[0])


@dataclass(frozen=True)
class PackedChunk:
    """Where a chunk of a step lies in a batch: `padded_tokens` tokens, of which those at `label_indices` int64 [n]
    (into the batch) predict `labels` int64 [n].

    `example_indices` and `positions` int64 [padded_tokens] say of each token which example of the step it is in, and
    where in it. The last ones may be padding, a document of its own without labels.
    """

    job: str
    step: int | None
    padded_tokens: int
    label_indices: Tensor
    labels: Tensor
    example_indices: Tensor
    positions: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """ids and positions int64 `[1, tokens]`; `lengths` of the documents, padding included; the chunks in order."""

    ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    chunks: tuple[PackedChunk, ...]

    @property
    def labels(self) -> list[tuple[Tensor, Tensor]]:
        """(indices of the tokens that predict a label, labels) of each chunk."""
        return [(chunk.label_indices, chunk.labels) for chunk in self.chunks]


def chunked(
    job: str,
    examples: Iterable[tuple[int, Example]],
    limit: int,
    step: int | None,
    pad_to_multiple_of: int = PAD_TO_MULTIPLE_OF,
) -> list[Chunk]:
    """Put consecutive examples together, at most `limit` tokens a chunk; a longer example is a chunk of its own."""
    chunks: list[Chunk] = []
    current: list[tuple[int, Example]] = []
    tokens = 0
    for index, example in examples:
        if current and tokens + len(example.ids) > limit:
            chunks.append(Chunk(job, tuple(current), step, pad_to_multiple_of))
            current, tokens = [], 0
        current.append((index, example))
        tokens += len(example.ids)
    if current:
        chunks.append(Chunk(job, tuple(current), step, pad_to_multiple_of))
    return chunks


def pack(chunks: Sequence[Chunk], device: torch.device) -> PackedBatch:
    """Lay the chunks end to end: positions restart with each document, and no document's first token is a label.

    All of it is put together on the CPU and moved in one piece.
    """
    arrays = [chunk.arrays for chunk in chunks]
    tokens, counts = [len(one.ids) for one in arrays], [len(one.label_indices) for one in arrays]
    starts = np.cumsum([0, *tokens[:-1]])
    ids = np.concatenate([one.ids for one in arrays])
    labels = np.concatenate([one.label_indices + start for one, start in zip(arrays, starts, strict=True)])
    positions = np.concatenate([one.positions for one in arrays])
    examples = np.concatenate([one.example_indices for one in arrays])
    parts = ids, positions, examples, labels - 1, ids[labels]
    moved = to_device(torch.from_numpy(np.concatenate(parts)), device).split([len(part) for part in parts])
    of_chunks = zip(
        moved[3].split(counts), moved[4].split(counts), moved[2].split(tokens), moved[1].split(tokens), strict=True
    )
    packed = [PackedChunk(c.job, c.step, c.padded_tokens, *part) for c, part in zip(chunks, of_chunks, strict=True)]
    lengths = tuple(length for one in arrays for length in one.lengths)
    return PackedBatch(moved[0][None], moved[1][None], lengths, tuple(packed))
