"""Rotary positions of a serving step, whose keys and values go into their pages: a program for each head of a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.decode_triton import (
    Normed,
    StepAdapters,
    h_arguments,
    is_scaled,
    parts_of,
    scaled_product,
    table_row_of,
    updated_tile,
)
from lora_core.kernels.dora_triton import dora_scale_of, dora_scaled
from lora_core.kernels.low_rank_triton import widths
from lora_core.kernels.operands import PagedLayer, Rope, UnscaledProduct

ROPE = {"num_warps": 1}


@triton.jit
def _rope_to_pages(
    y, row_scales, column_scales, squares, H, norm_eps, h, bias, cos, sin, weight, eps,
    positions, slots, page_table, keys, values, tables, offset, N, N0, N1, h_part, h_stride,
    q_heads, k_heads, most_pages,
    BIAS: tl.constexpr, SCALED: tl.constexpr, UPDATE: tl.constexpr, DORA: tl.constexpr, NORM: tl.constexpr,
    PARTS: tl.constexpr, SUMS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr,
    RANKS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + t)
    dtype: tl.constexpr = y.dtype.element_ty
    column = head * 2 * HALF
    d = tl.arange(0, BLOCK)
    d_mask = d < HALF
    pointers = (y + t * N + column + d)[None, :]
    mask = d_mask[None, :]
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        row_scale = tl.load(row_scales + t)
        first = scaled_product(first, row_scale, column_scales + column + d, d_mask)
        second = scaled_product(second, row_scale, column_scales + column + HALF + d, d_mask)
    if UPDATE:
        row = table_row_of(tables, t, offset)
        linear = tl.where(column < N0, 0, tl.where(column < N0 + N1, 1, 2))
        local = column - tl.where(linear == 0, 0, tl.where(linear == 1, N0, N0 + N1)) + d
        size = tl.where(linear == 0, N0, tl.where(linear == 1, N1, N - N0 - N1))
        first = updated_tile(
            first, h, t, 1, h_part, h_stride, row, linear, size, local, d_mask, dtype, PARTS, 1, RANKS, LOOP, "ieee"
        )
        second = updated_tile(
            second, h, t, 1, h_part, h_stride, row, linear, size, local + HALF, d_mask,
            dtype, PARTS, 1, RANKS, LOOP, "ieee",
        )  # fmt: skip
        if DORA:
            scale, number = dora_scale_of(row, linear)
            first = dora_scaled(first, scale, number, local, d_mask)
            second = dora_scaled(second, scale, number, local + HALF, d_mask)
    missing = tl.rsqrt(tl.sum(tl.load(squares + t * SUMS + tl.arange(0, SUMS))) / H + norm_eps)
    first *= missing
    second *= missing
    if BIAS:
        first += tl.load(bias + column + d, mask=d_mask, other=0.0).to(tl.float32)[None, :]
        second += tl.load(bias + column + HALF + d, mask=d_mask, other=0.0).to(tl.float32)[None, :]
    if head < q_heads + k_heads:
        if NORM:
            first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
            rstd = tl.rsqrt((tl.sum(first * first) + tl.sum(second * second)) / (2 * HALF) + eps)
            w = weight + column + d
            first = (first * rstd).to(dtype).to(tl.float32)
            first *= tl.load(w, mask=d_mask, other=0.0).to(tl.float32)[None, :]
            second = (second * rstd).to(dtype).to(tl.float32)
            second *= tl.load(w + HALF, mask=d_mask, other=0.0).to(tl.float32)[None, :]
            first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
        angle = tl.maximum(position, 0) * HALF + d
        c = tl.load(cos + angle, mask=d_mask, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + angle, mask=d_mask, other=0.0).to(tl.float32)[None, :]
        rotated = first * c - second * s
        second = second * c + first * s
        first = rotated
    if head < q_heads:
        tl.store(pointers, first.to(dtype), mask=mask)
        tl.store(pointers + HALF, second.to(dtype), mask=mask)
    elif position >= 0:
        page = tl.load(page_table + tl.load(slots + t) * most_pages + position // PAGE)
        of_key = head < q_heads + k_heads
        kv_head = tl.where(of_key, head - q_heads, head - q_heads - k_heads)
        target = ((page * k_heads + kv_head) * PAGE + position % PAGE) * (2 * HALF) + d[None, :]
        if of_key:
            tl.store(keys + target, first.to(dtype), mask=mask)
            tl.store(keys + target + HALF, second.to(dtype), mask=mask)
        else:
            tl.store(values + target, first.to(dtype), mask=mask)
            tl.store(values + target + HALF, second.to(dtype), mask=mask)


def rope_to_pages(
    y: UnscaledProduct,
    normed: Normed,
    h: Tensor | None,
    adapters: StepAdapters,
    rope: Rope,
    positions: Tensor,
    slots: Tensor,
    pages: PagedLayer,
) -> None:
    """y `[T, q + k + v]`, the product of `normed`, plus h B^T and bias, heads normed: q rotated in place, rotated k
    and v into the pages of each row's slot at its position; rows at position -1 are none. `rope` has cos and sin of
    all positions.
    """
    half, kv_heads = rope.head_size // 2, pages.keys.shape[1]
    weight, eps = (None, 0.0) if rope.norm is None else (rope.norm.weight, rope.norm.eps)
    _rope_to_pages[(len(y.values), y.values.shape[1] // rope.head_size)](
        *y, *normed.arguments, h, rope.bias, rope.cos, rope.sin, weight, eps,
        positions, slots, pages.table, pages.keys, pages.values,
        *adapters.arguments, *widths(adapters.group), *h_arguments(h),
        rope.rotated_heads - kv_heads, kv_heads, pages.table.shape[1],
        BIAS=rope.bias is not None, SCALED=is_scaled(y), UPDATE=h is not None, DORA=adapters.dora,
        NORM=rope.norm is not None, PARTS=parts_of(h), SUMS=normed.squares.shape[1],
        HALF=half, BLOCK=triton.next_power_of_2(half), PAGE=pages.keys.shape[2], **adapters.ranks(), **ROPE,
    )  # fmt: skip
