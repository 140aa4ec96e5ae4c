"""Norms of `layer_ops.py` in Triton (`rope_triton.py` and `swiglu_triton.py` have the rest): one pass over memory each.
What a pass must read and write is its floor; the low-rank products ride along on tiles that are in registers already.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels import low_rank_triton, masked_low_rank_triton
from lora_core.kernels.dispatch import launch
from lora_core.kernels.dora_triton import dora_scale_of, dora_scaled
from lora_core.kernels.low_rank_triton import (
    address,
    expanded,
    precision,
    rank_block,
    ranks_of,
    shrink_gradient,
    table_arguments,
    table_of,
    updated,
)
from lora_core.kernels.operands import NARROW_ROWS, TILE_ROWS, LowRank

# The fastest of a sweep on one H100 at 8,192 tokens of the 8B shape, r 16 (microseconds; in brackets the floor,
# bytes over 3 TB/s): norm forward 121 (89) and backward 135 (89).
NORM_FORWARD = {"COLUMNS": 512, "STAGES": 3, "num_warps": 4}
NORM_BACKWARD = {"COLUMNS": 64, "BLOCKS": 16, "STAGES": 3, "num_warps": 4}
PRODUCTS = {"COLUMNS": 1024, "num_warps": 4}
SUM_STRIPES = {"BLOCK": 256, "num_warps": 4}
WIDE_NUMBERS = {"COLUMNS": 64, "STAGES": 1}  # fp32 takes twice the shared memory


@triton.jit(do_not_specialize=["adapters"])
def _norm_forward(
    x, y, h, total, normed, rstds, weight, tiles, table, row_fields, adapters, H, h_stride, eps,
    ADD: tl.constexpr, UPDATE: tl.constexpr, DORA: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RANKS: tl.constexpr, LOOP: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    t = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    t_mask = tl.arange(0, ROWS) < tl.load(tile + 2)
    row = table_of(table, tl.load(tile), row_fields, adapters)
    dtype: tl.constexpr = x.dtype.element_ty
    if DORA:
        scale, number = dora_scale_of(row, 0)
    squares = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(0, H, COLUMNS, num_stages=STAGES):
        n = first + tl.arange(0, COLUMNS)
        n_mask = n < H
        mask = t_mask[:, None] & n_mask[None, :]
        offsets = t[:, None] * H + n[None, :]
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            addend = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
            if UPDATE:
                addend = updated(addend, h, h_stride, t, t_mask, row, 0, H, n, n_mask, RANKS, LOOP, PRECISION)
            if DORA:
                addend = dora_scaled(addend, scale, number, n, n_mask)
                tl.store(y + offsets, addend.to(dtype), mask=mask)
            value += addend
            rounded = value.to(dtype)
            tl.store(total + offsets, rounded, mask=mask)
            value = rounded.to(tl.float32)
        squares += tl.sum(value * value, axis=1)
    rstd = tl.rsqrt(squares / H + eps)
    tl.store(rstds + t, rstd, mask=t_mask)
    if ADD:
        tl.debug_barrier()  # what other threads of this program stored is read below
    for first in tl.range(0, H, COLUMNS, num_stages=STAGES):
        n = first + tl.arange(0, COLUMNS)
        n_mask = n < H
        mask = t_mask[:, None] & n_mask[None, :]
        offsets = t[:, None] * H + n[None, :]
        if ADD:
            value = tl.load(total + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        scaled = (value * rstd[:, None]).to(dtype).to(tl.float32)
        scaled *= tl.load(weight + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        tl.store(normed + offsets, scaled.to(dtype), mask=mask)


@triton.jit
def _products(dn, x, rstds, weight, products, H, COLUMNS: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in tl.range(0, H, COLUMNS):
        mask = first + n < H
        g = tl.load(dn + t * H + first + n, mask=mask, other=0.0).to(tl.float32)
        g *= tl.load(weight + first + n, mask=mask, other=0.0).to(tl.float32)
        total += g * tl.load(x + t * H + first + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(products + t, tl.sum(total, axis=0) * tl.load(rstds + t))


@triton.jit(do_not_specialize=["adapters", "T"])
def _norm_backward(
    dn, dh, x, rstds, products, weight, residual, dx, partial, tiles, table, below_table, row_fields, adapters,
    H, T, h_stride, partial_width,
    RESIDUAL: tl.constexpr, EXPAND: tl.constexpr, SHRINK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    RANKS: tl.constexpr, LOOP: tl.constexpr, BELOW_RANKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    t = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    t_mask = tl.arange(0, ROWS) < tl.load(tile + 2)
    adapter = tl.load(tile)
    row = table_of(table, adapter, row_fields, adapters)
    dtype: tl.constexpr = dn.dtype.element_ty
    rstd = tl.load(rstds + t, mask=t_mask, other=0.0)
    factor = tl.load(products + t, mask=t_mask, other=0.0) * rstd / H
    if SHRINK:
        below_row = table_of(below_table, adapter, row_fields, adapters)
        b = address(below_row, 4, dtype)
        r = tl.load(below_row + 6).to(tl.int32)
        c = tl.arange(0, BELOW_RANKS)
        shrunk = tl.zeros((ROWS, BELOW_RANKS), tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        n = (tl.program_id(1) * BLOCKS + block) * COLUMNS + tl.arange(0, COLUMNS)
        n_mask = n < H
        mask = t_mask[:, None] & n_mask[None, :]
        offsets = t[:, None] * H + n[None, :]
        g = tl.load(dn + offsets, mask=mask, other=0.0).to(tl.float32)
        if EXPAND:
            g = expanded(g, dh, h_stride, t, t_mask, row, H, n, n_mask, RANKS, LOOP, PRECISION)
        g *= tl.load(weight + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        out = rstd[:, None] * (g - value * factor[:, None])
        if RESIDUAL:
            out += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = out.to(dtype)
        tl.store(dx + offsets, rounded, mask=mask)
        if SHRINK:
            b_tile = tl.load(b + c[None, :] * H + n[:, None], mask=(c < r)[None, :] & n_mask[:, None], other=0.0)
            shrunk = tl.dot(rounded, b_tile, shrunk, input_precision=PRECISION)
    if SHRINK:
        scales = tl.load(below_row + 3).to(tl.pointer_type(tl.float32))
        shrunk *= tl.load(scales + c, mask=c < r, other=0.0)[None, :]
        target = partial + (tl.program_id(1) * T + t)[:, None] * partial_width + c[None, :]
        tl.store(target, shrunk, mask=t_mask[:, None] & (c < partial_width)[None, :])


@triton.jit(do_not_specialize=["count"])
def _sum_stripes(partial, total, count, STRIPES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    acc = tl.load(partial + i, mask=mask, other=0.0)
    for stripe in tl.static_range(1, STRIPES):
        acc += tl.load(partial + stripe * count + i, mask=mask, other=0.0)
    tl.store(total + i, acc.to(total.dtype.element_ty), mask=mask)


def norm_forward(
    x: Tensor, y: Tensor | None, h: Tensor | None, low_rank: LowRank, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `layer_ops.norm_forward`; y's memory becomes the sum, unless it is what is added."""
    normed = torch.empty_like(x)
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    dora = y is not None and low_rank.dora
    total = x if y is None else torch.empty_like(y) if dora else y
    launch(
        _norm_forward, (low_rank.segments.narrow_tiles.shape[0],),
        x, y, h, total, normed, rstd, weight, low_rank.segments.narrow_tiles, *table_arguments(low_rank),
        x.shape[1], 0 if h is None else h.stride(0), eps,
        ADD=y is not None, UPDATE=h is not None, DORA=dora,
        ROWS=NARROW_ROWS, **ranks_of(low_rank.rank), PRECISION=precision(x), **sized(NORM_FORWARD, x),
    )  # fmt: skip
    return total, normed, rstd


