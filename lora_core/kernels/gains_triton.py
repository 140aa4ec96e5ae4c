"""`gains.py` in Triton: what the other kernels of a layer call, a kernel for gradients that lie in memory already, and
the norms that gains are made of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.low_rank import TILE_ROWS, LowRank
from lora_core.kernels.low_rank_triton import (
    FIELDS,
    MAGNITUDE,
    address,
    precision,
    rank_block,
    table_arguments,
    table_of,
)

GAINS_BACKWARD = {"COLUMNS": 128, "num_warps": 8}
NORMS = {"ROWS": 64, "STEP": 64, "num_warps": 4, "num_stages": 3}


@triton.jit
def _with_magnitude(field, n, n_mask):
    """n_mask where the adapter has DoRA on the linear (Triton's interpreter takes no scalar for a mask)."""
    return n_mask & ((tl.load(field) + 0 * n) != 0)


@triton.jit
def gained(acc, row, linear, n, n_mask):
    """acc `[rows, columns]` times the gains of one linear, for its output columns n."""
    field = row + MAGNITUDE + 4 * linear
    gain = tl.load(field).to(tl.pointer_type(tl.float32))
    return acc * tl.load(gain + n, mask=_with_magnitude(field, n, n_mask), other=1.0)[None, :]


@triton.jit
def add_magnitude_gradient(dy, y, row, linear, n, n_mask):
    """Of fp32 tiles `[rows, columns]`, zero where there is no row, to the gradient of one linear's m."""
    field = row + MAGNITUDE + 4 * linear
    mask = _with_magnitude(field, n, n_mask)
    m = tl.load(tl.load(field + 1).to(tl.pointer_type(tl.float32)) + n, mask=mask, other=1.0)
    gradient = tl.load(field + 2).to(tl.pointer_type(tl.float32))
    tl.atomic_add(gradient + n, tl.sum(dy * y, axis=0) / tl.where(m == 0.0, float("inf"), m), mask=mask)


@triton.jit(do_not_specialize=["adapters"])
def _gains_backward(
    dy, y, dv, tiles, table, row_fields, adapters, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    row = table_of(table, tl.load(tile), row_fields, adapters)
    t = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    t_mask = tl.arange(0, ROWS) < tl.load(tile + 2)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    n_mask = n < N
    mask = t_mask[:, None] & n_mask[None, :]
    place = t[:, None] * N + n[None, :]
    gradient = tl.load(dy + place, mask=mask, other=0.0).to(tl.float32)
    add_magnitude_gradient(gradient, tl.load(y + place, mask=mask, other=0.0).to(tl.float32), row, 0, n, n_mask)
    tl.store(dv + place, gained(gradient, row, 0, n, n_mask).to(dv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["linear"])
def _norms(
    weight, table, row_fields, linear, N, K,
    ROWS: tl.constexpr, RANKS: tl.constexpr, LOOP: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = table + tl.program_id(0) * row_fields
    magnitude = row + MAGNITUDE + 4 * linear
    if tl.load(magnitude) != 0:
        dtype: tl.constexpr = weight.dtype.element_ty
        field = row + 4 + 4 * linear
        b = address(field, 0, dtype)
        r = tl.load(field + 2).to(tl.int32)
        offset = tl.load(field + 3)
        a = address(row, 0, dtype) + offset * K
        scale = tl.load(tl.load(row + 3).to(tl.pointer_type(tl.float32)) + offset)
        n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        n_mask = n < N
        squares = tl.zeros((ROWS,), tl.float32)
        for start in range(0, K, STEP):
            k = start + tl.arange(0, STEP)
            k_mask = k < K
            product = tl.zeros((ROWS, STEP), tl.float32)
            for first in range(0, r if LOOP else 1, RANKS):
                c = first + tl.arange(0, RANKS)
                b_tile = tl.load(b + c[None, :] * N + n[:, None], mask=(c < r)[None, :] & n_mask[:, None], other=0.0)
                a_tile = tl.load(a + c[:, None] * K + k[None, :], mask=(c < r)[:, None] & k_mask[None, :], other=0.0)
                product = tl.dot(b_tile, a_tile, product, input_precision=PRECISION)
            w = weight + n[:, None].to(tl.int64) * K + k[None, :]
            whole = tl.load(w, mask=n_mask[:, None] & k_mask[None, :], other=0.0).to(tl.float32) + scale * product
            squares += tl.sum(whole * whole, axis=1)
        # A row of zeros would otherwise divide 0 by 0 until B gives it a direction.
        norm = tl.sqrt(tl.maximum(squares, 1.1754944e-38))
        m = tl.load(tl.load(magnitude + 1).to(tl.pointer_type(tl.float32)) + n, mask=n_mask, other=0.0)
        tl.store(tl.load(magnitude).to(tl.pointer_type(tl.float32)) + n, m / norm, mask=n_mask)
        tl.store(tl.load(magnitude + 3).to(tl.pointer_type(tl.float32)) + n, norm, mask=n_mask)


def gains_backward(dy: Tensor, y: Tensor, low_rank: LowRank) -> Tensor:
    """See `gains.gains_backward`; for a group of one linear."""
    dv, tiles = torch.empty_like(dy), low_rank.segments.tiles
    _gains_backward[tiles.shape[0], triton.cdiv(dy.shape[1], GAINS_BACKWARD["COLUMNS"])](
        dy, y, dv, tiles, *table_arguments(low_rank), dy.shape[1], ROWS=TILE_ROWS, **GAINS_BACKWARD
    )  # fmt: skip
    return dv


def update_gains(weights: Sequence[Tensor], table: Tensor, group: int, rank: int) -> None:
    """Norms and gains of all adapters in `table` on one group, whose linears have `weights` and whose parts have at
    most `rank` ranks. Of W + s B A no more than a tile is ever made.
    """
    column, ranks = table[:, group * FIELDS :], rank_block(rank)
    for linear, weight in enumerate(weights):
        outputs, inputs = weight.shape
        _norms[table.shape[0], triton.cdiv(outputs, NORMS["ROWS"])](
            weight, column, table.stride(0), linear, outputs, inputs,
            RANKS=ranks, LOOP=rank > ranks, PRECISION=precision(weight), **NORMS,
        )  # fmt: skip
