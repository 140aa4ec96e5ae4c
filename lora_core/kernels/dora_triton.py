"""`dora.py` in Triton: what the other kernels of a layer call, a kernel for gradients that lie in memory already, and
the norms that DoRA scales are made of.

Where dy and y are in registers, a program leaves the sums of dy y over its rows to `add_magnitude_gradients`, tile by
tile: so m's gradient is the same each time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.dispatch import launch
from lora_core.kernels.low_rank_triton import (
    MAGNITUDE,
    address,
    block_of,
    rank_block,
    table_arguments,
    table_of,
    widths,
)
from lora_core.kernels.operands import TILE_ROWS, FusedLinearAdapter, LowRank

DORA_BACKWARD = {"COLUMNS": 128, "num_warps": 8}
MAGNITUDE_SUMS = {"TILES": 16, "COLUMNS": 128, "num_warps": 4}
NORMS = {"ROWS": 64, "num_warps": 4}


@triton.jit
def dora_scale_of(row, linear):
    """An adapter's DoRA scales on one linear: their address, and 0 where it has none there."""
    number = tl.load(row + MAGNITUDE + 4 * linear)
    return number.to(tl.pointer_type(tl.float32)), number


@triton.jit
def dora_scaled(acc, scale, number, n, n_mask):
    """acc `[rows, columns]` times what `dora_scale_of` gave, for output columns n."""
    mask = n_mask & ((number + 0 * n) != 0)  # Triton's interpreter takes no scalar for a mask
    return acc * tl.load(scale + n, mask=mask, other=1.0)[None, :]