def norm_backward(
    dn: Tensor,
    dh: Tensor | None,
    low_rank: LowRank,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    products: Tensor | None,
    below: LowRank,
) -> tuple[Tensor, Tensor | None]:
    """See `layer_ops.norm_backward`. With `products` known, no row has to be seen whole before its first number is
    written; and the shrink of what is written is summed stripe by stripe, as SwiGLU's is.
    """
    if dh is not None and (products is None or low_rank.dropout_keys is not None):
        kernels = low_rank_triton if low_rank.dropout_keys is None else masked_low_rank_triton
        kernels.expand_gradient_(dn, dh, low_rank)
        dh = None
    rows, width = x.shape
    if products is None:
        products = torch.empty_like(rstd)
        launch(_products, (rows,), dn, x, rstd, weight, products, width, **PRODUCTS)
    dx, tiles = torch.empty_like(x), low_rank.segments.tiles
    stripes = stripes_of(width, NORM_BACKWARD)
    below_ranks = rank_block(below.width)
    together = 0 < below.width <= below_ranks and not below.dora
    partial = partial_sums(x, stripes, below) if together else None
    table, row_fields, adapters = table_arguments(low_rank)
    launch(
        _norm_backward, (tiles.shape[0], stripes),
        dn, dh, x, rstd, products, weight, residual, dx, partial, tiles, table, table_arguments(below)[0], row_fields,
        adapters, width, rows, 0 if dh is None else dh.stride(0), below.width,
        RESIDUAL=residual is not None, EXPAND=dh is not None, SHRINK=together, ROWS=TILE_ROWS,
        **ranks_of(low_rank.width), BELOW_RANKS=below_ranks, PRECISION=precision(x), **sized(NORM_BACKWARD, x),
    )  # fmt: skip
    if partial is not None:
        return dx, summed(partial, x.dtype)
    return dx, shrink_gradient(dx, below) if below.width and not below.dora else None


def stripes_of(width: int, config: dict[str, int]) -> int:
    """Programs side by side along a row."""
    return int(triton.cdiv(width, config["COLUMNS"] * config["BLOCKS"]))


def summed(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension, `partial_sums` or products of all stripes: torch takes two launches for it."""
    total = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    count = total.numel()
    launch(
        _sum_stripes, (triton.cdiv(count, SUM_STRIPES["BLOCK"]),),
        partial, total, count, STRIPES=len(partial), **SUM_STRIPES
    )  # fmt: skip
    return total


def partial_sums(x: Tensor, stripes: int, low_rank: LowRank) -> Tensor:
    """fp32 `[stripes, T, width]`: what each stripe adds to a shrink."""
    return torch.empty(stripes, x.shape[0], low_rank.width, dtype=torch.float32, device=x.device)


def sized(config: dict[str, int], x: Tensor) -> dict[str, int]:
    """The configuration, in fp32 with smaller blocks."""
    return config | WIDE_NUMBERS if x.dtype == torch.float32 else config
