"""Attention of a few tokens of each of many sequences over keys and values in pages (Kwon et al. 2023): a program takes
the query heads that share a key head, of a few tokens that follow each other. A long sequence is read by several
programs at once, whose parts are joined at the end (Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.decode_triton import tile_of
from lora_core.kernels.low_rank_triton import precision
from lora_core.kernels.operands import PagedLayer

ATTEND = {"BLOCK": 64, "num_warps": 4, "num_stages": 2}
LOG2_E = 1.4426950408889634


@triton.jit
def _attend(
    q, keys, values, out, part_out, part_stats, tiles, positions, slots, page_table,
    q_stride, kv_heads, most_pages, scaling,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    first_row, tokens = tile_of(tiles, TOKENS)
    if tokens > 0:
        i = tl.arange(0, ROWS)
        t = first_row + i // GROUP
        t_mask = i < tokens * GROUP
        last = tl.load(positions + t, mask=t_mask, other=-1).to(tl.int32)  # that each row sees
        n = tl.load(positions + first_row + tokens - 1).to(tl.int32) + 1
        pages = page_table + tl.load(slots + first_row) * most_pages
        d = tl.arange(0, D_BLOCK)
        d_mask = d < D
        e = tl.arange(0, BLOCK)
        q_mask = t_mask[:, None] & d_mask[None, :]
        heads = head * GROUP + i % GROUP
        q_tile = tl.load(q + t[:, None] * q_stride + heads[:, None] * D + d[None, :], mask=q_mask, other=0.0)
        of_split = tl.cdiv(tl.cdiv(n, SPLITS), BLOCK) * BLOCK
        start = tl.program_id(2) * of_split
        end = tl.minimum(n, start + of_split)
        top = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, D_BLOCK), tl.float32)
        page = tl.load(pages + (start + e) // PAGE, mask=start + e < end, other=0)
        for first in tl.range(start, end, BLOCK):
            key = first + e
            there = key < end
            offsets = ((page * kv_heads + head) * PAGE + key % PAGE)[:, None] * D + d[None, :]
            # A step ahead, so that what the pages hold can be asked for at once.
            page = tl.load(pages + (key + BLOCK) // PAGE, mask=key + BLOCK < end, other=0)
            mask = there[:, None] & d_mask[None, :]
            k_tile = tl.load(keys + offsets, mask=mask, other=0.0)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scaling
            scores = tl.where(there[None, :] & (key[None, :] <= last[:, None]), scores, -float("inf"))
            higher = tl.maximum(top, tl.max(scores, axis=1))
            base = tl.where(higher == -float("inf"), 0.0, higher)  # of a row that has seen nothing yet
            fade = tl.exp2(top - base)
            weights = tl.exp2(scores - base[:, None])
            v_tile = tl.load(values + offsets, mask=mask, other=0.0)
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision=PRECISION)
            total = total * fade + tl.sum(weights, axis=1)
            top = higher
        rows = t * (kv_heads * GROUP) + heads
        if SPLITS == 1:
            result = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # a row that is none has seen nothing
            tl.store(out + rows[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=q_mask)
        else:
            part = rows * SPLITS + tl.program_id(2)
            tl.store(part_out + part[:, None] * D + d[None, :], acc, mask=q_mask)
            tl.store(part_stats + part * 2, top, mask=t_mask)
            tl.store(part_stats + part * 2 + 1, total, mask=t_mask)


@triton.jit
def _join(part_out, part_stats, out, D: tl.constexpr, D_BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D_BLOCK)
    part = row * SPLITS + tl.arange(0, SPLITS)
    tops = tl.load(part_stats + part * 2)
    highest = tl.max(tops, axis=0)
    fade = tl.where(tops == -float("inf"), 0.0, tl.exp2(tops - tl.where(highest == -float("inf"), 0.0, highest)))
    total = tl.sum(tl.load(part_stats + part * 2 + 1) * fade, axis=0)
    parts = tl.load(part_out + part[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    joined = tl.sum(parts * fade[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * D + d, joined.to(out.dtype.element_ty), mask=d < D)


def paged_attention(
    q: Tensor,
    pages: PagedLayer,
    positions: Tensor,
    slots: Tensor,
    scaling: float,
    *,
    tiles: Tensor | None = None,
    tokens: int = 1,
    splits: int = 1,
) -> Tensor:
    """q `[T, >= heads * d]` (rows may lie apart) of the tokens at `positions` of `slots`, whose keys and values are in
    the pages -> `[T, heads * d]`. Position -1 is no token, and gets zeros. `splits` programs read one sequence.

    `tiles` int64 `[n, 2]`: (first row, rows) of at most `tokens` tokens that follow each other, or no rows, whose
    output then is undefined; None: each token is by itself (`tokens` 1).
    """
    kv_heads, page, d = pages.keys.shape[1:]
    rows, heads = len(positions), pages.heads
    out = q.new_empty(rows, heads * d)
    part_out = q.new_empty(rows, heads, splits, d, dtype=torch.float32) if splits > 1 else None
    part_stats = q.new_empty(rows, heads, splits, 2, dtype=torch.float32) if splits > 1 else None
    group, d_block = heads // kv_heads, triton.next_power_of_2(d)
    _attend[(rows if tiles is None else len(tiles), kv_heads, splits)](
        q, pages.keys, pages.values, out, part_out, part_stats, tiles, positions, slots, pages.table,
        q.stride(0), kv_heads, pages.table.shape[1], scaling * LOG2_E,
        TOKENS=tokens, GROUP=group, ROWS=max(16, triton.next_power_of_2(group * tokens)), D=d, D_BLOCK=d_block,
        PAGE=page, SPLITS=splits, PRECISION=precision(q), **ATTEND,
    )  # fmt: skip
    if splits > 1:
        _join[(rows * heads,)](part_out, part_stats, out, D=d, D_BLOCK=d_block, SPLITS=splits, num_warps=1)
    return out
