"""A decoder layer's parts for the few tokens of a serving step: what lies between its frozen products
(`rope_to_pages_triton.py` and `paged_attention_triton.py` have the rest).

    add       x + y + h B^T; and that times a norm's weight      a program a row and block of columns
    shrink    h = scale * x A^T, in parts along the features     a program a tile and part
    swiglu    silu(gate) * up of the updated ones                a program a tile and stripe of columns

They compute what `layer_ops.py` and `low_rank.py` define. A few tokens are bound by the bytes of weights, and by how
many programs ask for them at once: so no program waits for a whole row. The reciprocal root mean square of RMSNorm is a
factor of a row, which whoever reads the product with the normed row multiplies with; h is left in parts, which whoever
reads it sums. A tile is NARROW_ROWS rows of one adapter, multiplied by matrix units; for `swiglu` it is one row where
most rows have adapters of their own. Which adapter a row has, and all else that differs from step to step, lies in
memory that the kernels read, so that one CUDA graph serves all steps of a shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.dora_triton import dora_scale_of, dora_scaled
from lora_core.kernels.low_rank_triton import FIELDS, address, precision, rank_block
from lora_core.kernels.operands import NARROW_ROWS, LinearGroup, UnscaledProduct

ADD = {"COLUMNS": 1024, "num_warps": 4}
ADD_OF_FEW = {"COLUMNS": 256, "num_warps": 2}  # rows, that is: they have too few programs otherwise
FEW_ROWS = 16
SHRINK = {"STEP": 128, "num_warps": 4, "num_stages": 3}
PART_FEATURES = 1024  # of one program
SWIGLU = {"COLUMNS": 512, "BLOCKS": 1, "STAGES": 1, "num_warps": 2}  # a thread sums the ranks of its columns alone
SWIGLU_TILES = {"COLUMNS": 128, "BLOCKS": 2, "STAGES": 3, "num_warps": 4}
TILE_RANKS = 64  # that a program takes at a time


@dataclass(frozen=True)
class StepAdapters:
    """The adapters of a step's rows on one group. `tables` int64 `[T]` are addresses of each row's adapter's table
    (`low_rank_triton.py`), `tiles` int64 `[n, 2]` (first row, rows) of at most NARROW_ROWS rows of one adapter, or no
    rows. h has `width` columns, 0 where nobody adapts the group; `rank` is the largest of a linear.
    """

    group: LinearGroup
    tables: Tensor
    tiles: Tensor
    width: int
    rank: int
    dora: bool

    @property
    def arguments(self) -> tuple[Tensor, int]:
        return self.tables, self.group.index * FIELDS

    @property
    def are_few(self) -> bool:
        """Whether most rows share theirs with others."""
        return len(self.tiles) < len(self.tables)

    @property
    def tile_rows(self) -> int:
        """Rows of a tile of `swiglu`."""
        return NARROW_ROWS if self.width and self.are_few else 1

    def ranks(self, rows: int = 1) -> dict[str, int | bool]:
        """Ranks of a linear that a program takes at a time for so many rows, and whether there may be more."""
        ranks = 16 if rows == 1 else min(TILE_RANKS, rank_block(max(1, self.rank)))
        return {"RANKS": ranks, "LOOP": self.rank > ranks}


class Normed(NamedTuple):
    """RMSNorm without its last step: `scaled` `[T, H]` is x times the norm's weight, and the sums of x's `squares` are
    fp32 `[T, blocks]`, by blocks of columns.
    """

    scaled: Tensor
    squares: Tensor
    eps: float

    def rstd(self) -> Tensor:
        """fp32 `[T, 1]`, what is missing."""
        return torch.rsqrt(self.squares.sum(1, keepdim=True) / self.scaled.shape[1] + self.eps)

    def whole(self) -> Tensor:
        """`[T, H]`, with that."""
        return (self.scaled * self.rstd()).to(self.scaled.dtype)

    @property
    def arguments(self) -> tuple[Tensor, int, float]:
        return self.squares, self.scaled.shape[1], self.eps


@triton.jit
def tile_of(tiles, ROWS: tl.constexpr):
    """(first row, rows) of a program's tile."""
    if ROWS == 1:
        first = tl.program_id(0).to(tl.int64)
        rows = first * 0 + 1
    else:
        first = tl.load(tiles + tl.program_id(0) * 2)
        rows = tl.load(tiles + tl.program_id(0) * 2 + 1)
    return first, rows


