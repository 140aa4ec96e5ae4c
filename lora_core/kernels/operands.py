"""What the kernels take: adapters, the rows that are theirs, norms, rotations and packed weights; no arithmetic.

Linears that share an input are one `LinearGroup`: their A lie on top of each other, so that x is read once, and `width`
columns of h hold their ranks side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.kernels.stacked_low_rank import StackedAdapters
from lora_core.kernels.transfer import to_device

TILE_ROWS = 64
"""Rows that one program takes of one adapter: 16 for each of four warps. With fewer, warps compute the same twice."""

NARROW_ROWS = 16
"""The same for programs that walk along whole rows: the fewest that the matrix units take."""

SPAN_ROWS = 2048
"""Rows over which one program sums a weight's gradient before it adds to memory."""

NO_ADAPTER = -1

EXACT_DTYPES = (torch.float32, torch.float64)
"""In these a CPU computes each segment as if it were alone; in others segments are joined where that is faster."""

FP8_MAX = 448.0
FP8_TINY = 1e-12  # a row of zeros keeps a scale that can be divided by

NF4_BLOCK = 64
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The sixteen quantiles of a normal distribution that QLoRA's appendix E lists."""


@dataclass(frozen=True)
class LinearGroup:
    """Linears that share an input: `inputs` features in, `outputs` of each, stacked, out."""

    index: int
    names: tuple[str, ...]
    inputs: int
    outputs: tuple[int, ...]

    @cached_property
    def columns(self) -> tuple[slice, ...]:
        """Where each linear's outputs lie in the stacked output."""
        ends = torch.tensor(self.outputs).cumsum(0).tolist()
        return tuple(slice(end - size, end) for end, size in zip(ends, self.outputs, strict=True))


class UnscaledProduct(NamedTuple):
    """x W^T is `values` `[T, out]` times `row_scales` and `column_scales`, fp32 `[T, 1]` and `[1, out]`; None: 1."""

    values: Tensor
    row_scales: Tensor | None = None
    column_scales: Tensor | None = None


@dataclass(frozen=True)
class Magnitude:
    """DoRA on one linear: m `[out]`, its gradient, the norms of the rows of W + s B A, and `scale`, m over these; fp32
    or wider. The linear's output is `scale (W x + h B^T)` plus its bias.
    """

    m: Tensor
    gradient: Tensor
    norm: Tensor
    scale: Tensor


@dataclass(frozen=True)
class LinearAdapter:
    """One adapter's B of one linear: b `[out, r]` in the base's dtype, its fp32 gradient, and its columns of h.

    In memory both lie transposed, `[r, out]`, as Triton wants them. `module_key` is the linear's in dropout masks.
    """

    b: Tensor
    b_gradient: Tensor
    offset: int
    module_key: int = 0
    magnitude: Magnitude | None = None

    @property
    def columns(self) -> slice:
        return slice(self.offset, self.offset + self.b.shape[1])


@dataclass(frozen=True)
class FusedLinearAdapter:
    """One adapter on one group: a `[width, in]` holds the A of its linears on top of each other.

    `scales` `[width]`, fp32 or wider, is each rank's scale; a part is None where the linear is not adapted.
    `dropout` acts in batches that have keys.
    """

    a: Tensor
    a_gradient: Tensor
    scales: Tensor
    parts: tuple[LinearAdapter | None, ...]
    dropout: float = 0.0

    @property
    def width(self) -> int:
        return self.a.shape[0]

    def present(self, group: LinearGroup) -> list[tuple[LinearAdapter, slice, float]]:
        """Return each part that is there, with its columns of the group's output and its scale."""
        found = zip(self.parts, group.columns, self.part_scales, strict=True)
        return [(part, columns, scale) for part, columns, scale in found if part is not None]

    @cached_property
    def part_scales(self) -> tuple[float, ...]:
        """As torch's products take them; 0 where there is no part, or no number."""
        return tuple(0.0 if part is None or part.b.is_meta else float(self.scales[part.offset]) for part in self.parts)

    @cached_property
    def scale(self) -> float | None:
        """That of all parts; None where they have scales of their own."""
        present = {scale for part, scale in zip(self.parts, self.part_scales, strict=True) if part is not None}
        return present.pop() if len(present) == 1 else None

    @property
    def largest_rank(self) -> int:
        return max(part.b.shape[1] for part in self.parts if part is not None)

    @property
    def dora(self) -> bool:
        return any(part is not None and part.magnitude is not None for part in self.parts)


_ONE_THREAD = 32768  # elements from which torch's elementwise operations take several threads


