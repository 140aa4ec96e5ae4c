"""Served adapters as a CPU multiplies them: copies on top of each other, so that those of a step are few products.

Adapters whose largest ranks round up to one power of two share a bucket, in which each has a slot of that rank for
every linear; so one of rank 64 does not widen those of rank 8. A bucket has as many slots as a step has had adapters of
it at once, and whoever was used longest ago makes room. What an adapter does not have is zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lora_core.kernels.operands import EXACT_DTYPES, FusedLinearAdapter, LinearGroup
from lora_core.kernels.stacked_low_rank import StackedAdapters
from lora_core.models.llama.adapters import KernelArgs
from lora_core.models.precision import EXACT_ROWS

EXACT_SUM = 192
"""Terms of a sum at most in fp32 and fp64: MKL splits longer ones by how long they are."""

SMALLEST_RANK = 16

LONG_RUN = 16
"""Tokens of one adapter from which on it has a product of its own."""

_COLUMNS = (16, 48, 96, EXACT_SUM)
_CHECKED_ROWS = (EXACT_ROWS, 5, 8, 15, 16, 17, 33, 72, 131, 300)

StacksByGroup = Sequence[Sequence[StackedAdapters]]
"""Of each group of linears, what a step multiplies."""

Run = tuple[KernelArgs | None, int]
"""An adapter and its tokens."""


class AdapterStacks:
    """Of all adapters that are served on one base."""

    def __init__(self, groups: Sequence[LinearGroup], dtype: torch.dtype) -> None:
        self._groups, self._dtype = groups, dtype
        self._buckets: dict[int, _Bucket] = {}
        self._exact = dtype in EXACT_DTYPES
        self._columns: dict[int, int | None] = {}  # by threads

    def order(self, runs: Sequence[Run]) -> list[int]:
        """Short runs by bucket and slot, then those that are a product by themselves."""
        self._take([adapter for adapter, _ in runs if adapter is not None])

        def key(index: int) -> tuple[bool, int, int]:
            adapter, tokens = runs[index]
            return tokens >= LONG_RUN, *((-1, -1) if adapter is None else self._slot(adapter))

        return sorted(range(len(runs)), key=key)

    def of(self, runs: Sequence[Run], tokens: int) -> StacksByGroup:
        """What a step of these runs, in this order and `tokens` long, multiplies on each group."""
        self._take([adapter for adapter, _ in runs if adapter is not None])
        starts = itertools.accumulate((length for _, length in runs), initial=0)
        pieces = [
            _Piece(*self._slot(adapter), start, length)
            for (adapter, length), start in zip(runs, starts, strict=False)
            if adapter is not None
        ]
        return [list(self._stacks(group, pieces, tokens)) for group in self._groups]

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
            self._buckets[rank].take(list(of_rank), -(-self._columns_at_least() // rank))

    def _stacks(self, group: LinearGroup, pieces: Sequence[_Piece], tokens: int) -> Iterator[StackedAdapters]:
        def product(piece: _Piece) -> tuple[int, int, int]:
            """Pieces of one are multiplied together."""
            together = max(1, (EXACT_SUM if self._exact else 32 * EXACT_SUM) // (piece.rank * len(group.outputs)))
            long = piece.start if piece.tokens >= LONG_RUN else -1
            return piece.rank, piece.slot // together, long

        for (rank, _, _), of_product in itertools.groupby(pieces, key=product):
            bucket, members = self._buckets[rank], list(of_product)
            if not any(bucket.has(piece.slot, group.index) for piece in members):
                continue
            first, last = min(piece.slot for piece in members), max(piece.slot for piece in members)
            start, stop = members[0].start, members[-1].start + members[-1].tokens
            slots, rows = slice(first, last + 1), slice(start, stop)
            if self._exact:  # some that are others' and masked, where there are too few
                width = rank * len(group.outputs)
                together = max(1, EXACT_SUM // width)
                block = first // together * together
                fewest = -(-self._columns_at_least() // width)
                slots = _widened(slots, fewest, block, min(together, bucket.capacity - block))
                rows = _widened(rows, EXACT_ROWS, 0, tokens)
            yield StackedAdapters(rows, *bucket.stacked(group.index, slots), _others(members, slots, rows))

    def are_exact(self) -> bool:
        """Whether an adapter's products have the same bits whatever adapters are beside it, with the threads of now."""
        return self._fewest_columns() is not None

    def _columns_at_least(self) -> int:
        return (self._fewest_columns() or SMALLEST_RANK) if self._exact else 1

    def _fewest_columns(self) -> int | None:
        """Columns of h from which on that is so: MKL gives threads too few to compute them alike. Measured once."""
        threads = torch.get_num_threads()
        if threads not in self._columns:
            self._columns[threads] = _fewest_columns(self._groups, self._dtype)
        return self._columns[threads]


