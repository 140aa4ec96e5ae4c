"""`low_rank.py` in Triton. Every program works on rows of one adapter, so that adapters of any rank share a launch and
a neighbour's NaN stays with it; nothing is padded, masked or gathered, and the cost does not grow with their number.

Addresses come from a table of int64, one row an adapter: FIELDS numbers for each group of linears.

    0 A    1 A's gradient    2 width (sum of ranks)    3 scales
    4 + 4 i ... of linear i: B, B's gradient, r, column of h
    16 share that dropout drops, in 1/65,536    17 + i linear i's key in dropout masks
    20 + 4 i ... of linear i, all 0 without DoRA: m over the norm, m, m's gradient, norms of rows

What differs from batch to batch, the number of adapters and of rows T, is not specialised, or jobs that come and go
would have every kernel compiled again. Ranks are taken in blocks of 16, 32 or 64, and each compiles once.

All memory is bf16 or fp32 as the batch is, gradients and scales fp32. A and B start at multiples of 16 bytes, and B
lies transposed, `[r, out]`: threads side by side then read numbers side by side, whatever r is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.adapters.dropout import threshold
from lora_core.kernels.dispatch import launch
from lora_core.kernels.operands import TILE_ROWS, FusedLinearAdapter, LinearGroup, LowRank, Norm

FIELDS = 32
SCALES = 3
ADDRESSES = [0, 4, 8, 12]
"""Fields with the addresses of weights."""
MAGNITUDE = tl.constexpr(20)

# The fastest of a sweep on one H100 at 8,192 tokens of the 8B shape, r 16 (microseconds; in brackets the floor,
# bytes over 3 TB/s): shrink of 4,096 features 37 (22), of 14,336 92 (78); A's gradient 61 (22) and 97 (78), B's of
# gate and up 185 (157).
SHRINK = {"STEP": 128, "num_warps": 4, "num_stages": 4}
A_GRADIENT = {"COLUMNS": 64, "STEP": 128, "num_warps": 8, "num_stages": 3}
A_GRADIENT_WIDE = A_GRADIENT | {"STEP": 64}  # of a down-projection
B_GRADIENT = {"COLUMNS": 128, "STEP": 64, "num_warps": 8, "num_stages": 3}
EXPAND_GRADIENT = {"COLUMNS": 128, "num_warps": 8}
WIDE_NUMBERS = {"STEP": 32, "num_stages": 2}  # fp32 takes twice the shared memory


def table_row(adapter: FusedLinearAdapter | None, group: LinearGroup) -> list[int]:
    """FIELDS numbers; all zero for a group that is not adapted, whose loops over ranks then end at once."""
    row = [0] * FIELDS
    if adapter is None:
        return row
    row[:4] = [adapter.a.data_ptr(), adapter.a_gradient.data_ptr(), adapter.width, adapter.scales.data_ptr()]
    for index, part in enumerate(adapter.parts):
        if part is not None:
            assert part.b.t().is_contiguous() and part.b_gradient.t().is_contiguous()
            row[4 + 4 * index : 8 + 4 * index] = [
                part.b.data_ptr(),
                part.b_gradient.data_ptr(),
                part.b.shape[1],
                part.offset,
            ]
            row[17 + index] = part.module_key
            if (magnitude := part.magnitude) is not None:
                vectors = (magnitude.scale, magnitude.m, magnitude.gradient, magnitude.norm)
                row[20 + 4 * index : 24 + 4 * index] = [vector.data_ptr() for vector in vectors]
    row[16] = threshold(adapter.dropout)
    return row


@triton.jit
def address(row, field, dtype: tl.constexpr):
    """The pointer in one field of a table's row."""
    return tl.multiple_of(tl.load(row + field).to(tl.pointer_type(dtype)), 16)


@triton.jit
def table_of(table, adapter, row_fields, adapters):
    """An adapter's row of the table; the last one where the rows have no adapter."""
    return table + tl.where(adapter < 0, adapters, adapter) * row_fields


