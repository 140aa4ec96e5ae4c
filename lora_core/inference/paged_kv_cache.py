"""Which pages of a GPU's memory hold whose keys and values.

A sequence gets the pages of all that it may come to when it gets its slot, its prompt and its longest answer, so one
that runs always ends. Pages that are full are known by their tokens, those before them and their adapter's digest: a
prompt that begins alike reads them where they are. When nobody does any more they stay until their memory is wanted,
those that were left longest ago first.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_core.inference.scheduler import Run
from lora_core.models.attention import Attend
from lora_core.models.paged_kv import PAGE_TOKENS, PagedAttention, PagedKV, Stretch

_Key = tuple[object, tuple[int, ...]]
"""What a full page is known by: whose it is and all that comes before, and its tokens."""


@dataclass
class _Sequence:
    pages: list[int]
    before: object  # what the next page's key begins with; None: it is shared with nobody
    tokens: list[int] = field(default_factory=list)  # that are known
    computed: int = 0
    known: int = 0  # pages from the beginning on that have been offered to others


class PagedKVCache:
    """The slots and pages of `kv`."""

    def __init__(self, kv: PagedKV) -> None:
        self._kv = kv
        self._free = list(reversed(range(len(kv.keys[0]))))  # so that those of one sequence lie side by side
        self._slots = list(range(len(kv.table)))
        self._sequences: dict[int, _Sequence] = {}
        self._users = [0] * len(self._free)
        self._pages: dict[_Key, int] = {}
        self._keys: dict[int, tuple[_Key, int]] = {}  # of a page, with a number that no other page ever has
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._numbers = itertools.count()

    @property
    def slots(self) -> int:
        """See `KVCache`."""
        return len(self._kv.table)

    @property
    def free_pages(self) -> int:
        """Those that a new sequence can have."""
        return len(self._free) + len(self._idle)

    def take(
        self, prompt: Sequence[int], owner: str | None, most_tokens: int, *, share: bool = True
    ) -> tuple[int, int] | None:
        """See `KVCache`: there is room where a slot is free, and pages for all of these tokens."""
        shared, before = self._known(prompt, owner) if share else ([], owner)
        needed = -(-most_tokens // PAGE_TOKENS) - len(shared)
        idle = sum(self._users[page] == 0 for page in shared)
        if not self._slots or needed > self.free_pages - idle:
            return None
        for page in shared:
            self._idle.pop(page, None)
        pages = [*shared, *(self._new() for _ in range(needed))]
        for page in pages:
            self._users[page] += 1
        slot = self._slots.pop()
        tokens = len(shared) * PAGE_TOKENS
        self._sequences[slot] = _Sequence(pages, before, list(prompt[:tokens]), tokens, len(shared))
        self._kv.assign(slot, pages)
        return slot, tokens

    def release(self, slot: int) -> None:
        """The sequence in this slot is over; the pages that it has filled may serve another."""
        for page in reversed(self._sequences.pop(slot).pages):  # so that a beginning outlives what follows it
            self._users[page] -= 1
            if self._users[page] == 0 and page in self._keys:
                self._idle[page] = None
            elif self._users[page] == 0:
                self._free.append(page)
        self._slots.append(slot)

    def step(self, runs: Sequence[Run], ids: Sequence[Sequence[int]]) -> Attend:
        """See `KVCache`."""
        for run, tokens in zip(runs, ids, strict=True):
            sequence = self._sequences[run.slot]
            assert run.start == sequence.computed
            sequence.computed += run.tokens
            sequence.tokens.extend(tokens)
            assert len(sequence.tokens) <= sequence.computed <= len(sequence.pages) * PAGE_TOKENS
            self._offer(sequence)
        return PagedAttention(self._kv, [Stretch(run.slot, run.start, run.tokens) for run in runs])

    def take_back(self, slot: int) -> None:
        """See `KVCache`."""
        self._sequences[slot].computed -= 1

    def _known(self, prompt: Sequence[int], owner: str | None) -> tuple[list[int], object]:
        """Pages that hold how the prompt begins, and what the key of the next one begins with."""
        pages: list[int] = []
        before: object = owner
        if owner is not None:
            for start in range(0, (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS, PAGE_TOKENS):
                page = self._pages.get((before, tuple(prompt[start : start + PAGE_TOKENS])))
                if page is None:
                    break
                pages.append(page)
                before = self._keys[page][1]
        return pages, before

    def _offer(self, sequence: _Sequence) -> None:
        """Make the pages that are full by now known."""
        while sequence.before is not None and (sequence.known + 1) * PAGE_TOKENS <= len(sequence.tokens):
            start, page = sequence.known * PAGE_TOKENS, sequence.pages[sequence.known]
            key = sequence.before, tuple(sequence.tokens[start : start + PAGE_TOKENS])
            if key not in self._pages:
                self._pages[key], self._keys[page] = page, (key, next(self._numbers))
            sequence.before = self._keys[self._pages[key]][1]
            sequence.known += 1

    def _new(self) -> int:
        if self._free:
            return self._free.pop()
        page, _ = self._idle.popitem(last=False)
        key, _ = self._keys.pop(page)
        del self._pages[key]
        return page