@dataclass(frozen=True)
class _Piece:
    rank: int
    slot: int
    start: int
    tokens: int


class _Bucket:
    """Adapters of up to one rank: of each group a `[slots, linears * rank, in]`, b `[slots, linears * rank, out]`, zero
    where a rank is another linear's.
    """

    def __init__(self, groups: Sequence[LinearGroup], rank: int, dtype: torch.dtype) -> None:
        self.slots: WeakKeyDictionary[KernelArgs, int] = WeakKeyDictionary()
        self._groups, self._rank = groups, rank
        self._used_at: list[int] = []
        self._present: list[list[bool]] = []  # by slot and group
        self._clock = itertools.count()
        self._a = [torch.empty(0, self._width(group), group.inputs, dtype=dtype) for group in groups]
        self._b = [torch.empty(0, self._width(group), sum(group.outputs), dtype=dtype) for group in groups]

    @property
    def capacity(self) -> int:
        return len(self._used_at)

    def has(self, slot: int, group: int) -> bool:
        return self._present[slot][group]

    def stacked(self, group: int, slots: slice) -> tuple[Tensor, Tensor]:
        """A and B of these slots."""
        return self._a[group][slots].flatten(0, 1), self._b[group][slots].flatten(0, 1)

    def take(self, adapters: Sequence[KernelArgs], least: int) -> None:
        """Give each of them a slot, from adapters that are not among them; there are `least` slots at least."""
        now = next(self._clock)
        while self.capacity < least:
            self._grow()
        for adapter in adapters:
            if adapter in self.slots:
                self._used_at[self.slots[adapter]] = now
        for adapter in adapters:
            if adapter not in self.slots:
                slot = self._free(now)
                self._used_at[slot] = now
                self.slots[adapter] = slot
                self._copy(adapter, slot)

    def _free(self, now: int) -> int:
        taken = set(self.slots.values())
        free = [slot for slot in range(self.capacity) if slot not in taken]
        oldest = min(range(self.capacity), key=lambda slot: self._used_at[slot], default=-1)
        if not free and (oldest < 0 or self._used_at[oldest] == now):
            return self._grow()
        if not free:
            free = [oldest]
            for adapter, slot in list(self.slots.items()):
                if slot == oldest:
                    del self.slots[adapter]
        return free[0]

    def _grow(self) -> int:
        """Twice as many slots; from a whole product's on, so many that each product is whole. The first new one."""
        slots, whole = self.capacity, max(1, EXACT_SUM // self._rank)
        wanted = max(1, 2 * slots)
        more = (wanted if wanted < whole else -(-wanted // whole) * whole) - slots
        for tensors in (self._a, self._b):
            for index, tensor in enumerate(tensors):
                tensors[index] = torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])])
        self._used_at += [-1] * more
        self._present += [[False] * len(self._groups) for _ in range(more)]
        return slots

    def _copy(self, adapter: KernelArgs, slot: int) -> None:
        for group, fused, a, b in zip(self._groups, adapter.groups, self._a, self._b, strict=True):
            self._present[slot][group.index] = fused is not None
            a[slot].zero_()
            b[slot].zero_()
            if fused is not None:
                self._copy_group(group, fused, a[slot], b[slot])

    def _copy_group(self, group: LinearGroup, fused: FusedLinearAdapter, a: Tensor, b: Tensor) -> None:
        for index, (part, columns) in enumerate(zip(fused.parts, group.columns, strict=True)):
            if part is not None:
                ranks = slice(index * self._rank, index * self._rank + part.b.shape[1])
                a[ranks] = fused.a[part.columns]
                # Finite, as every row's h meets it, which is zero where it is another's: 0 x inf is NaN.
                b[ranks, columns] = torch.nan_to_num(part.b.t() * fused.part_scales[index])

    def _width(self, group: LinearGroup) -> int:
        return self._rank * len(group.outputs)


