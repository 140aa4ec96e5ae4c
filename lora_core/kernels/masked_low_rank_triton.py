"""`masked_low_rank.py` in Triton. A mask is made in registers from the row's key and the linear's, bit for bit that of
`dropout_mask`; of an adapter without dropout it is all ones, so that both kinds share a launch.

Each program multiplies for one linear, since those that share x drop other features of it. The sizes are those of the
kernels without masks (`low_rank_triton.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.dispatch import launch
from lora_core.kernels.low_rank_triton import (
    A_GRADIENT,
    EXPAND_GRADIENT,
    SHRINK,
    address,
    norm_arguments,
    precision,
    rank_block,
    ranks_of,
    sized,
    table_arguments,
    table_of,
    times_rstd,
)
from lora_core.kernels.operands import TILE_ROWS, LowRank, Norm


@triton.jit
def _mix64(z):
    """splitmix64's finaliser on uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _row_bits(keys, module_key, t, t_mask):
    """What `_kept` needs of each row, uint64 `[rows]`."""
    key = tl.load(keys + t, mask=t_mask, other=0) ^ module_key
    return _mix64(key.to(tl.uint64, bitcast=True))


@triton.jit
def _kept(bits, first, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The mask of COLUMNS features from `first` on, a multiple of 4: four of them share one number."""
    block = (first // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint64)
    bits = _mix64(bits[:, None] + block[None, :] * 0x9E3779B97F4A7C15)
    shifts = (tl.arange(0, 4) * 16).to(tl.uint64)
    lanes = ((bits[:, :, None] >> shifts[None, None, :]) & 0xFFFF).to(tl.int32) ^ 0x8000  # as signed numbers are sorted
    return tl.reshape(lanes, (ROWS, COLUMNS)) >= threshold


@triton.jit
def _dropout_of(row, linear):
    """(the share that is dropped in 1/65,536, 1 / the share that is kept, the linear's key)."""
    threshold = tl.load(row + 16).to(tl.int32)
    return threshold, 65536.0 / (65536 - threshold).to(tl.float32), tl.load(row + 17 + linear)


@triton.jit(do_not_specialize=["adapters"])
def _shrink(
    x, h, keys, tiles, table, row_fields, adapters, K, h_stride,
    ROWS: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    linear = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 3
    row = table_of(table, tl.load(tile), row_fields, adapters)
    field = row + 4 + 4 * linear
    r = tl.load(field + 2).to(tl.int32)
    if tl.program_id(2) * RANKS < r:
        dtype: tl.constexpr = x.dtype.element_ty
        a = address(row, 0, dtype)
        offset = tl.load(field + 3).to(tl.int32)
        scales = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        threshold, factor, module_key = _dropout_of(row, linear)
        t = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
        t_mask = tl.arange(0, ROWS) < tl.load(tile + 2)
        c = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
        c_mask = c < r
        bits = _row_bits(keys, module_key, t, t_mask)
        acc = tl.zeros((ROWS, RANKS), tl.float32)
        for first in range(0, K, STEP):
            k = first + tl.arange(0, STEP)
            k_mask = k < K
            x_tile = tl.load(x + t[:, None] * K + k[None, :], mask=t_mask[:, None] & k_mask[None, :], other=0.0)
            a_tile = tl.load(
                a + (offset + c)[None, :] * K + k[:, None], mask=c_mask[None, :] & k_mask[:, None], other=0.0
            )
            x_tile = tl.where(_kept(bits, first, threshold, ROWS, STEP), x_tile, 0.0).to(dtype)
            acc = tl.dot(x_tile, a_tile, acc, input_precision=PRECISION)
        acc *= (tl.load(scales + offset + c, mask=c_mask, other=0.0) * factor)[None, :]
        tl.store(
            h + t[:, None] * h_stride + (offset + c)[None, :],
            acc.to(h.dtype.element_ty),
            mask=t_mask[:, None] & c_mask[None, :],
        )


@triton.jit
def _add_a_gradient(
    x, dh, rstds, weight, keys, spans, table, row_fields, K, h_stride, linears,
    NORM: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    span = spans + tl.program_id(1) * 3
    linear = tl.program_id(2) % linears
    row = table + tl.load(span) * row_fields
    field = row + 4 + 4 * linear
    r = tl.load(field + 2).to(tl.int32)
    first_rank = tl.program_id(2) // linears * RANKS
    if first_rank < r:
        dtype: tl.constexpr = x.dtype.element_ty
        offset = tl.load(field + 3).to(tl.int32)
        threshold, factor, module_key = _dropout_of(row, linear)
        c = first_rank + tl.arange(0, RANKS)
        c_mask = c < r
        k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        k_mask = k < K
        rows = tl.load(span + 2)
        acc = tl.zeros((COLUMNS, RANKS), tl.float32)
        for first in range(0, rows, STEP):
            i = first + tl.arange(0, STEP)
            t = (tl.load(span + 1) + i).to(tl.int64)
            t_mask = i < rows
            x_tile = tl.load(x + t[:, None] * K + k[None, :], mask=t_mask[:, None] & k_mask[None, :], other=0.0)
            dh_tile = tl.load(
                dh + t[:, None] * h_stride + (offset + c)[None, :], mask=t_mask[:, None] & c_mask[None, :], other=0.0
            )
            if NORM:
                dh_tile = times_rstd(dh_tile, rstds, t, t_mask)
            bits = _row_bits(keys, module_key, t, t_mask)
            kept = _kept(bits, tl.program_id(0) * COLUMNS, threshold, STEP, COLUMNS)
            x_tile = tl.where(kept, x_tile, 0.0).to(dtype)
            acc = tl.dot(tl.trans(x_tile), dh_tile, acc, input_precision=PRECISION)
        if NORM:
            acc *= tl.load(weight + k, mask=k_mask, other=0.0).to(tl.float32)[:, None]
        gradient = tl.load(row + 1).to(tl.pointer_type(tl.float32))
        pointers = gradient + (offset + c)[None, :] * K + k[:, None]
        tl.atomic_add(pointers, acc * factor, mask=c_mask[None, :] & k_mask[:, None])


@triton.jit(do_not_specialize=["adapters"])
def _expand_gradient(
    dx, dh, keys, tiles, table, row_fields, adapters, K, h_stride,
    LINEARS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, LOOP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    row = table_of(table, tl.load(tile), row_fields, adapters)
    if tl.load(row + 2) > 0:
        dtype: tl.constexpr = dh.dtype.element_ty
        a = address(row, 0, dtype)
        t = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
        t_mask = tl.arange(0, ROWS) < tl.load(tile + 2)
        k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        k_mask = k < K
        pointers = dx + t[:, None] * K + k[None, :]
        mask = t_mask[:, None] & k_mask[None, :]
        total = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        for linear in tl.static_range(LINEARS):
            field = row + 4 + 4 * linear
            r = tl.load(field + 2).to(tl.int32)
            offset = tl.load(field + 3).to(tl.int32)
            threshold, factor, module_key = _dropout_of(row, linear)
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            for first in range(0, r if LOOP else 1, RANKS):
                c = first + tl.arange(0, RANKS)
                c_mask = c < r
                dh_tile = tl.load(
                    dh + t[:, None] * h_stride + (offset + c)[None, :],
                    mask=t_mask[:, None] & c_mask[None, :],
                    other=0.0,
                )
                a_tile = tl.load(
                    a + (offset + c)[:, None] * K + k[None, :], mask=c_mask[:, None] & k_mask[None, :], other=0.0
                )
                acc = tl.dot(dh_tile, a_tile, acc, input_precision=PRECISION)
            bits = _row_bits(keys, module_key, t, t_mask)
            kept = _kept(bits, tl.program_id(1) * COLUMNS, threshold, ROWS, COLUMNS)
            total += tl.where(kept, acc * factor, 0.0)
        tl.store(pointers, total.to(dx.dtype.element_ty), mask=mask)


def shrink(x: Tensor, low_rank: LowRank) -> Tensor:
    """See `masked_low_rank.shrink`."""
    h = x.new_empty(x.shape[0], low_rank.width)
    ranks = rank_block(low_rank.rank)
    tiles = low_rank.segments.tiles
    # The linears of one tile run side by side, so that all but one find x in the cache.
    launch(
        _shrink, (len(low_rank.group.outputs), tiles.shape[0], triton.cdiv(low_rank.rank, ranks)),
        x, h, low_rank.dropout_keys, tiles, *table_arguments(low_rank), x.shape[1], h.stride(0),
        ROWS=TILE_ROWS, RANKS=ranks, PRECISION=precision(x), **sized(SHRINK, x),
    )  # fmt: skip
    return h


def add_a_gradients(x: Tensor, dh: Tensor, low_rank: LowRank, norm: Norm | None = None) -> None:
    """See `masked_low_rank.add_a_gradients`."""
    table, row_fields, _ = table_arguments(low_rank)
    spans = low_rank.segments.spans
    ranks = rank_block(low_rank.rank)
    linears = len(low_rank.group.outputs)
    blocks = triton.cdiv(x.shape[1], A_GRADIENT["COLUMNS"])
    launch(
        _add_a_gradient, (blocks, spans.shape[0], linears * triton.cdiv(low_rank.rank, ranks)),
        x, dh, *norm_arguments(norm), low_rank.dropout_keys, spans, table, row_fields, x.shape[1], dh.stride(0),
        linears, NORM=norm is not None, RANKS=ranks, PRECISION=precision(x), **sized(A_GRADIENT, x),
    )  # fmt: skip


def expand_gradient_(dx: Tensor, dh: Tensor, low_rank: LowRank) -> Tensor:
    """See `masked_low_rank.expand_gradient_`."""
    grid = (low_rank.segments.tiles.shape[0], triton.cdiv(dx.shape[1], EXPAND_GRADIENT["COLUMNS"]))
    launch(
        _expand_gradient, grid,
        dx, dh, low_rank.dropout_keys, low_rank.segments.tiles, *table_arguments(low_rank), dx.shape[1], dh.stride(0),
        LINEARS=len(low_rank.group.outputs), ROWS=TILE_ROWS, **ranks_of(low_rank.rank), PRECISION=precision(dx),
        **EXPAND_GRADIENT,
    )  # fmt: skip
    return dx
