"""The low-rank products of many adapters on one batch, one adapter to a stretch of rows (`Segments`).

    h  = scale * x A^T             shrink            [T, in]  -> [T, width]
    dh = scale * dy B              shrink_gradient   [T, out] -> [T, width]
    dA += dh^T x                   add_a_gradients
    dB += dy^T h                   add_b_gradients
    dx += dh A                     expand_gradient_

x W^T + h B^T is the layer's output and dy W + dh A its input gradient; those two sums are made in the elementwise
kernels (`layer_ops.py`), which read the frozen product anyway. Where some adapter of a batch drops features of x, the
first, third and last are those of `masked_low_rank.py`. Linears that share an input are one `LinearGroup`: their
A lie on top of each other, so that x is read once, and `width` columns of h hold their ranks side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lora_core import kernels
from lora_core.transfer import to_device

TILE_ROWS = 64
"""Rows that one program takes of one adapter: 16 for each of four warps. With fewer, warps compute the same twice."""

NARROW_ROWS = 16
"""The same for programs that walk along whole rows: the fewest that the matrix units take."""

SPAN_ROWS = 2048
"""Rows over which one program sums a weight's gradient before it adds to memory."""

NO_ADAPTER = -1


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


@dataclass(frozen=True)
class Magnitude:
    """DoRA on one linear: m `[out]`, its gradient, the norms of the rows of W + s B A, and `gain`, m over these; fp32
    or wider. The linear's output is `gain (W x + h B^T)` plus its bias.
    """

    m: Tensor
    gradient: Tensor
    norm: Tensor
    gain: Tensor


@dataclass(frozen=True)
class Part:
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
class GroupAdapter:
    """One adapter on one group: a `[width, in]` holds the A of its linears on top of each other.

    `scales` `[width]`, fp32 or wider, is each rank's scale; a part is None where the linear is not adapted.
    `dropout` acts in batches that have keys.
    """

    a: Tensor
    a_gradient: Tensor
    scales: Tensor
    parts: tuple[Part | None, ...]
    dropout: float = 0.0

    @property
    def width(self) -> int:
        return self.a.shape[0]

    def present(self, group: LinearGroup) -> list[tuple[Part, slice, float]]:
        """Each part that is there, with its columns of the group's output and its scale."""
        found = zip(self.parts, group.columns, self.part_scales, strict=True)
        return [(part, columns, scale) for part, columns, scale in found if part is not None]

    @cached_property
    def part_scales(self) -> tuple[float, ...]:
        """As torch's products take them; 0 where there is no part."""
        return tuple(0.0 if part is None else float(self.scales[part.offset]) for part in self.parts)

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


