"""Which tokens the next step computes. No torch: deciding is not doing.

Every request whose prompt has been read gets one token a step. Prompts are read in what is left of a budget of tokens:
first those that have begun, then those that wait, first come, first served into free slots. A prompt longer than that
is read in chunks over several steps, and short ones share a step, so that neither holds up those who are answered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class WaitingRequest:
    """A request that has no slot yet."""

    request: int
    prompt_tokens: int


@dataclass(frozen=True)
class Run:
    """`tokens` of one request from position `start` on; `last` says that its next token is sampled after them."""

    request: int
    slot: int
    start: int
    tokens: int
    last: bool


@dataclass
class _Running:
    slot: int
    prompt_tokens: int
    done: int


class RequestScheduler:
    """The waiting line and who runs. `prefill_tokens` is the budget of a step in which nobody decodes, `mixed_tokens`
    of one in which somebody does.

    `take` gives a request a slot, and says how many tokens of its prompt are there already, or None where all are
    taken; `release` takes a slot back.
    """

    def __init__(
        self,
        take: Callable[[int], tuple[int, int] | None],
        release: Callable[[int], None],
        *,
        prefill_tokens: int,
        mixed_tokens: int,
    ) -> None:
        assert min(prefill_tokens, mixed_tokens) > 0
        self._take, self._release = take, release
        self._prefill_tokens, self._mixed_tokens = prefill_tokens, mixed_tokens
        self._waiting: deque[WaitingRequest] = deque()
        self._running: dict[int, _Running] = {}

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def reading(self) -> int:
        """Those of which a part of the prompt has not been read."""
        return sum(one.done < one.prompt_tokens for one in self._running.values())

    def add(self, request: WaitingRequest) -> None:
        """Queue at the end of the line."""
        self._waiting.append(request)

    def remove(self, request: int) -> None:
        """Forget a request that is over or given up: it leaves the line, or its slot is free for the next step."""
        if request in self._running:
            self._release(self._running.pop(request).slot)
        else:
            self._waiting = deque(waiting for waiting in self._waiting if waiting.request != request)

    def take_back(self, request: int) -> int:
        """Have its last token computed again; returns its slot."""
        self._running[request].done -= 1
        return self._running[request].slot

    def next_step(self, without: Collection[int] = ()) -> list[Run]:
        """What is computed next; it counts as computed from now on. `without` these, whose answers are complete."""
        answered = [number for number, one in self._running.items() if one.done >= one.prompt_tokens]
        runs = {number: self._run(number, 1) for number in answered if number not in without}
        budget = self._mixed_tokens if runs else self._prefill_tokens
        reading = [number for number, one in self._running.items() if one.done < one.prompt_tokens]
        while budget > 0 and (number := reading.pop(0) if reading else self._admit()) is not None:
            runs[number] = self._run(number, budget)
            budget -= runs[number].tokens
        return list(runs.values())

    def _admit(self) -> int | None:
        if not self._waiting or (taken := self._take(self._waiting[0].request)) is None:
            return None
        first = self._waiting.popleft()
        self._running[first.request] = _Running(taken[0], first.prompt_tokens, taken[1])
        return first.request

    def _run(self, number: int, most: int) -> Run:
        one = self._running[number]
        tokens = max(1, min(most, one.prompt_tokens - one.done))
        run = Run(number, one.slot, one.done, tokens, one.done + tokens >= one.prompt_tokens)
        one.done += tokens
        return run
