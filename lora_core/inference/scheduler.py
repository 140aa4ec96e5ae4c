"""Which requests run in the next step: first come, first served into free slots. No torch: deciding is not doing.

A step reads the prompts of the requests that are let in and gives every running request one token. Prompts are let in
up to a budget of tokens a step, so that those who are being answered never wait for a whole queue of prompts.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class WaitingRequest:
    """A request that has no slot yet. `group` is equal for requests of one adapter."""

    request: int
    group: int
    prompt_tokens: int


@dataclass(frozen=True)
class StepPlan:
    """(request, slot) of the prompts to read and of the requests to decode, those of one adapter side by side."""

    prefill: tuple[tuple[int, int], ...]
    decode: tuple[tuple[int, int], ...]


class RequestScheduler:
    """The waiting line and the slots. `prefill_tokens` is the budget of a step; one prompt always fits."""

    def __init__(self, *, slots: int, prefill_tokens: int) -> None:
        assert slots > 0
        self._prefill_tokens = prefill_tokens
        self._waiting: deque[WaitingRequest] = deque()
        self._running: dict[int, tuple[int, int]] = {}  # request -> (group, slot)
        self._free = list(range(slots))  # a heap: low slots first, since decoding reads up to the highest one

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def add(self, request: WaitingRequest) -> None:
        """Queue at the end of the line."""
        self._waiting.append(request)

    def remove(self, request: int) -> None:
        """Forget a request that is over or given up: it leaves the line, or its slot is free for the next step."""
        if request in self._running:
            heapq.heappush(self._free, self._running.pop(request)[1])
        else:
            self._waiting = deque(waiting for waiting in self._waiting if waiting.request != request)

    def next_step(self) -> StepPlan:
        """Let in whom slots and budget allow; all that were running before decode."""
        by_group = sorted(self._running, key=lambda request: (self._running[request][0], request))
        decode = tuple((request, self._running[request][1]) for request in by_group)
        prefill: list[tuple[int, int]] = []
        tokens = 0
        while self._waiting and self._free:
            first = self._waiting[0]
            if prefill and tokens + first.prompt_tokens > self._prefill_tokens:
                break
            tokens += first.prompt_tokens
            slot = heapq.heappop(self._free)
            self._running[first.request] = (first.group, slot)
            prefill.append((self._waiting.popleft().request, slot))
        return StepPlan(tuple(prefill), decode)
