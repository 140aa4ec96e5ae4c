"""The low-rank products of many adapters on a few tokens each, on CPU where nothing is trained.

    h  = x A^T        of adapters that lie side by side, one batched product
    y += h B^T        with scale * B, likewise, linear by linear

An adapter's rows become a matrix of their own, with zeros below them where another adapter has more: so no row meets
another adapter's numbers, and all that lie side by side are one call, whose cost is that of reading their weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ONE_THREAD = 1 << 20
"""Multiplications up to which one thread makes a product alone: with two each of SmolLM2's took 12 us longer (AVX2), a
layer's of one adapter 229 us instead of 94, of eight, whose largest has 885,000, 830 instead of 688.
"""


def batched_product(x: Tensor, weights: Tensor) -> Tensor:
    """x `[n, rows, in]`, weights `[n, in, out]` -> `[n, rows, out]`."""
    threads = torch.get_num_threads()
    if threads == 1 or x.numel() * weights.shape[2] > ONE_THREAD:
        return torch.bmm(x, weights)
    torch.set_num_threads(1)
    try:
        return torch.bmm(x, weights)
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class StackedAdapters:
    """Adapters on one group and the rows of a batch that are theirs, as matrices of `most` rows, none of which is of
    two adapters: a `[matrices, in, width]`; for each linear its columns of y and b `[matrices, rank, out]` with scales
    in it. `places` int64 `[rows]` says where each row lies in the matrices end to end; None: at their beginnings, as
    many in each.
    """

    rows: slice
    a: Tensor
    linears: Sequence[tuple[slice, Tensor]]
    most: int
    places: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of h."""
        return self.a.shape[0], self.most, self.a.shape[2]

    def matrices(self, x: Tensor) -> Tensor:
        """x `[T, in]` -> `[matrices, most, in]`."""
        own, (matrices, most, _) = x[self.rows], self.shape
        if len(own) == matrices * most:
            return own.view(matrices, most, -1)
        padded = x.new_zeros(matrices, most, x.shape[1])
        if self.places is None:
            padded.narrow(1, 0, len(own) // matrices).copy_(own.view(matrices, -1, x.shape[1]))
        else:
            padded.flatten(0, 1).index_copy_(0, self.places, own)
        return padded

    def add_to(self, y: Tensor, columns: slice, added: Tensor) -> None:
        """Add `[matrices, most, out]` to these columns of y `[T, columns]`, where its rows belong."""
        own = y[self.rows, columns]
        if self.places is None:
            each = own.unflatten(0, (len(added), -1))
            each.add_(added[:, : each.shape[1]])
        else:
            own.add_(added.flatten(0, 1).index_select(0, self.places))


def shrink(x: Tensor, stacks: Sequence[StackedAdapters]) -> Tensor:
    """x `[T, in]` -> what `expand_` takes of each stack, end to end."""
    return torch.cat([batched_product(stack.matrices(x), stack.a).flatten() for stack in stacks])


def expand_(y: Tensor, h: Tensor, stacks: Sequence[StackedAdapters]) -> Tensor:
    """`y += h B^T`, in place: y `[T, out]`."""
    start = 0
    for stack in stacks:
        own = h[start : start + math.prod(stack.shape)].view(stack.shape)
        start += own.numel()
        for (columns, b), of_linear in zip(stack.linears, own.chunk(len(stack.linears), dim=2), strict=True):
            stack.add_to(y, columns, batched_product(of_linear, b))
    return y
