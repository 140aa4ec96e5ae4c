"""Served adapters as a CPU multiplies them: copies side by side, so that those of a step are one product a linear.

Adapters whose largest ranks round up to one power of two share a bucket, in which each has a slot of that rank for
every linear; so one of rank 64 does not widen those of rank 8. A bucket has as many slots as a step has had adapters of
it at once; those of a step are brought into neighbouring slots, and whoever was used longest ago makes room. What an
adapter does not have is zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lora_core.kernels.operands import EXACT_DTYPES, FusedLinearAdapter, LinearGroup
from lora_core.kernels.stacked_low_rank import StackedAdapters, batched_product
from lora_core.models.llama.adapters import KernelArgs
from lora_core.models.precision import EXACT_ROWS

SMALLEST_RANK = 16

LONG_RUN = 16
"""Tokens of one adapter from which on it has a product of its own."""

_CHECKED_RANKS = (SMALLEST_RANK, 64)
_CHECKED_ROWS = (EXACT_ROWS, 5, 8, 15, 16, 17, 33, 72, 131, 300)
_CHECKED_MATRICES = (2, 3, 8)

StacksByGroup = Sequence[Sequence[StackedAdapters]]
"""Of each group of linears, what a step multiplies."""

Run = tuple[KernelArgs | None, int]
"""An adapter and its tokens."""


class AdapterStacks:
    """Of all adapters that are served on one base."""

    def __init__(self, groups: Sequence[LinearGroup], dtype: torch.dtype) -> None:
        self._groups, self._dtype = groups, dtype
        self._buckets: dict[int, _Bucket] = {}
        self._fewest_rows = EXACT_ROWS if dtype in EXACT_DTYPES else 1
        self._exact: dict[int, bool] = {}  # by threads
        self._last: tuple[object, StacksByGroup] = None, ()

    def order(self, runs: Sequence[Run]) -> list[int]:
        """Short runs by bucket and slot, then those that are a product by themselves."""
        self._take([adapter for adapter, _ in runs if adapter is not None])

        def key(index: int) -> tuple[bool, int, int]:
            adapter, tokens = runs[index]
            return tokens >= LONG_RUN, *((-1, -1) if adapter is None else self._slot(adapter))

        return sorted(range(len(runs)), key=key)

    def of(self, runs: Sequence[Run]) -> StacksByGroup:
        """What a step of these runs, in this order, multiplies on each group; made anew where they are not those of the
        step before.
        """
        self._take([adapter for adapter, _ in runs if adapter is not None])
        starts = itertools.accumulate((length for _, length in runs), initial=0)
        pieces = [
            _Piece(*self._slot(adapter), start, length)
            for (adapter, length), start in zip(runs, starts, strict=False)
            if adapter is not None
        ]
        state = pieces, [bucket.changes for bucket in self._buckets.values()]
        if self._last[0] != state:
            products = [_Product.of(together, self._fewest_rows) for together in _side_by_side(pieces)]
            self._last = state, [self._stacks(group, products) for group in self._groups]
        return self._last[1]

    def are_exact(self) -> bool:
        """Whether an adapter's products have the same bits whatever adapters are beside it, with the threads of now.
        Measured once.
        """
        threads = torch.get_num_threads()
        if threads not in self._exact:
            self._exact[threads] = products_are_alike(self._groups, self._dtype)
        return self._exact[threads]

    def _slot(self, adapter: KernelArgs) -> tuple[int, int]:
        rank = _bucket_rank(adapter)
        return rank, self._buckets[rank].slots[adapter]

    def _take(self, adapters: Sequence[KernelArgs]) -> None:
        by_rank: dict[int, dict[KernelArgs, None]] = {}
        for adapter in adapters:
            by_rank.setdefault(_bucket_rank(adapter), {})[adapter] = None
        for rank, of_rank in by_rank.items():
            if rank not in self._buckets:
                self._buckets[rank] = _Bucket(self._groups, rank, self._dtype)
            self._buckets[rank].take(list(of_rank))

    def _stacks(self, group: LinearGroup, products: Sequence[_Product]) -> list[StackedAdapters]:
        return [
            StackedAdapters(
                product.rows, *self._buckets[product.rank].stacked(group, product.slots), product.most, product.places
            )
            for product in products
            if self._buckets[product.rank].has(product.slots, group.index)
        ]


class _Piece(NamedTuple):
    """A run, and the bucket and slot of its adapter."""

    rank: int
    slot: int
    start: int
    tokens: int

    def is_beside(self, before: _Piece) -> bool:
        """Whether both are of one product."""
        follows = self.start == before.start + before.tokens and self.slot - before.slot in (0, 1)
        return follows and self.rank == before.rank and max(self.tokens, before.tokens) < LONG_RUN


class _Product(NamedTuple):
    """Neighbouring slots of a bucket and the rows that are theirs, as `StackedAdapters` has them.

    The rows of a single adapter are cut into two matrices: MKL splits a product between threads where it is the only
    one, and its rows depend on how.
    """

    rank: int
    slots: slice
    rows: slice
    most: int
    places: Tensor | None

    @staticmethod
    def of(pieces: Sequence[_Piece], fewest_rows: int) -> _Product:
        """Of pieces side by side, with so many rows of each matrix at least."""
        first, last = pieces[0], pieces[-1]
        counts = [0] * (last.slot - first.slot + 1)
        for piece in pieces:
            counts[piece.slot - first.slot] += piece.tokens
        if len(counts) == 1:
            counts = [-(-counts[0] // 2), counts[0] // 2]
        most, places = max(fewest_rows, *counts), None
        if len(set(counts)) > 1:
            places = torch.tensor([most * index + row for index, count in enumerate(counts) for row in range(count)])
        slots, rows = slice(first.slot, last.slot + 1), slice(first.start, last.start + last.tokens)
        return _Product(first.rank, slots, rows, most, places)


class _Bucket:
    """Adapters of up to one rank: of each group a `[slots, in, linears * rank]`, of each of its linears b `[slots,
    rank, out]`. `changes` counts how often what lies in a slot became another's.
    """

    def __init__(self, groups: Sequence[LinearGroup], rank: int, dtype: torch.dtype) -> None:
        self.slots: WeakKeyDictionary[KernelArgs, int] = WeakKeyDictionary()
        self.changes = 0
        self._groups, self._rank = groups, rank
        self._used_at: list[int] = []
        self._present: list[list[bool]] = []  # by slot and group
        self._clock = itertools.count()
        self._a = [torch.empty(0, group.inputs, rank * len(group.outputs), dtype=dtype) for group in groups]
        self._b = [[torch.empty(0, rank, out, dtype=dtype) for out in group.outputs] for group in groups]

    @property
    def capacity(self) -> int:
        return len(self._used_at)

    def has(self, slots: slice, group: int) -> bool:
        """Whether one of these adapts it."""
        return any(present[group] for present in self._present[slots])

    def stacked(self, group: LinearGroup, slots: slice) -> tuple[Tensor, list[tuple[slice, Tensor]]]:
        """A of these slots; of each linear its columns, and B. That of a single slot is there twice."""
        matrices = max(2, slots.stop - slots.start)
        linears = zip(group.columns, self._b[group.index], strict=True)
        a = self._a[group.index][slots].expand(matrices, -1, -1)
        return a, [(columns, b[slots].expand(matrices, -1, -1)) for columns, b in linears]

    def take(self, adapters: Sequence[KernelArgs]) -> None:
        """Give them neighbouring slots; who has one there keeps it, and who is not among them makes room."""
        slots = {self.slots.get(adapter, -1) for adapter in adapters}
        if min(slots) < 0 or max(slots) - min(slots) >= len(adapters):
            self._bring_together(adapters)
        now = next(self._clock)
        for adapter in adapters:
            self._used_at[self.slots[adapter]] = now

    def _bring_together(self, adapters: Sequence[KernelArgs]) -> None:
        if self.capacity < len(adapters):
            self._grow(len(adapters))
        first = self._neighbourhood(adapters)
        window = range(first, first + len(adapters))
        held = {self.slots[adapter] for adapter in adapters if adapter in self.slots}
        holders = {slot: adapter for adapter, slot in self.slots.items()}
        vacant = [slot for slot in window if slot not in held]
        for adapter in adapters:
            if (slot := self.slots.get(adapter)) not in window:
                self._move_in(adapter, slot, vacant.pop(), holders)

    def _neighbourhood(self, adapters: Sequence[KernelArgs]) -> int:
        """The first of as many slots as there are adapters: where most of them are already, and others the oldest."""
        held = {self.slots[adapter] for adapter in adapters if adapter in self.slots}

        def worth(first: int) -> tuple[int, int]:
            window = range(first, first + len(adapters))
            others = [self._used_at[slot] for slot in window if slot not in held]
            return len(held.intersection(window)), -max(others, default=-1)

        return max(range(self.capacity - len(adapters) + 1), key=worth)

    def _move_in(self, adapter: KernelArgs, slot: int | None, target: int, holders: dict[int, KernelArgs]) -> None:
        """Copy an adapter into the slot `target`, or, if it is in another one, change places."""
        self.changes += 1
        holder = holders.get(target)
        if slot is None:
            if holder is not None:
                del self.slots[holder]
            self._copy(adapter, target)
        else:
            self._swap(slot, target)
            if holder is not None:
                self.slots[holder] = slot
        self.slots[adapter] = target

    def _swap(self, slot: int, other: int) -> None:
        for tensor in (*self._a, *itertools.chain.from_iterable(self._b)):
            tensor[[slot, other]] = tensor[[other, slot]]
        self._used_at[slot], self._used_at[other] = self._used_at[other], self._used_at[slot]
        self._present[slot], self._present[other] = self._present[other], self._present[slot]

    def _grow(self, slots: int) -> None:
        more = slots - self.capacity
        self.changes += 1

        def grown(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])])

        self._a = [grown(tensor) for tensor in self._a]
        self._b = [[grown(tensor) for tensor in of_group] for of_group in self._b]
        self._used_at += [-1] * more
        self._present += [[False] * len(self._groups) for _ in range(more)]

    def _copy(self, adapter: KernelArgs, slot: int) -> None:
        for group, fused in zip(self._groups, adapter.groups, strict=True):
            self._present[slot][group.index] = fused is not None
            a, b = self._a[group.index][slot].zero_(), [b[slot].zero_() for b in self._b[group.index]]
            if fused is not None:
                self._copy_group(fused, a, b)

    def _copy_group(self, fused: FusedLinearAdapter, a: Tensor, b: Sequence[Tensor]) -> None:
        for index, (part, of_linear) in enumerate(zip(fused.parts, b, strict=True)):
            if part is not None:
                rank = part.b.shape[1]
                a[:, index * self._rank :][:, :rank] = fused.a[part.columns].t()
                of_linear[:rank] = part.b.t() * fused.part_scales[index]


def _bucket_rank(adapter: KernelArgs) -> int:
    """The adapter's largest rank, rounded up to a power of two."""
    return max(SMALLEST_RANK, 1 << (max(adapter.ranks) - 1).bit_length())