def _bucket_rank(adapter: KernelArgs) -> int:
    """The adapter's largest rank, rounded up to a power of two."""
    return max(SMALLEST_RANK, 1 << (max(adapter.ranks) - 1).bit_length())


def _others(members: Sequence[_Piece], slots: slice, rows: slice) -> Tensor | None:
    if slots.stop - slots.start == 1 and rows.stop - rows.start == members[0].tokens:
        return None
    others = torch.ones(rows.stop - rows.start, slots.stop - slots.start, 1, dtype=torch.bool)
    for piece in members:
        first = piece.start - rows.start
        others[first : first + piece.tokens, piece.slot - slots.start] = False
    return others


def _widened(part: slice, least: int, first: int, length: int) -> slice:
    """At least so long, within `length` from `first` on."""
    start = max(first, min(part.start, first + length - least))
    return slice(start, min(first + length, max(part.stop, start + least)))


@torch.inference_mode()
def _fewest_columns(groups: Sequence[LinearGroup], dtype: torch.dtype) -> int | None:
    """Of `_COLUMNS` the first from which on both products of adapters of these groups compute alike."""
    if not all(_sums_are_alike(outputs, dtype) for outputs in {sum(group.outputs) for group in groups}):
        return None
    inputs = {group.inputs for group in groups}
    return next((fewest for fewest in _COLUMNS if all(_columns_are_alike(n, dtype, fewest) for n in inputs)), None)


def _columns_are_alike(inputs: int, dtype: torch.dtype, fewest: int) -> bool:
    """Rows and columns of `x A^T` are their own."""
    stream = torch.Generator().manual_seed(0)
    x, a = (torch.randn(n, inputs, dtype=dtype, generator=stream) for n in (max(_CHECKED_ROWS) + 1, EXACT_SUM))
    h = x @ a.t()
    widths = {fewest, min(fewest + 16, EXACT_SUM), min(fewest + 48, EXACT_SUM), EXACT_SUM}
    return all(torch.equal(x[1 : 1 + n] @ a[:k].t(), h[1 : 1 + n, :k]) for n in _CHECKED_ROWS for k in widths)


def _sums_are_alike(outputs: int, dtype: torch.dtype) -> bool:
    """`y + h B^T` takes zeros around an adapter's own terms without a trace."""
    stream, rows = torch.Generator().manual_seed(1), max(_CHECKED_ROWS) + 1
    y, own, b = (
        torch.randn(*shape, dtype=dtype, generator=stream)
        for shape in ((rows, outputs), (rows, 16), (EXACT_SUM, outputs))
    )
    expected = y.addmm(own, b[32:48])
    for terms in (48, 64, 96, EXACT_SUM):
        h = torch.zeros(rows, terms, dtype=dtype)
        h[:, 32:48] = own
        if not all(torch.equal(y[:n].addmm(h[:n], b[:terms]), expected[:n]) for n in _CHECKED_ROWS):
            return False
    return True
