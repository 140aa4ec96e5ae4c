"""The low-rank products that dropout changes: with masks where some adapter of a training batch drops features of its
linears' input, as `low_rank.py` makes them elsewhere.

    h  = scale / keep * (x * mask) A^T     shrink
    dA += dh^T (x * mask) / keep           add_a_gradients
    dx += mask * (dh A) / keep             expand_gradient_

mask `[T, in]` is `dropout_mask` of the row's key and the linear's: linears that share x drop other features of it. It
is computed where it is used and never stored. `keep` is the probability that a feature stays, a number: as a bf16
tensor it would be 0.16 % off. Adapters without dropout get what they get in a batch of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from lora_core.adapters.dropout import dropout_mask, keep_probability
from lora_core.kernels import dispatch
from lora_core.kernels import low_rank as plain
from lora_core.kernels.operands import FusedLinearAdapter, LinearAdapter, LowRank, Norm

MASK_ROWS = 256
"""Rows whose mask a CPU makes at a time: the numbers on the way to it take several times the memory of x."""


def shrink(x: Tensor, low_rank: LowRank) -> Tensor:
    """See `low_rank.shrink`."""
    if low_rank.dropout_keys is None:
        return plain.shrink(x, low_rank)
    if dispatch.runs_in_triton(x):
        from lora_core.kernels import masked_low_rank_triton

        return masked_low_rank_triton.shrink(x, low_rank)
    h = plain.shrink(x, _without_dropout(low_rank))
    for adapter, part, rows, keys in _dropping(low_rank):
        scales = adapter.scales[part.columns] / keep_probability(adapter.dropout)
        product = _masked(x[rows], adapter, part, keys) @ adapter.a[part.columns].t()
        h[rows, part.columns] = product * scales
    return h


def add_a_gradients(x: Tensor, dh: Tensor, low_rank: LowRank, norm: Norm | None = None) -> None:
    """See `low_rank.add_a_gradients`."""
    if low_rank.dropout_keys is None:
        plain.add_a_gradients(x, dh, low_rank, norm)
        return
    if dispatch.runs_in_triton(x):
        from lora_core.kernels import masked_low_rank_triton

        masked_low_rank_triton.add_a_gradients(x, dh, low_rank, norm)
        return
    plain.add_a_gradients(x, dh, _without_dropout(low_rank), norm)
    x = x if norm is None else norm.of(x)
    for adapter, part, rows, keys in _dropping(low_rank):
        gradient, left = adapter.a_gradient[part.columns], dh[rows, part.columns].t()
        plain.add_product(
            gradient, left, _masked(x[rows], adapter, part, keys), 1.0 / keep_probability(adapter.dropout)
        )


def expand_gradient_(dx: Tensor, dh: Tensor, low_rank: LowRank) -> Tensor:
    """See `low_rank.expand_gradient_`."""
    if low_rank.dropout_keys is None:
        return plain.expand_gradient_(dx, dh, low_rank)
    if dispatch.runs_in_triton(dx):
        from lora_core.kernels import masked_low_rank_triton

        return masked_low_rank_triton.expand_gradient_(dx, dh, low_rank)
    plain.expand_gradient_(dx, dh, _without_dropout(low_rank))
    for adapter, part, rows, keys in _dropping(low_rank):
        update = _masked(dh[rows, part.columns] @ adapter.a[part.columns], adapter, part, keys)
        dx[rows].add_(update, alpha=1.0 / keep_probability(adapter.dropout))
    return dx


def _without_dropout(low_rank: LowRank) -> LowRank:
    """Leave the adapters that drop nothing."""
    adapters = [None if adapter is None or adapter.dropout > 0 else adapter for adapter in low_rank.adapters]
    return replace(low_rank, adapters=adapters, dropout_keys=None)


def _dropping(low_rank: LowRank) -> Iterator[tuple[FusedLinearAdapter, LinearAdapter, slice, Tensor]]:
    """Yield each linear of each adapter that drops features, with its rows and their keys."""
    assert low_rank.dropout_keys is not None
    for adapter, rows in low_rank.present():
        for part in filter(None, adapter.parts):
            if adapter.dropout > 0:
                yield adapter, part, rows, low_rank.dropout_keys[rows]


def _masked(x: Tensor, adapter: FusedLinearAdapter, part: LinearAdapter, keys: Tensor) -> Tensor:
    """Return x `[rows, in]` with zeros where the linear drops it."""
    masked = torch.empty_like(x)
    parts = zip(x.split(MASK_ROWS), keys.split(MASK_ROWS), masked.split(MASK_ROWS), strict=True)
    # A run without numbers counts memory, of which no part takes more than the first; Python takes long over each.
    for few, few_keys, target in islice(parts, 1) if x.is_meta else parts:
        mask = dropout_mask(x.shape[1], adapter.dropout, few_keys, part.module_key)
        torch.mul(few, mask.view(torch.uint8), out=target)  # as bool it would take four times as long
        del mask  # before the next one's numbers
    return masked