class Segments:
    """Which rows of a batch belong to which adapter: (adapter's place in the batch or `NO_ADAPTER`, rows), in order."""

    def __init__(self, runs: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.runs = list(runs)
        self.device = device
        self.rows = sum(rows for _, rows in runs)

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

    def slices(self) -> list[tuple[int, slice]]:
        """(adapter, its rows) of each run that has an adapter."""
        places, start = [], 0
        for adapter, rows in self.runs:
            if adapter != NO_ADAPTER:
                places.append((adapter, slice(start, start + rows)))
            start += rows
        return places

    def _pieces(self, limit: int) -> list[tuple[int, int, int]]:
        pieces, start = [], 0
        for adapter, rows in self.runs:
            for first in range(0, rows, limit):
                pieces.append((adapter, start + first, min(limit, rows - first)))
            start += rows
        return pieces

    def _moved(self, pieces: list[tuple[int, int, int]]) -> Tensor:
        return to_device(torch.tensor(pieces, dtype=torch.int32).view(-1, 3), self.device)


@dataclass(frozen=True)
class LowRank:
    """The adapters of a batch on one group: what the kernels of one layer need.

    `width` is the number of columns of h, at least that of any adapter here; `rank` the largest of any of its parts.
    `table` int64 `[adapters + 1, groups * FIELDS]` holds addresses for Triton (see `low_rank_triton.py`).
    `dropout_keys` int64 `[T]` are there if one of these adapters drops features in this batch, and `dora` says whether
    one has magnitudes (`gains.py`).
    """

    group: LinearGroup
    adapters: Sequence[GroupAdapter | None]
    segments: Segments
    width: int
    rank: int
    table: Tensor | None
    dropout_keys: Tensor | None = None
    dora: bool = False

    def present(self) -> list[tuple[GroupAdapter, slice]]:
        """Each adapter that has something here, with its rows."""
        found = [(self.adapters[place], rows) for place, rows in self.segments.slices()]
        return [(adapter, rows) for adapter, rows in found if adapter is not None]


@dataclass(frozen=True)
class Norm:
    """RMSNorm as a forward pass found it: `rstd` `[T]`, the reciprocal root mean squares of its input, and weight.

    Of heads, both have a dimension more.
    """

    rstd: Tensor
    weight: Tensor

    def of(self, x: Tensor) -> Tensor:
        """x normed, rounded where transformers rounds it."""
        return (x * self.rstd[..., None]).to(x.dtype) * self.weight


def shrink(x: Tensor, low_rank: LowRank) -> Tensor:
    """x `[T, in]` -> `scale * x A^T`, `[T, width]`; columns past an adapter's own ranks are undefined on CUDA."""
    if low_rank.dropout_keys is not None:
        from lora_core.kernels import masked_low_rank

        return masked_low_rank.shrink(x, low_rank)
    if kernels.runs_in_triton(x):
        from lora_core.kernels import low_rank_triton

        return low_rank_triton.shrink(x, low_rank)
    h = x.new_zeros(x.shape[0], low_rank.width)
    for adapter, rows in low_rank.present():
        own, scale = h[rows, : adapter.width], adapter.scale
        own.addmm_(x[rows], adapter.a.t(), beta=0, alpha=1.0 if scale is None else scale)
        if scale is None:
            own *= adapter.scales.to(x.dtype)
    return h


def shrink_gradient(dy: Tensor, low_rank: LowRank) -> Tensor:
    """dy `[T, out]` -> `scale * dy B`, `[T, width]`."""
    if kernels.runs_in_triton(dy):
        from lora_core.kernels import low_rank_triton

        return low_rank_triton.shrink_gradient(dy, low_rank)
    dh = dy.new_zeros(dy.shape[0], low_rank.width)
    for adapter, rows in low_rank.present():
        for part, columns, scale in adapter.present(low_rank.group):
            dh[rows, part.columns].addmm_(dy[rows, columns], part.b, beta=0, alpha=scale)
    return dh


def add_a_gradients(x: Tensor, dh: Tensor, low_rank: LowRank, norm: Norm | None = None) -> None:
    """Add `dh^T x` to A's gradient of every adapter, over its own rows, in fp32. With `norm`, the group's input is that
    norm of x, which need not be in memory.
    """
    if low_rank.dropout_keys is not None:
        from lora_core.kernels import masked_low_rank

        masked_low_rank.add_a_gradients(x, dh, low_rank, norm)
        return
    if kernels.runs_in_triton(x):
        from lora_core.kernels import low_rank_triton

        low_rank_triton.add_a_gradients(x, dh, low_rank, norm)
        return
    x = x if norm is None else norm.of(x)
    for adapter, rows in low_rank.present():
        add_product(adapter.a_gradient, dh[rows, : adapter.width].t(), x[rows])


def add_b_gradients(dy: Tensor, h: Tensor, low_rank: LowRank) -> None:
    """Add `dy^T h` to B's gradient of every adapter, likewise."""
    if kernels.runs_in_triton(dy):
        from lora_core.kernels import low_rank_triton

        low_rank_triton.add_b_gradients(dy, h, low_rank)
        return
    for adapter, rows in low_rank.present():
        for part, columns, _ in adapter.present(low_rank.group):
            add_product(part.b_gradient.t(), h[rows, part.columns].t(), dy[rows, columns])


def expand_gradient_(dx: Tensor, dh: Tensor, low_rank: LowRank) -> Tensor:
    """`dx += dh A`, in place: dx `[T, in]`."""
    if low_rank.dropout_keys is not None:
        from lora_core.kernels import masked_low_rank

        return masked_low_rank.expand_gradient_(dx, dh, low_rank)
    if kernels.runs_in_triton(dx):
        from lora_core.kernels import low_rank_triton

        return low_rank_triton.expand_gradient_(dx, dh, low_rank)
    for adapter, rows in low_rank.present():
        dx[rows].addmm_(dh[rows, : adapter.width], adapter.a)
    return dx


def expand_(y: Tensor, h: Tensor, low_rank: LowRank) -> Tensor:
    """`y += h B^T`, in place, on CPU: y `[T, out]`. (On CUDA the elementwise kernels do it.)"""
    for adapter, rows in low_rank.present():
        for part, columns, _ in adapter.present(low_rank.group):
            y[rows, columns].addmm_(h[rows, part.columns], part.b.t())
    return y


def add_product(gradient: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """`gradient += scale * left @ right`, in the precision of `gradient` from the product on."""
    if gradient.dtype == left.dtype:
        gradient.addmm_(left, right, alpha=scale)
    else:
        gradient.add_(left @ right, alpha=scale)