@triton.jit
def updated(
    acc, h, h_stride, t, t_mask, row, linear, N, n, n_mask,
    RANKS: tl.constexpr, LOOP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc `[rows, columns]` + h B^T of one linear of N outputs, for tokens t and output columns n.

    Without LOOP no adapter has more than RANKS ranks: straight code, whose loads go out together with the caller's.
    """
    dtype: tl.constexpr = h.dtype.element_ty
    field = row + 4 + 4 * linear
    b = address(field, 0, dtype)
    r = tl.load(field + 2).to(tl.int32)
    offset = tl.load(field + 3).to(tl.int32)
    for first in range(0, r if LOOP else 1, RANKS):
        c = first + tl.arange(0, RANKS)
        c_mask = c < r
        h_tile = tl.load(
            h + t[:, None] * h_stride + (offset + c)[None, :], mask=t_mask[:, None] & c_mask[None, :], other=0.0
        )
        b_tile = tl.load(b + c[:, None] * N + n[None, :], mask=n_mask[None, :] & c_mask[:, None], other=0.0)
        acc = tl.dot(h_tile, b_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def expanded(
    acc, dh, dh_stride, t, t_mask, row, K, k, k_mask,
    RANKS: tl.constexpr, LOOP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc `[rows, features]` + dh A of a group, for tokens t and input features k."""
    dtype: tl.constexpr = dh.dtype.element_ty
    a = address(row, 0, dtype)
    width = tl.load(row + 2).to(tl.int32)
    for first in range(0, width if LOOP else 1, RANKS):
        c = first + tl.arange(0, RANKS)
        c_mask = c < width
        dh_tile = tl.load(dh + t[:, None] * dh_stride + c[None, :], mask=t_mask[:, None] & c_mask[None, :], other=0.0)
        a_tile = tl.load(a + c[:, None] * K + k[None, :], mask=c_mask[:, None] & k_mask[None, :], other=0.0)
        acc = tl.dot(dh_tile, a_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["adapters"])
def _shrink(
    x, h, tiles, table, row_fields, adapters, K, h_stride,
    ROWS: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    row = table_of(table, tl.load(tile), row_fields, adapters)
    width = tl.load(row + 2).to(tl.int32)
    c = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    if tl.program_id(1) * RANKS < width:
        dtype: tl.constexpr = x.dtype.element_ty
        a = address(row, 0, dtype)
        scales = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        t = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
        t_mask = tl.arange(0, ROWS) < tl.load(tile + 2)
        c_mask = c < width
        acc = tl.zeros((ROWS, RANKS), tl.float32)
        for first in range(0, K, STEP):
            k = first + tl.arange(0, STEP)
            k_mask = k < K
            x_tile = tl.load(x + t[:, None] * K + k[None, :], mask=t_mask[:, None] & k_mask[None, :], other=0.0)
            a_tile = tl.load(a + c[None, :] * K + k[:, None], mask=c_mask[None, :] & k_mask[:, None], other=0.0)
            acc = tl.dot(x_tile, a_tile, acc, input_precision=PRECISION)
        acc *= tl.load(scales + c, mask=c_mask, other=0.0)[None, :]
        tl.store(
            h + t[:, None] * h_stride + c[None, :], acc.to(h.dtype.element_ty), mask=t_mask[:, None] & c_mask[None, :]
        )


@triton.jit(do_not_specialize=["adapters"])
def _shrink_gradient(
    dy, dh, tiles, table, row_fields, adapters, N, N0, N1, h_stride,
    ROWS: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    linear = tl.program_id(1)
    row = table_of(table, tl.load(tile), row_fields, adapters)
    field = row + 4 + 4 * linear
    r = tl.load(field + 2).to(tl.int32)
    if tl.program_id(2) * RANKS < r:
        dtype: tl.constexpr = dy.dtype.element_ty
        b = address(field, 0, dtype)
        offset = tl.load(field + 3).to(tl.int32)
        scales = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        c = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
        c_mask = c < r
        start = tl.where(linear == 0, 0, tl.where(linear == 1, N0, N0 + N1))
        size = tl.where(linear == 0, N0, tl.where(linear == 1, N1, N - N0 - N1))
        t = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
        t_mask = tl.arange(0, ROWS) < tl.load(tile + 2)
        acc = tl.zeros((ROWS, RANKS), tl.float32)
        for first in range(0, size, STEP):
            n = first + tl.arange(0, STEP)
            n_mask = n < size
            dy_tile = tl.load(
                dy + t[:, None] * N + (start + n)[None, :], mask=t_mask[:, None] & n_mask[None, :], other=0.0
            )
            b_tile = tl.load(b + c[None, :] * size + n[:, None], mask=n_mask[:, None] & c_mask[None, :], other=0.0)
            acc = tl.dot(dy_tile, b_tile, acc, input_precision=PRECISION)
        acc *= tl.load(scales + offset + c, mask=c_mask, other=0.0)[None, :]
        tl.store(
            dh + t[:, None] * h_stride + (offset + c)[None, :],
            acc.to(dh.dtype.element_ty),
            mask=t_mask[:, None] & c_mask[None, :],
        )


@triton.jit
def times_rstd(low_tile, rstds, t, t_mask):
    """Rows of dh times the reciprocal root mean squares of x: with x, the same product as dh with x normed."""
    rstd = tl.load(rstds + t, mask=t_mask, other=0.0)
    return (low_tile.to(tl.float32) * rstd[:, None]).to(low_tile.dtype)


@triton.jit
def _sum_products(
    wide, low, rstds, low_stride, first_row, rows, n, n_mask, N, c, c_mask,
    NORM: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`[columns, ranks]`: the sum over `rows` rows of wide^T low."""
    acc = tl.zeros((COLUMNS, RANKS), tl.float32)
    for first in range(0, rows, STEP):
        i = first + tl.arange(0, STEP)
        t = (first_row + i).to(tl.int64)
        t_mask = i < rows
        wide_tile = tl.load(wide + t[:, None] * N + n[None, :], mask=t_mask[:, None] & n_mask[None, :], other=0.0)
        low_tile = tl.load(
            low + t[:, None] * low_stride + c[None, :], mask=t_mask[:, None] & c_mask[None, :], other=0.0
        )
        if NORM:
            low_tile = times_rstd(low_tile, rstds, t, t_mask)
        acc = tl.dot(tl.trans(wide_tile), low_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _add_a_gradient(
    x, dh, rstds, weight, spans, table, row_fields, K, h_stride,
    NORM: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    span = spans + tl.program_id(1) * 3
    row = table + tl.load(span) * row_fields
    width = tl.load(row + 2).to(tl.int32)
    if tl.program_id(2) * RANKS < width:
        c = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
        c_mask = c < width
        k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        k_mask = k < K
        acc = _sum_products(
            x, dh, rstds, h_stride, tl.load(span + 1), tl.load(span + 2), k, k_mask, K, c, c_mask,
            NORM, COLUMNS, RANKS, STEP, PRECISION,
        )  # fmt: skip
        if NORM:
            acc *= tl.load(weight + k, mask=k_mask, other=0.0).to(tl.float32)[:, None]
        gradient = tl.load(row + 1).to(tl.pointer_type(tl.float32))
        tl.atomic_add(gradient + c[None, :] * K + k[:, None], acc, mask=c_mask[None, :] & k_mask[:, None])


@triton.jit
def block_of(block, N, N0, N1, COLUMNS: tl.constexpr):
    """Of a program for COLUMNS outputs of one linear of a group: (linear, which block of its outputs, where those begin
    among the group's, how many they are).
    """
    blocks0 = tl.cdiv(N0, COLUMNS)
    blocks1 = tl.cdiv(N1, COLUMNS)
    linear = tl.where(block < blocks0, 0, tl.where(block < blocks0 + blocks1, 1, 2))
    block -= tl.where(linear == 0, 0, tl.where(linear == 1, blocks0, blocks0 + blocks1))
    start = tl.where(linear == 0, 0, tl.where(linear == 1, N0, N0 + N1))
    size = tl.where(linear == 0, N0, tl.where(linear == 1, N1, N - N0 - N1))
    return linear, block, start, size


@triton.jit
def _add_b_gradient(
    dy, h, spans, table, row_fields, N, N0, N1, h_stride,
    COLUMNS: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    linear, block, start, size = block_of(tl.program_id(0), N, N0, N1, COLUMNS)
    span = spans + tl.program_id(1) * 3
    row = table + tl.load(span) * row_fields
    field = row + 4 + 4 * linear
    r = tl.load(field + 2).to(tl.int32)
    if tl.program_id(2) * RANKS < r:
        c = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
        c_mask = c < r
        n = block * COLUMNS + tl.arange(0, COLUMNS)
        n_mask = n < size
        acc = _sum_products(
            dy + start, h + tl.load(field + 3), None, h_stride, tl.load(span + 1), tl.load(span + 2), n, n_mask, N, c,
            c_mask, False, COLUMNS, RANKS, STEP, PRECISION,
        )  # fmt: skip
        gradient = tl.load(field + 1).to(tl.pointer_type(tl.float32))
        tl.atomic_add(gradient + c[None, :] * size + n[:, None], acc, mask=n_mask[:, None] & c_mask[None, :])


@triton.jit(do_not_specialize=["adapters"])
def _expand_gradient(
    dx, dh, tiles, table, row_fields, adapters, K, h_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, LOOP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    row = table_of(table, tl.load(tile), row_fields, adapters)
    if tl.load(row + 2) > 0:
        t = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
        t_mask = tl.arange(0, ROWS) < tl.load(tile + 2)
        k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        k_mask = k < K
        pointers = dx + t[:, None] * K + k[None, :]
        mask = t_mask[:, None] & k_mask[None, :]
        acc = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        acc = expanded(acc, dh, h_stride, t, t_mask, row, K, k, k_mask, RANKS, LOOP, PRECISION)
        tl.store(pointers, acc.to(dx.dtype.element_ty), mask=mask)


def shrink(x: Tensor, low_rank: LowRank) -> Tensor:
    """See `low_rank.shrink`."""
    h = x.new_empty(x.shape[0], low_rank.width)
    ranks = rank_block(low_rank.width)
    grid = (low_rank.segments.tiles.shape[0], triton.cdiv(low_rank.width, ranks))
    launch(
        _shrink, grid,
        x, h, low_rank.segments.tiles, *table_arguments(low_rank), x.shape[1], h.stride(0),
        ROWS=TILE_ROWS, RANKS=ranks, PRECISION=precision(x), **sized(SHRINK, x),
    )  # fmt: skip
    return h


def shrink_gradient(dy: Tensor, low_rank: LowRank) -> Tensor:
    """See `low_rank.shrink_gradient`."""
    dh = dy.new_empty(dy.shape[0], low_rank.width)
    ranks = rank_block(low_rank.rank)
    grid = (
        low_rank.segments.tiles.shape[0],
        len(low_rank.group.outputs),
        triton.cdiv(low_rank.rank, ranks),
    )
    launch(
        _shrink_gradient, grid,
        dy, dh, low_rank.segments.tiles, *table_arguments(low_rank), *widths(low_rank.group), dh.stride(0),
        ROWS=TILE_ROWS, RANKS=ranks, PRECISION=precision(dy), **sized(SHRINK, dy),
    )  # fmt: skip
    return dh


def add_a_gradients(x: Tensor, dh: Tensor, low_rank: LowRank, norm: Norm | None = None) -> None:
    """See `low_rank.add_a_gradients`."""
    table, row_fields, _ = table_arguments(low_rank)
    spans = low_rank.segments.spans
    ranks = rank_block(low_rank.width)
    config = A_GRADIENT if x.shape[1] <= 8192 else A_GRADIENT_WIDE
    grid = (triton.cdiv(x.shape[1], config["COLUMNS"]), spans.shape[0], triton.cdiv(low_rank.width, ranks))
    launch(
        _add_a_gradient, grid,
        x, dh, *norm_arguments(norm), spans, table, row_fields, x.shape[1], dh.stride(0),
        NORM=norm is not None, RANKS=ranks, PRECISION=precision(x), **sized(config, x),
    )  # fmt: skip


def add_b_gradients(dy: Tensor, h: Tensor, low_rank: LowRank) -> None:
    """See `low_rank.add_b_gradients`."""
    table, row_fields, _ = table_arguments(low_rank)
    spans = low_rank.segments.spans
    ranks = rank_block(low_rank.rank)
    blocks = sum(triton.cdiv(size, B_GRADIENT["COLUMNS"]) for size in low_rank.group.outputs)
    launch(
        _add_b_gradient, (blocks, spans.shape[0], triton.cdiv(low_rank.rank, ranks)),
        dy, h, spans, table, row_fields, *widths(low_rank.group), h.stride(0),
        RANKS=ranks, PRECISION=precision(dy), **sized(B_GRADIENT, dy),
    )  # fmt: skip


def expand_gradient_(dx: Tensor, dh: Tensor, low_rank: LowRank) -> Tensor:
    """See `low_rank.expand_gradient_`."""
    grid = (low_rank.segments.tiles.shape[0], triton.cdiv(dx.shape[1], EXPAND_GRADIENT["COLUMNS"]))
    launch(
        _expand_gradient, grid,
        dx, dh, low_rank.segments.tiles, *table_arguments(low_rank), dx.shape[1], dh.stride(0),
        ROWS=TILE_ROWS, **ranks_of(low_rank.width), PRECISION=precision(dx), **EXPAND_GRADIENT,
    )  # fmt: skip
    return dx


def norm_arguments(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    """Its rstd and weight."""
    return (None, None) if norm is None else (norm.rstd, norm.weight)


def sized(config: dict[str, int], x: Tensor) -> dict[str, int]:
    """The configuration, in fp32 with smaller steps."""
    return config | WIDE_NUMBERS if x.dtype == torch.float32 else config


def table_arguments(low_rank: LowRank) -> tuple[Tensor, int, int]:
    """(the group's column of the table, numbers from one adapter's row to the next, adapters)."""
    assert low_rank.table is not None
    column = low_rank.table[:, low_rank.group.index * FIELDS :]
    return column, low_rank.table.stride(0), low_rank.table.shape[0] - 1


def widths(group: LinearGroup) -> tuple[int, int, int]:
    """(all outputs, those of the first linear, those of the second)."""
    return sum(group.outputs), group.outputs[0], group.outputs[1] if len(group.outputs) > 1 else 0


def rank_block(rank: int) -> int:
    """Ranks that a program takes at a time: a power of two that the matrix units can take, at most 64."""
    return min(64, max(16, int(triton.next_power_of_2(rank))))


def ranks_of(rank: int) -> dict[str, int | bool]:
    """RANKS and LOOP for `updated` and `expanded`."""
    ranks = rank_block(rank)
    return {"RANKS": ranks, "LOOP": rank > ranks}


def precision(x: Tensor) -> str:
    """fp32 is multiplied in fp32: TF32, Triton's default, would be 1e-3 off."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