@triton.jit
def table_row_of(tables, t, offset):
    """A row's adapter's fields of one group."""
    return tl.load(tables + t).to(tl.pointer_type(tl.int64)) + offset


@triton.jit
def _summed(h, offsets, mask, h_part, PARTS: tl.constexpr):
    """h from its parts."""
    total = tl.load(h + offsets, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(h + part * h_part + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def _low_tile(h, t, t_mask, h_part, h_stride, field, c, dtype: tl.constexpr, PARTS: tl.constexpr):
    """h `[rows, ranks]` of one linear, whose fields of the table these are, for its ranks c."""
    mask = t_mask[:, None] & (c < tl.load(field + 2))[None, :]
    return _summed(h, t[:, None] * h_stride + (tl.load(field + 3) + c)[None, :], mask, h_part, PARTS).to(dtype)


@triton.jit
def scaled_product(values, rows, columns, n_mask):
    """Values of an unscaled product, of rows with these scales, for the outputs whose scales `columns` points to."""
    return values * rows * tl.load(columns, mask=n_mask, other=0.0)[None, :]


@triton.jit
def updated_tile(
    acc, h, first_row, rows, h_part, h_stride, row, linear, N, n, n_mask,
    dtype: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, LOOP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc `[ROWS, columns]` + h B^T of a tile, for outputs n of a linear that has N."""
    field = row + 4 + 4 * linear
    b = address(field, 0, dtype)
    r = tl.load(field + 2).to(tl.int32)
    offset = tl.load(field + 3).to(tl.int32)
    for first in range(0, r if LOOP else 1, RANKS):
        c = first + tl.arange(0, RANKS)
        tile = tl.load(b + c[:, None] * N + n[None, :], mask=(c < r)[:, None] & n_mask[None, :], other=0.0)
        if ROWS == 1:
            low = _summed(h, first_row * h_stride + offset + c, c < r, h_part, PARTS).to(dtype).to(tl.float32)
            acc += tl.sum(low[:, None] * tile.to(tl.float32), axis=0)[None, :]
        else:
            i = tl.arange(0, ROWS)
            low = _low_tile(h, first_row + i, i < rows, h_part, h_stride, field, c, dtype, PARTS)
            acc = tl.dot(low, tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _add(
    x, y, row_scales, column_scales, h, scaled, squares, weight, tables, offset, H, h_part, h_stride,
    ADD: tl.constexpr, SCALED: tl.constexpr, UPDATE: tl.constexpr, DORA: tl.constexpr, PARTS: tl.constexpr,
    SUMS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    n_mask = n < H
    mask = n_mask[None, :]
    offsets = (t * H + n)[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        added = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            added = scaled_product(added, tl.load(row_scales + t), column_scales + n, n_mask)
        if UPDATE:
            row = table_row_of(tables, t, offset)
            added = updated_tile(
                added, h, t, 1, h_part, h_stride, row, 0, H, n, n_mask, dtype, PARTS, 1, RANKS, LOOP, "ieee"
            )
            if DORA:
                scale, number = dora_scale_of(row, 0)
                added = dora_scaled(added, scale, number, n, n_mask)
        rounded = (value + added).to(dtype)
        tl.store(x + offsets, rounded, mask=mask)
        value = rounded.to(tl.float32)
    tl.store(squares + t * SUMS + tl.program_id(1), tl.sum(value * value))
    value *= tl.load(weight + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(scaled + offsets, value.to(dtype), mask=mask)


@triton.jit
def _shrink(
    x, h, tables, offset, tiles, K, part_features, h_part, h_stride,
    ROWS: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row = tl.load(tiles + tl.program_id(0) * 2)
    rows = tl.load(tiles + tl.program_id(0) * 2 + 1)
    if rows > 0:
        row = table_row_of(tables, first_row, offset)
        width = tl.load(row + 2).to(tl.int32)
        if tl.program_id(2) * RANKS < width:
            dtype: tl.constexpr = x.dtype.element_ty
            a = address(row, 0, dtype)
            scales = tl.load(row + 3).to(tl.pointer_type(tl.float32))
            c = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
            c_mask = c < width
            t = first_row + tl.arange(0, ROWS)
            t_mask = tl.arange(0, ROWS) < rows
            acc = tl.zeros((ROWS, RANKS), tl.float32)
            start = tl.program_id(1) * part_features
            for first in range(start, tl.minimum(K, start + part_features), STEP):
                k = first + tl.arange(0, STEP)
                k_mask = k < K
                x_tile = tl.load(x + t[:, None] * K + k[None, :], mask=t_mask[:, None] & k_mask[None, :], other=0.0)
                a_tile = tl.load(a + c[None, :] * K + k[:, None], mask=c_mask[None, :] & k_mask[:, None], other=0.0)
                acc = tl.dot(x_tile, a_tile, acc, input_precision=PRECISION)
            acc *= tl.load(scales + c, mask=c_mask, other=0.0)[None, :]
            target = h + tl.program_id(1) * h_part + t[:, None] * h_stride + c[None, :]
            tl.store(target, acc, mask=t_mask[:, None] & c_mask[None, :])


@triton.jit
def _swiglu(
    y, row_scales, column_scales, squares, H, eps, h, activation, tables, offset, tiles, I, h_part, h_stride,
    SCALED: tl.constexpr, UPDATE: tl.constexpr, DORA: tl.constexpr, PARTS: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    RANKS: tl.constexpr, LOOP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row, rows = tile_of(tiles, ROWS)
    if rows > 0:
        dtype: tl.constexpr = y.dtype.element_ty
        i = tl.arange(0, ROWS)
        t = first_row + i
        t_mask = i < rows
        c = tl.arange(0, RANKS)
        sums = squares + t[:, None] * SUMS + tl.arange(0, SUMS)[None, :]
        rstd = tl.rsqrt(tl.sum(tl.load(sums, mask=t_mask[:, None], other=0.0), axis=1) / H + eps)[:, None]
        if SCALED:
            row_scale = tl.load(row_scales + t, mask=t_mask, other=0.0)[:, None]
        if UPDATE:
            row = table_row_of(tables, first_row, offset)
            if ROWS > 1 and not LOOP:
                gate_low = _low_tile(h, t, t_mask, h_part, h_stride, row + 4, c, dtype, PARTS)
                up_low = _low_tile(h, t, t_mask, h_part, h_stride, row + 8, c, dtype, PARTS)
        for block in tl.range(0, BLOCKS, num_stages=STAGES):
            n = (tl.program_id(1) * BLOCKS + block) * COLUMNS + tl.arange(0, COLUMNS)
            n_mask = n < I
            mask = t_mask[:, None] & n_mask[None, :]
            pointers = y + t[:, None] * (2 * I) + n[None, :]
            gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(pointers + I, mask=mask, other=0.0).to(tl.float32)
            if SCALED:
                gate = scaled_product(gate, row_scale, column_scales + n, n_mask)
                up = scaled_product(up, row_scale, column_scales + I + n, n_mask)
            if UPDATE:
                if ROWS > 1 and not LOOP:
                    b_offsets = c[:, None] * I + n[None, :]
                    b_mask = (c < tl.load(row + 6))[:, None] & n_mask[None, :]
                    tile = tl.load(address(row, 4, dtype) + b_offsets, mask=b_mask, other=0.0)
                    gate = tl.dot(gate_low, tile, gate, input_precision=PRECISION)
                    b_mask = (c < tl.load(row + 10))[:, None] & n_mask[None, :]
                    tile = tl.load(address(row, 8, dtype) + b_offsets, mask=b_mask, other=0.0)
                    up = tl.dot(up_low, tile, up, input_precision=PRECISION)
                else:
                    gate = updated_tile(
                        gate, h, first_row, rows, h_part, h_stride, row, 0, I, n, n_mask,
                        dtype, PARTS, ROWS, RANKS, LOOP, PRECISION,
                    )  # fmt: skip
                    up = updated_tile(
                        up, h, first_row, rows, h_part, h_stride, row, 1, I, n, n_mask,
                        dtype, PARTS, ROWS, RANKS, LOOP, PRECISION,
                    )  # fmt: skip
                if DORA:
                    scale, number = dora_scale_of(row, 0)
                    gate = dora_scaled(gate, scale, number, n, n_mask)
                    scale, number = dora_scale_of(row, 1)
                    up = dora_scaled(up, scale, number, n, n_mask)
            gate *= rstd
            value = gate * tl.sigmoid(gate) * up * rstd
            tl.store(activation + t[:, None] * I + n[None, :], value.to(dtype), mask=mask)


def add(
    x: Tensor, y: UnscaledProduct | None, h: Tensor | None, adapters: StepAdapters, weight: Tensor, eps: float
) -> Normed:
    """x `[T, H]` becomes x + y + h B^T; returns its RMSNorm with this weight. y None: of x as it is."""
    rows, width = x.shape
    config = ADD_OF_FEW if rows <= FEW_ROWS else ADD
    blocks = triton.cdiv(width, config["COLUMNS"])
    sums = triton.next_power_of_2(blocks)
    scaled = torch.empty_like(x)
    squares = (x.new_empty if sums == blocks else x.new_zeros)(rows, sums, dtype=torch.float32)
    _add[(rows, blocks)](
        x, *(y or (None, None, None)), h, scaled, squares, weight, *adapters.arguments, width, *h_arguments(h),
        ADD=y is not None, SCALED=is_scaled(y), UPDATE=h is not None, DORA=adapters.dora, PARTS=parts_of(h), SUMS=sums,
        **adapters.ranks(), **config,
    )  # fmt: skip
    return Normed(scaled, squares, eps)


def shrink(x: Tensor, adapters: StepAdapters) -> Tensor | None:
    """x `[T, in]` -> `scale * x A^T` in parts, fp32 `[parts, T, width]`, of which an adapter's own columns are defined;
    None where nobody adapts the group.
    """
    if adapters.width == 0:
        return None
    rows, features = x.shape
    tiles, ranks = len(adapters.tiles), min(TILE_RANKS, rank_block(adapters.width))
    parts = triton.cdiv(features, PART_FEATURES)
    h = x.new_empty(parts, rows, adapters.width, dtype=torch.float32)
    _shrink[(tiles, parts, triton.cdiv(adapters.width, ranks))](
        x, h, *adapters.arguments, adapters.tiles, features, PART_FEATURES, *h_arguments(h),
        ROWS=NARROW_ROWS, RANKS=ranks, PRECISION=precision(x), **SHRINK,
    )  # fmt: skip
    return h


def swiglu(y: UnscaledProduct, normed: Normed, h: Tensor | None, adapters: StepAdapters) -> Tensor:
    """y `[T, 2 I]`, gate and up side by side, the product of `normed`, plus h B^T -> `silu(gate) * up` `[T, I]`."""
    values = y.values
    features, rows = values.shape[1] // 2, 1 if h is None else adapters.tile_rows
    config = SWIGLU if rows == 1 else SWIGLU_TILES
    activation = values.new_empty(len(values), features)
    stripes = triton.cdiv(features, config["COLUMNS"] * config["BLOCKS"])
    _swiglu[(len(values) if rows == 1 else len(adapters.tiles), stripes)](
        *y, *normed.arguments, h, activation, *adapters.arguments, adapters.tiles, features, *h_arguments(h),
        SCALED=is_scaled(y), UPDATE=h is not None, DORA=adapters.dora, PARTS=parts_of(h), SUMS=normed.squares.shape[1],
        ROWS=rows, **adapters.ranks(rows), PRECISION=precision(values), **config,
    )  # fmt: skip
    return activation


def is_scaled(y: UnscaledProduct | None) -> bool:
    return y is not None and y.row_scales is not None


def h_arguments(h: Tensor | None) -> tuple[int, int]:
    """From one part to the next, and from one row to the next."""
    return (0, 0) if h is None else (h.stride(0), h.stride(1))


def parts_of(h: Tensor | None) -> int:
    return 1 if h is None else len(h)