class Segments:
    """Which tokens of a batch belong to which adapter: (its index in the batch or `NO_ADAPTER`, tokens), in order."""

    def __init__(self, segments: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._segments = list(segments)
        self.device = device

    @cached_property
    def tiles(self) -> Tensor:
        """int32 `[n, 3]`: (adapter, first row, rows) of at most TILE_ROWS rows each."""
        return self._moved(self._pieces(TILE_ROWS))

    @cached_property
    def narrow_tiles(self) -> Tensor:
        """The same with at most NARROW_ROWS rows each."""
        return self._moved(self._pieces(NARROW_ROWS))

    @cached_property
    def spans(self) -> Tensor:
        """The same with at most SPAN_ROWS rows each, of adapters alone."""
        return self._moved([piece for piece in self._pieces(SPAN_ROWS) if piece[0] != NO_ADAPTER])

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """x `[T, ...]` segment by segment."""
        parts: Sequence[Tensor] = x.split([rows for _, rows in self._segments])
        return parts

    def slices(self) -> list[tuple[int, slice]]:
        """Return (adapter's index, its rows) of each segment that has an adapter."""
        found, start = [], 0
        for adapter, rows in self._segments:
            if adapter != NO_ADAPTER:
                found.append((adapter, slice(start, start + rows)))
            start += rows
        return found

    def _pieces(self, limit: int) -> list[tuple[int, int, int]]:
        pieces, start = [], 0
        for adapter, rows in self._segments:
            for first in range(0, rows, limit):
                pieces.append((adapter, start + first, min(limit, rows - first)))
            start += rows
        return pieces

    def _moved(self, pieces: list[tuple[int, int, int]]) -> Tensor:
        return to_device(torch.tensor(pieces, dtype=torch.int32).view(-1, 3), self.device)


class ServedSegments(Segments):
    """Those of a batch that is only served: each of its rows is by itself."""

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """x `[T, features]`, rows of a larger tensor, by so few that one thread takes them: in each row it then begins
        anew.
        """
        parts: Sequence[Tensor] = x.split(max(1, (_ONE_THREAD - 1) // x.shape[1]))
        return parts


@dataclass(frozen=True)
class LowRank:
    """The adapters of a batch on one group: what the kernels of one layer need.

    `width` is the number of columns of h, at least that of any adapter here; `rank` the largest of any of its parts.
    `table` int64 `[adapters + 1, groups * FIELDS]` holds addresses for Triton (see `low_rank_triton.py`).
    `dropout_keys` int64 `[T]` are there if one of these adapters drops features in this batch, and `dora` says whether
    one has magnitudes (`dora.py`). `stacks` are there where a CPU serves them (`stacked_low_rank.py`).
    """

    group: LinearGroup
    adapters: Sequence[FusedLinearAdapter | None]
    segments: Segments
    width: int
    rank: int
    table: Tensor | None
    dropout_keys: Tensor | None = None
    dora: bool = False
    stacks: Sequence[StackedAdapters] | None = None

    def present(self) -> list[tuple[FusedLinearAdapter, slice]]:
        """Return each adapter that has something here, with its rows."""
        found = [(self.adapters[index], rows) for index, rows in self.segments.slices()]
        return [(adapter, rows) for adapter, rows in found if adapter is not None]


@dataclass(frozen=True)
class Norm:
    """RMSNorm as a forward pass found it: `rstd` `[T]`, the reciprocal root mean squares of its input, and weight.

    Of heads, both have a dimension more.
    """

    rstd: Tensor
    weight: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Return x normed, rounded where transformers rounds it."""
        return (x * self.rstd[..., None]).to(x.dtype).mul_(self.weight)


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm of each head of q and k: `weight` `[heads of q and k, d]` is q's in q's rows and k's in k's."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Rope:
    """cos and sin `[T, d / 2]` of each row's position, and how a row of q, k, v divides: heads of d, and those rotated.

    `bias` `[out]` belongs to the frozen q, k, v (Qwen2), `norm` to the heads before they are rotated (Qwen3); None
    elsewhere.
    """

    cos: Tensor
    sin: Tensor
    head_size: int
    rotated_heads: int
    bias: Tensor | None
    norm: HeadNorm | None


class PagedLayer(NamedTuple):
    """Keys and values of one layer, `[pages, kv heads, tokens of a page, d]`, the pages of each slot in the order of
    its tokens, int64 `[slots, most pages]`, and the number of query heads.
    """

    keys: Tensor
    values: Tensor
    table: Tensor
    heads: int


class Nf4(NamedTuple):
    """A matrix in four bits: codes uint8 `[elements / 2]` (the first of a pair in the high half), fp32 scales
    `[elements / 64]`.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]