def _side_by_side(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Those of one product together."""
    together: list[_Piece] = []
    for piece in pieces:
        if together and not piece.is_beside(together[-1]):
            yield together
            together = []
        together.append(piece)
    if together:
        yield together


@torch.inference_mode()
def products_are_alike(groups: Sequence[LinearGroup], dtype: torch.dtype) -> bool:
    """Whether a row of an adapter's products has the same bits however many rows and matrices are beside it."""
    shrinks = {(group.inputs, rank * len(group.outputs)) for group in groups for rank in _CHECKED_RANKS}
    expands = {(rank, out) for group in groups for out in group.outputs for rank in _CHECKED_RANKS}
    return all(_product_is_alike(*shape, dtype) for shape in shrinks | expands)


def _product_is_alike(inner: int, outputs: int, dtype: torch.dtype) -> bool:
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(1, max(_CHECKED_ROWS) + 1, inner, dtype=dtype, generator=stream)
    weights = torch.randn(max(_CHECKED_MATRICES), inner, outputs, dtype=dtype, generator=stream)
    alone = torch.cat([batched_product(x.repeat(2, 1, 1), weight.expand(2, -1, -1))[:1] for weight in weights])
    return all(
        torch.equal(batched_product(x[:, 1 : 1 + rows].repeat(n, 1, 1), weights[:n]), alone[:n, 1 : 1 + rows])
        for n in _CHECKED_MATRICES
        for rows in _CHECKED_ROWS
    )
