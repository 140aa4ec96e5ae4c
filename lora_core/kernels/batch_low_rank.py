"""The low-rank products that dropout changes: `masked_low_rank.py` where some adapter of a batch drops features of its
input, `low_rank.py` elsewhere.
"""

from __future__ import annotations

from torch import Tensor

from lora_core.kernels import low_rank as plain
from lora_core.kernels import masked_low_rank as masked
from lora_core.kernels.operands import LowRank, Norm


def shrink(x: Tensor, low_rank: LowRank) -> Tensor:
    """See `low_rank.shrink`."""
    return plain.shrink(x, low_rank) if low_rank.dropout_keys is None else masked.shrink(x, low_rank)


def add_a_gradients(x: Tensor, dh: Tensor, low_rank: LowRank, norm: Norm | None = None) -> None:
    """See `low_rank.add_a_gradients`."""
    add = plain.add_a_gradients if low_rank.dropout_keys is None else masked.add_a_gradients
    add(x, dh, low_rank, norm)


def expand_gradient_(dx: Tensor, dh: Tensor, low_rank: LowRank) -> Tensor:
    """See `low_rank.expand_gradient_`."""
    expand = plain.expand_gradient_ if low_rank.dropout_keys is None else masked.expand_gradient_
    return expand(dx, dh, low_rank)