@triton.jit(do_not_specialize=["adapters"])
def _dora_backward(
    dy, y, dv, sums, tiles, table, row_fields, adapters, N,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    row = table_of(table, tl.load(tile), row_fields, adapters)
    scale, number = dora_scale_of(row, 0)
    t = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    t_mask = tl.arange(0, ROWS) < tl.load(tile + 2)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    n_mask = n < N
    mask = t_mask[:, None] & n_mask[None, :]
    offsets = t[:, None] * N + n[None, :]
    gradient = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    product = gradient * tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0) * N + n, tl.sum(product, axis=0), mask=n_mask)
    tl.store(dv + offsets, dora_scaled(gradient, scale, number, n, n_mask).to(dv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tile_count"])
def _add_magnitude_gradient(
    sums, tiles, tile_count, table, row_fields, N, N0, N1, TILES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    adapter = tl.program_id(1)
    linear, block, start, size = block_of(tl.program_id(0), N, N0, N1, COLUMNS)
    field = table + adapter * row_fields + MAGNITUDE + 4 * linear
    if tl.load(field) != 0:
        n = block * COLUMNS + tl.arange(0, COLUMNS)
        n_mask = n < size
        total = tl.zeros((COLUMNS,), tl.float32)
        for first in range(0, tile_count, TILES):
            i = first + tl.arange(0, TILES)
            own = tl.load(tiles + 3 * i, mask=i < tile_count, other=-1) == adapter
            pointers = sums + i[:, None] * N + (start + n)[None, :]
            total += tl.sum(tl.load(pointers, mask=own[:, None] & n_mask[None, :], other=0.0), axis=0)
        m = tl.load(tl.load(field + 1).to(tl.pointer_type(tl.float32)) + n, mask=n_mask, other=1.0)
        gradient = tl.load(field + 2).to(tl.pointer_type(tl.float32)) + n
        total = tl.load(gradient, mask=n_mask, other=0.0) + total / tl.where(m == 0.0, float("inf"), m)
        tl.store(gradient, total, mask=n_mask)


@triton.jit(do_not_specialize=["linear", "width"], do_not_specialize_on_alignment=["starts"])
def _norms(
    weight, products, grams, squares, starts, table, row_fields, linear, N, width,
    ROWS: tl.constexpr, RANKS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    adapter = tl.program_id(1)
    row = table + adapter * row_fields
    magnitude = row + MAGNITUDE + 4 * linear
    start = tl.load(starts + adapter)
    if (start >= 0) & (tl.load(magnitude) != 0):
        field = row + 4 + 4 * linear
        dtype: tl.constexpr = weight.dtype.element_ty
        b = address(field, 0, dtype)
        r = tl.load(field + 2).to(tl.int32)
        offset = tl.load(field + 3).to(tl.int32)
        scale = tl.load(tl.load(row + 3).to(tl.pointer_type(tl.float32)) + offset)
        column = start + offset
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        n_mask = n < N
        added = tl.zeros((ROWS,), tl.float32)
        for first in range(0, r if LOOP else 1, RANKS):
            c = first + tl.arange(0, RANKS)
            mask = n_mask[:, None] & (c < r)[None, :]
            pointers = products + n[:, None].to(tl.int64) * width + (column + c)[None, :]
            inner = 2.0 * tl.load(pointers, mask=mask, other=0.0)
            for second in range(0, r if LOOP else 1, RANKS):
                d = second + tl.arange(0, RANKS)
                others = tl.load(b + d[None, :] * N + n[:, None], mask=n_mask[:, None] & (d < r)[None, :], other=0.0)
                gram = tl.load(
                    grams + (column + d)[:, None].to(tl.int64) * width + (column + c)[None, :],
                    mask=(d < r)[:, None] & (c < r)[None, :],
                    other=0.0,
                )
                inner += scale * tl.dot(others.to(tl.float32), gram, input_precision="ieee")
            own = tl.load(b + c[None, :] * N + n[:, None], mask=mask, other=0.0).to(tl.float32)
            added += tl.sum(own * inner, axis=1)
        whole = tl.load(squares + n, mask=n_mask, other=1.0) + scale * added
        # A row of zeros would otherwise divide 0 by 0 until B gives it a direction.
        norm = tl.sqrt(tl.maximum(whole, 1.1754944e-38))
        m = tl.load(tl.load(magnitude + 1).to(tl.pointer_type(tl.float32)) + n, mask=n_mask, other=0.0)
        tl.store(tl.load(magnitude).to(tl.pointer_type(tl.float32)) + n, m / norm, mask=n_mask)
        tl.store(tl.load(magnitude + 3).to(tl.pointer_type(tl.float32)) + n, norm, mask=n_mask)


def dora_backward(dy: Tensor, y: Tensor, low_rank: LowRank) -> Tensor:
    """See `dora.dora_backward`; for a group of one linear."""
    dv, tiles, sums = torch.empty_like(dy), low_rank.segments.tiles, magnitude_sums(low_rank)
    launch(
        _dora_backward, (tiles.shape[0], triton.cdiv(dy.shape[1], DORA_BACKWARD["COLUMNS"])),
        dy, y, dv, sums, tiles, *table_arguments(low_rank), dy.shape[1],
        ROWS=TILE_ROWS, **DORA_BACKWARD,
    )  # fmt: skip
    add_magnitude_gradients(sums, low_rank)
    return dv


def magnitude_sums(low_rank: LowRank) -> Tensor | None:
    """Allocate the sums of dy y over the rows of each tile, fp32 `[tiles, out]`, where some adapter has DoRA."""
    if not low_rank.dora:
        return None
    tiles = low_rank.segments.tiles
    return torch.empty(len(tiles), sum(low_rank.group.outputs), dtype=torch.float32, device=tiles.device)


def add_magnitude_gradients(sums: Tensor | None, low_rank: LowRank) -> None:
    """Add m's gradients once those sums are there."""
    if sums is not None:
        table, row_fields, adapters = table_arguments(low_rank)
        blocks = sum(triton.cdiv(size, MAGNITUDE_SUMS["COLUMNS"]) for size in low_rank.group.outputs)
        tiles = low_rank.segments.tiles
        launch(
            _add_magnitude_gradient, (blocks, adapters),
            sums, tiles, len(tiles), table, row_fields, *widths(low_rank.group), **MAGNITUDE_SUMS
        )  # fmt: skip


def rows_in_stack(adapters: Sequence[FusedLinearAdapter | None], wanted: Collection[int]) -> list[int]:
    """Return where the A of each begins in `update_dora_scales`'s stack of those that have DoRA and an index in
    `wanted`; else -1.
    """
    taken = [index in wanted and one is not None and one.dora for index, one in enumerate(adapters)]
    widths = [one.width if one is not None and take else 0 for one, take in zip(adapters, taken, strict=True)]
    return [end - width if take else -1 for end, width, take in zip(accumulate(widths), widths, taken, strict=True)]


def update_dora_scales(
    weights: Sequence[Tensor], squares: Sequence[Tensor], low_rank: LowRank, wanted: Collection[int], starts: Tensor
) -> None:
    """Compute norms and DoRA scales of the adapters at the indices `wanted` on one group, whose linears have `weights`
    and these squared norms of rows. Their A lie on top of each other for it, so that W is read once; `starts` int32
    `[adapters]` is `rows_in_stack`. A and B are taken as products take them, in the base's dtype.
    """
    stacked = torch.cat([one.a for index, one in enumerate(low_rank.adapters) if index in wanted and one and one.dora])
    grams, ranks = _wide_product(stacked, stacked), rank_block(low_rank.rank)
    table, row_fields, adapters = table_arguments(low_rank)
    for linear, (weight, of_rows) in enumerate(zip(weights, squares, strict=True)):
        products = None  # the last one's go first
        products = _wide_product(weight, stacked)
        launch(
            _norms, (triton.cdiv(len(weight), NORMS["ROWS"]), adapters),
            weight, products, grams, of_rows, starts, table, row_fields, linear, len(weight), len(stacked),
            RANKS=ranks, LOOP=low_rank.rank > ranks, **NORMS,
        )  # fmt: skip


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T in fp32, of numbers that may have fewer bits."""
    if left.dtype == torch.float32:
        return left @ right.t()
    return torch.mm(left, right.t(), out_dtype=torch.float32)
