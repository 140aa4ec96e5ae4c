"""SwiGLU of `layer_ops.py` in Triton: stripes of columns, so that h and dh are read once a stripe, and the shrinks of
what comes out are summed while it is in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels import masked_low_rank_triton
from lora_core.kernels.dispatch import launch
from lora_core.kernels.dora_triton import add_magnitude_gradients, dora_scale_of, dora_scaled, magnitude_sums
from lora_core.kernels.layer_ops_triton import partial_sums, sized, stripes_of, summed
from lora_core.kernels.low_rank_triton import (
    address,
    expanded,
    precision,
    rank_block,
    ranks_of,
    shrink,
    shrink_gradient,
    table_arguments,
    table_of,
    updated,
)
from lora_core.kernels.operands import TILE_ROWS, LowRank

# The fastest of a sweep on one H100 at 8,192 tokens of the 8B shape, r 16: 297 microseconds forward (the floor, bytes
# over 3 TB/s, is 235) and 608 backward (470). With DoRA 64 columns need more registers than there are: 1,400, not 880.
SWIGLU = {"COLUMNS": 64, "BLOCKS": 16, "STAGES": 3, "num_warps": 4}
BACKWARD_WITH_DORA = SWIGLU | {"COLUMNS": 32, "BLOCKS": 32}


@triton.jit
def _low_tile(h, h_stride, t, t_mask, row, linear, c):
    """h of one linear `[rows, ranks]`, zero past its rank, which is returned too, with its B and its column of h."""
    dtype: tl.constexpr = h.dtype.element_ty
    field = row + 4 + 4 * linear
    b = address(field, 0, dtype)
    r = tl.load(field + 2).to(tl.int32)
    offset = tl.load(field + 3).to(tl.int32)
    tile = tl.load(
        h + t[:, None] * h_stride + (offset + c)[None, :], mask=t_mask[:, None] & (c < r)[None, :], other=0.0
    )
    return tile, b, r, offset


@triton.jit
def _b_tile(low, I, n, n_mask, c):
    """B `[ranks, columns]` of what `_low_tile` gave."""
    _, b, r, _ = low
    return tl.load(b + (c[:, None] * I + n[None, :]), mask=(c < r)[:, None] & n_mask[None, :], other=0.0)


@triton.jit(do_not_specialize=["adapters", "T"])
def _swiglu_forward(
    y, h, activation, partial, tiles, table, down_table, row_fields, adapters, I, T, h_stride, partial_width,
    UPDATE: tl.constexpr, DORA: tl.constexpr, SHRINK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    RANKS: tl.constexpr, LOOP: tl.constexpr, DOWN_RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    t = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    t_mask = tl.arange(0, ROWS) < tl.load(tile + 2)
    adapter = tl.load(tile)
    row = table_of(table, adapter, row_fields, adapters)
    dtype: tl.constexpr = y.dtype.element_ty
    c = tl.arange(0, RANKS)
    if DORA:
        gate_scale, gate_number = dora_scale_of(row, 0)
        up_scale, up_number = dora_scale_of(row, 1)
    if UPDATE and not LOOP:
        gate_low = _low_tile(h, h_stride, t, t_mask, row, 0, c)
        up_low = _low_tile(h, h_stride, t, t_mask, row, 1, c)
    if SHRINK:
        down_row = table_of(down_table, adapter, row_fields, adapters)
        a = address(down_row, 0, dtype)
        width = tl.load(down_row + 2).to(tl.int32)
        k = tl.arange(0, DOWN_RANKS)
        shrunk = tl.zeros((ROWS, DOWN_RANKS), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        n = (tl.program_id(1) * BLOCKS + block) * COLUMNS + tl.arange(0, COLUMNS)
        n_mask = n < I
        mask = t_mask[:, None] & n_mask[None, :]
        pointers = y + t[:, None] * (2 * I) + n[None, :]
        gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(pointers + I, mask=mask, other=0.0).to(tl.float32)
        if UPDATE:
            if LOOP:
                gate = updated(gate, h, h_stride, t, t_mask, row, 0, I, n, n_mask, RANKS, LOOP, PRECISION)
                up = updated(up, h, h_stride, t, t_mask, row, 1, I, n, n_mask, RANKS, LOOP, PRECISION)
            else:
                gate_tile = _b_tile(gate_low, I, n, n_mask, c)
                up_tile = _b_tile(up_low, I, n, n_mask, c)
                gate = tl.dot(gate_low[0], gate_tile, gate, input_precision=PRECISION)
                up = tl.dot(up_low[0], up_tile, up, input_precision=PRECISION)
        if DORA:
            gate = dora_scaled(gate, gate_scale, gate_number, n, n_mask)
            up = dora_scaled(up, up_scale, up_number, n, n_mask)
        value = (gate * tl.sigmoid(gate) * up).to(dtype)
        tl.store(activation + t[:, None] * I + n[None, :], value, mask=mask)
        if SHRINK:
            a_tile = tl.load(a + k[None, :] * I + n[:, None], mask=(k < width)[None, :] & n_mask[:, None], other=0.0)
            shrunk = tl.dot(value, a_tile, shrunk, input_precision=PRECISION)
    if SHRINK:
        scales = tl.load(down_row + 3).to(tl.pointer_type(tl.float32))
        shrunk *= tl.load(scales + k, mask=k < width, other=0.0)[None, :]
        target = partial + (tl.program_id(1) * T + t)[:, None] * partial_width + k[None, :]
        tl.store(target, shrunk, mask=t_mask[:, None] & (k < partial_width)[None, :])


@triton.jit(do_not_specialize=["adapters", "T"])
def _swiglu_backward(
    dact, dh_down, down_table, dh_stride, y, h, partial, products, sums, tiles, table, row_fields, adapters,
    I, T, h_stride, partial_width,
    EXPAND: tl.constexpr, DOWN_RANKS: tl.constexpr, DOWN_LOOP: tl.constexpr,
    UPDATE: tl.constexpr, DORA: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    RANKS: tl.constexpr, LOOP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    t = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    t_mask = tl.arange(0, ROWS) < tl.load(tile + 2)
    adapter = tl.load(tile)
    row = table_of(table, adapter, row_fields, adapters)
    dtype: tl.constexpr = y.dtype.element_ty
    c = tl.arange(0, RANKS)
    product = tl.zeros((ROWS,), tl.float32)
    if DORA:
        gate_scale, gate_number = dora_scale_of(row, 0)
        up_scale, up_number = dora_scale_of(row, 1)
    if UPDATE and not LOOP:
        gate_low = _low_tile(h, h_stride, t, t_mask, row, 0, c)
        up_low = _low_tile(h, h_stride, t, t_mask, row, 1, c)
        gate_shrunk = tl.zeros((ROWS, RANKS), tl.float32)
        up_shrunk = tl.zeros((ROWS, RANKS), tl.float32)
    if EXPAND:
        down_row = table_of(down_table, adapter, row_fields, adapters)
        if not DOWN_LOOP:
            a = address(down_row, 0, dtype)
            width = tl.load(down_row + 2).to(tl.int32)
            k = tl.arange(0, DOWN_RANKS)
            dh_tile = tl.load(
                dh_down + t[:, None] * dh_stride + k[None, :], mask=t_mask[:, None] & (k < width)[None, :], other=0.0
            )
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        n = (tl.program_id(1) * BLOCKS + block) * COLUMNS + tl.arange(0, COLUMNS)
        n_mask = n < I
        mask = t_mask[:, None] & n_mask[None, :]
        pointers = y + t[:, None] * (2 * I) + n[None, :]
        gradient_place = dact + t[:, None] * I + n[None, :]
        gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(pointers + I, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(gradient_place, mask=mask, other=0.0).to(tl.float32)
        if UPDATE:
            if LOOP:
                gate = updated(gate, h, h_stride, t, t_mask, row, 0, I, n, n_mask, RANKS, LOOP, PRECISION)
                up = updated(up, h, h_stride, t, t_mask, row, 1, I, n, n_mask, RANKS, LOOP, PRECISION)
            else:
                gate_tile = _b_tile(gate_low, I, n, n_mask, c)
                up_tile = _b_tile(up_low, I, n, n_mask, c)
                gate = tl.dot(gate_low[0], gate_tile, gate, input_precision=PRECISION)
                up = tl.dot(up_low[0], up_tile, up, input_precision=PRECISION)
        if DORA:
            gate = dora_scaled(gate, gate_scale, gate_number, n, n_mask)
            up = dora_scaled(up, up_scale, up_number, n, n_mask)
        if EXPAND:
            if DOWN_LOOP:
                gradient = expanded(
                    gradient, dh_down, dh_stride, t, t_mask, down_row, I, n, n_mask, DOWN_RANKS, DOWN_LOOP, PRECISION
                )
            else:
                a_tile = tl.load(
                    a + k[:, None] * I + n[None, :], mask=(k < width)[:, None] & n_mask[None, :], other=0.0
                )
                gradient = tl.dot(dh_tile, a_tile, gradient, input_precision=PRECISION)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dgate = gradient * up * (sigmoid + silu * (1.0 - sigmoid))
        dup = gradient * silu
        if DORA:
            target = sums + tl.program_id(0) * (2 * I) + n
            tl.store(target, tl.sum(dgate * gate, axis=0), mask=n_mask)
            tl.store(target + I, tl.sum(dup * up, axis=0), mask=n_mask)
            dgate = dora_scaled(dgate, gate_scale, gate_number, n, n_mask)
            dup = dora_scaled(dup, up_scale, up_number, n, n_mask)
        dgate = dgate.to(dtype)
        dup = dup.to(dtype)
        tl.store(pointers, dgate, mask=mask)
        tl.store(pointers + I, dup, mask=mask)
        activation = silu * up
        tl.store(gradient_place, activation.to(dtype), mask=mask)
        product += tl.sum(gradient * activation * (2.0 + gate - silu), axis=1)  # dgate gate + dup up
        if UPDATE and not LOOP:
            gate_shrunk = tl.dot(dgate, tl.trans(gate_tile), gate_shrunk, input_precision=PRECISION)
            up_shrunk = tl.dot(dup, tl.trans(up_tile), up_shrunk, input_precision=PRECISION)
    tl.store(products + tl.program_id(1) * T + t, product, mask=t_mask)
    if UPDATE and not LOOP:
        _, _, r_gate, gate_column = gate_low
        _, _, r_up, up_column = up_low
        scales = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        gate_shrunk *= tl.load(scales + gate_column + c, mask=c < r_gate, other=0.0)[None, :]
        up_shrunk *= tl.load(scales + up_column + c, mask=c < r_up, other=0.0)[None, :]
        target = partial + (tl.program_id(1) * T + t)[:, None] * partial_width
        tl.store(target + (gate_column + c)[None, :], gate_shrunk, mask=t_mask[:, None] & (c < r_gate)[None, :])
        tl.store(target + (up_column + c)[None, :], up_shrunk, mask=t_mask[:, None] & (c < r_up)[None, :])


def swiglu_forward(y: Tensor, h: Tensor | None, low_rank: LowRank, down: LowRank) -> tuple[Tensor, Tensor | None]:
    """See `layer_ops.swiglu_forward`. The activation's own shrink is summed while it is in registers: stripe by stripe
    of its columns, so that the order of summation is the same each time.
    """
    width, tiles = y.shape[1] // 2, low_rank.segments.tiles
    activation = y.new_empty(y.shape[0], width)
    stripes = stripes_of(width, SWIGLU)
    down_ranks = rank_block(down.width)
    together = 0 < down.width <= down_ranks and down.dropout_keys is None
    partial = partial_sums(y, stripes, down) if together else None
    table, row_fields, adapters = table_arguments(low_rank)
    launch(
        _swiglu_forward, (tiles.shape[0], stripes),
        y, h, activation, partial, tiles, table, table_arguments(down)[0], row_fields, adapters,
        width, y.shape[0], 0 if h is None else h.stride(0), down.width,
        UPDATE=h is not None, DORA=low_rank.dora, SHRINK=together,
        ROWS=TILE_ROWS, **ranks_of(low_rank.rank), DOWN_RANKS=down_ranks, PRECISION=precision(y), **sized(SWIGLU, y),
    )  # fmt: skip
    if partial is not None:
        return activation, summed(partial, y.dtype)
    if down.dropout_keys is not None:
        return activation, masked_low_rank_triton.shrink(activation, down)
    return activation, shrink(activation, down) if down.width else None


def swiglu_backward_(
    dact: Tensor, dh_down: Tensor | None, down: LowRank, y: Tensor, h: Tensor | None, low_rank: LowRank
) -> tuple[Tensor | None, Tensor]:
    """See `layer_ops.swiglu_backward_`."""
    if dh_down is not None and down.dropout_keys is not None:
        masked_low_rank_triton.expand_gradient_(dact, dh_down, down)
        dh_down = None
    width, tiles = dact.shape[1], low_rank.segments.tiles
    config = BACKWARD_WITH_DORA if low_rank.dora else SWIGLU
    stripes, ranks = stripes_of(width, config), ranks_of(low_rank.rank)
    together = h is not None and not ranks["LOOP"]
    partial = partial_sums(y, stripes, low_rank) if together else None
    products = torch.empty(stripes, y.shape[0], dtype=torch.float32, device=y.device)
    sums = magnitude_sums(low_rank)
    table, row_fields, adapters = table_arguments(low_rank)
    launch(
        _swiglu_backward, (tiles.shape[0], stripes),
        dact, dh_down, table_arguments(down)[0], 0 if dh_down is None else dh_down.stride(0), y, h, partial, products,
        sums, tiles, table, row_fields, adapters, width, y.shape[0], 0 if h is None else h.stride(0), low_rank.width,
        EXPAND=dh_down is not None,
        DOWN_RANKS=rank_block(down.width), DOWN_LOOP=down.width > rank_block(down.width),
        UPDATE=h is not None, DORA=low_rank.dora, ROWS=TILE_ROWS, **ranks, PRECISION=precision(y), **sized(config, y),
    )  # fmt: skip
    add_magnitude_gradients(sums, low_rank)
    products = summed(products, torch.float32)
    if partial is not None:
        return summed(partial, y.dtype), products
    return shrink_gradient(y, low_rank) if low_rank.width else None, products
