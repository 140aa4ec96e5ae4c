"""Rotary positions of `layer_ops.py` in Triton: a program for each head of a few rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.dispatch import launch
from lora_core.kernels.dora_triton import add_magnitude_gradients, dora_scale_of, dora_scaled, magnitude_sums
from lora_core.kernels.layer_ops_triton import summed
from lora_core.kernels.low_rank_triton import precision, ranks_of, table_arguments, table_of, updated, widths
from lora_core.kernels.operands import TILE_ROWS, LowRank, Rope

ROPE = {"num_warps": 4}  # the fastest of a sweep, as in `layer_ops_triton.py`: forward 101 us (67)


@triton.jit
def _head_rstd(first, second, eps, HALF: tl.constexpr):
    """Reciprocal root mean squares `[rows]` of a head that comes in halves."""
    return tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF) + eps)


@triton.jit(do_not_specialize=["adapters"])
def _rope_forward(
    y, h, bias, cos, sin, tiles, table, row_fields, adapters, N, N0, N1, h_stride, rotated_heads,
    weight, eps, unnormed,
    BIAS: tl.constexpr, UPDATE: tl.constexpr, DORA: tl.constexpr, NORM: tl.constexpr, SAVE: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, LOOP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    t = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    t_mask = tl.arange(0, ROWS) < tl.load(tile + 2)
    row = table_of(table, tl.load(tile), row_fields, adapters)
    dtype: tl.constexpr = y.dtype.element_ty
    head = tl.program_id(1)
    column = head * 2 * HALF
    linear = tl.where(column < N0, 0, tl.where(column < N0 + N1, 1, 2))
    local = column - tl.where(linear == 0, 0, tl.where(linear == 1, N0, N0 + N1))
    size = tl.where(linear == 0, N0, tl.where(linear == 1, N1, N - N0 - N1))
    d = tl.arange(0, BLOCK)
    d_mask = d < HALF
    mask = t_mask[:, None] & d_mask[None, :]
    pointers = y + t[:, None] * N + (column + d)[None, :]
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    if UPDATE:
        first = updated(first, h, h_stride, t, t_mask, row, linear, size, local + d, d_mask, RANKS, LOOP, PRECISION)
        second = updated(
            second, h, h_stride, t, t_mask, row, linear, size, local + HALF + d, d_mask, RANKS, LOOP, PRECISION
        )
    if DORA:
        scale, number = dora_scale_of(row, linear)
        first = dora_scaled(first, scale, number, local + d, d_mask)
        second = dora_scaled(second, scale, number, local + HALF + d, d_mask)
    if BIAS:
        first += tl.load(bias + column + d, mask=d_mask, other=0.0).to(tl.float32)[None, :]
        second += tl.load(bias + column + HALF + d, mask=d_mask, other=0.0).to(tl.float32)[None, :]
    if head < rotated_heads:
        if NORM:
            first, second = first.to(dtype), second.to(dtype)
            if SAVE:
                saved = unnormed + t[:, None] * (rotated_heads * 2 * HALF) + (column + d)[None, :]
                tl.store(saved, first, mask=mask)
                tl.store(saved + HALF, second, mask=mask)
            first, second = first.to(tl.float32), second.to(tl.float32)
            rstd = _head_rstd(first, second, eps, HALF)
            w = weight + column + d
            first = (first * rstd[:, None]).to(dtype).to(tl.float32)
            first *= tl.load(w, mask=d_mask, other=0.0).to(tl.float32)[None, :]
            second = (second * rstd[:, None]).to(dtype).to(tl.float32)
            second *= tl.load(w + HALF, mask=d_mask, other=0.0).to(tl.float32)[None, :]
            first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        angle = t[:, None] * HALF + d[None, :]
        c = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
        rotated = first * c - second * s
        second = second * c + first * s
        first = rotated
    tl.store(pointers, first.to(dtype), mask=mask)
    tl.store(pointers + HALF, second.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["adapters", "T"])
def _rope_backward(
    dq, dk, dv, y, bias, dy, products, sums, cos, sin, tiles, table, row_fields, adapters, N, N0, N1, T,
    q_heads, k_heads, weight, eps, unnormed,
    BIAS: tl.constexpr, DORA: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    t = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    t_mask = tl.arange(0, ROWS) < tl.load(tile + 2)
    head = tl.program_id(1)
    d = tl.arange(0, BLOCK)
    d_mask = d < HALF
    mask = t_mask[:, None] & d_mask[None, :]
    if head < q_heads:
        source = dq + (t * q_heads + head)[:, None] * (2 * HALF) + d[None, :]
    elif head < q_heads + k_heads:
        source = dk + (t * k_heads + head - q_heads)[:, None] * (2 * HALF) + d[None, :]
    else:
        source = dv + (t * k_heads + head - q_heads - k_heads)[:, None] * (2 * HALF) + d[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    offsets = t[:, None] * N + (head * 2 * HALF + d)[None, :]
    output = y + offsets
    if NORM:  # noqa: SIM102 - one is decided by the compiler, the other by the program
        if head < q_heads + k_heads:
            output = unnormed + (t * (q_heads + k_heads) + head)[:, None] * (2 * HALF) + d[None, :]
    first_y = tl.load(output, mask=mask, other=0.0).to(tl.float32)
    second_y = tl.load(output + HALF, mask=mask, other=0.0).to(tl.float32)
    # Rotating both by the same angle leaves their product as it is.
    product = first * first_y + second * second_y
    if head < q_heads + k_heads:
        angle = t[:, None] * HALF + d[None, :]
        c = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
        rotated = first * c + second * s
        second = second * c - first * s
        first = rotated
        if DORA and not NORM:
            squares = c * c + s * s  # not quite 1 where cos and sin are rounded; 0 past the end
            squares = tl.where(squares == 0.0, 1.0, squares)
            rotated = (first_y * c + second_y * s) / squares
            second_y = (second_y * c - first_y * s) / squares
            first_y = rotated
        if NORM:
            rstd = _head_rstd(first_y, second_y, eps, HALF)
            w = weight + head * 2 * HALF + d
            first *= tl.load(w, mask=d_mask, other=0.0).to(tl.float32)[None, :]
            second *= tl.load(w + HALF, mask=d_mask, other=0.0).to(tl.float32)[None, :]
            total = tl.sum(first * first_y, axis=1) + tl.sum(second * second_y, axis=1)
            factor = total * rstd * rstd / (2 * HALF)
            first = rstd[:, None] * (first - first_y * factor[:, None])
            second = rstd[:, None] * (second - second_y * factor[:, None])
            product = first * first_y + second * second_y
    column = head * 2 * HALF
    if BIAS:
        first_bias = tl.load(bias + column + d, mask=d_mask, other=0.0).to(tl.float32)[None, :]
        second_bias = tl.load(bias + column + HALF + d, mask=d_mask, other=0.0).to(tl.float32)[None, :]
        product -= first * first_bias + second * second_bias
        first_y -= first_bias
        second_y -= second_bias
    tl.store(products + head * T + t, tl.sum(product, axis=1), mask=t_mask)
    if DORA:
        row = table_of(table, tl.load(tile), row_fields, adapters)
        linear = tl.where(column < N0, 0, tl.where(column < N0 + N1, 1, 2))
        local = column - tl.where(linear == 0, 0, tl.where(linear == 1, N0, N0 + N1))
        target = sums + tl.program_id(0) * N + column + d
        tl.store(target, tl.sum(first * first_y, axis=0), mask=d_mask)
        tl.store(target + HALF, tl.sum(second * second_y, axis=0), mask=d_mask)
        scale, number = dora_scale_of(row, linear)
        first = dora_scaled(first, scale, number, local + d, d_mask)
        second = dora_scaled(second, scale, number, local + HALF + d, d_mask)
    tl.store(dy + offsets, first.to(dy.dtype.element_ty), mask=mask)
    tl.store(dy + offsets + HALF, second.to(dy.dtype.element_ty), mask=mask)


def rope_forward_(
    y: Tensor, h: Tensor | None, low_rank: LowRank, rope: Rope, with_backward: bool
) -> tuple[Tensor, Tensor | None]:
    """See `layer_ops.rope_forward_`."""
    save = rope.norm is not None and with_backward
    unnormed = y.new_empty(y.shape[0], rope.rotated_heads * rope.head_size) if save else None
    half = rope.head_size // 2
    tiles = low_rank.segments.tiles
    launch(
        _rope_forward, (tiles.shape[0], y.shape[1] // rope.head_size),
        y, h, rope.bias, rope.cos, rope.sin, tiles, *table_arguments(low_rank),
        *widths(low_rank.group), 0 if h is None else h.stride(0), rope.rotated_heads,
        *_norm_arguments(rope), unnormed,
        BIAS=rope.bias is not None, UPDATE=h is not None, DORA=low_rank.dora, NORM=rope.norm is not None, SAVE=save,
        HALF=half, ROWS=TILE_ROWS, BLOCK=max(16, triton.next_power_of_2(half)), **ranks_of(low_rank.rank),
        PRECISION=precision(y), **ROPE,
    )  # fmt: skip
    return y, unnormed


def rope_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, y: Tensor, unnormed: Tensor | None, low_rank: LowRank, rope: Rope
) -> tuple[Tensor, Tensor]:
    """See `layer_ops.rope_backward`."""
    tokens, q_heads, size = dq.shape
    k_heads = dk.shape[1]
    heads = q_heads + 2 * k_heads
    dy = torch.empty_like(y)
    products = torch.empty(heads, tokens, dtype=torch.float32, device=y.device)
    tiles, sums = low_rank.segments.tiles, magnitude_sums(low_rank)
    launch(
        _rope_backward, (tiles.shape[0], heads),
        dq.contiguous(), dk.contiguous(), dv.contiguous(), y, rope.bias, dy, products, sums, rope.cos, rope.sin,
        tiles, *table_arguments(low_rank), *widths(low_rank.group), tokens, q_heads, k_heads,
        *_norm_arguments(rope), unnormed,
        BIAS=rope.bias is not None, DORA=low_rank.dora, NORM=rope.norm is not None,
        HALF=size // 2, ROWS=TILE_ROWS, BLOCK=triton.next_power_of_2(size // 2), **ROPE,
    )  # fmt: skip
    add_magnitude_gradients(sums, low_rank)
    return dy, summed(products, torch.float32)


def _norm_arguments(rope: Rope) -> tuple[Tensor | None, float]:
    return (None, 0.0) if rope.norm is None else (rope.norm.weight, rope.norm.eps)
