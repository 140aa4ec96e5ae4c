"""The low-rank products of many adapters on a few tokens each, on CPU where nothing is trained.

    h  = x A^T, masked         of adapters whose A lie on top of each other, each token for all of them
    y += h B^T                 with scale * B, likewise; what is another adapter's is zero in h

One product of many adapters takes a fraction of the time of one each, whose weights are small (S-LoRA, Sheng et al.
2024, makes them in one kernel). In fp32 and fp64 a row has the same bits whatever adapters are stacked and wherever its
own lies among them: sums take zeros before and after its own terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StackedAdapters:
    """Adapters on one group and the rows of a batch that they take: a `[k, in]`, b `[k, out]` with scales in it, and
    `others` bool `[rows, adapters, 1]`, true but where a row is that adapter's (None: all are of the only one).
    """

    rows: slice
    a: Tensor
    b: Tensor
    others: Tensor | None


def shrink(x: Tensor, stacks: Sequence[StackedAdapters]) -> Tensor:
    """x `[T, in]` -> what `expand_` takes of each stack, end to end."""
    sizes = [_rows(stack) * len(stack.a) for stack in stacks]
    joined = x.new_empty(sum(sizes))
    for stack, part in zip(stacks, joined.split(sizes), strict=True):
        h = part.view(_rows(stack), -1)
        h.addmm_(x[stack.rows], stack.a.t(), beta=0)
        if stack.others is not None:  # not by a product, as 0 x inf is NaN
            h.view(*stack.others.shape[:2], -1).masked_fill_(stack.others, 0.0)
    return joined


def expand_(y: Tensor, h: Tensor, stacks: Sequence[StackedAdapters]) -> Tensor:
    """`y += h B^T`, in place: y `[T, out]`."""
    for stack, part in zip(stacks, h.split([_rows(stack) * len(stack.a) for stack in stacks]), strict=True):
        y[stack.rows].addmm_(part.view(_rows(stack), -1), stack.b)
    return y


def _rows(stack: StackedAdapters) -> int:
    return int(stack.rows.stop - stack.rows.start)
