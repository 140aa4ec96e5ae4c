"""Memory for adapters against an account of its own: bounded, in order, and nothing in use is ever given up."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from functools import partial
from typing import Any

import pytest

from deploy.serving.memory_tier import MemoryTier
from deploy.serving.single_flight import SingleFlight


class Counts:
    """What is counted of a tier."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()

    def adapter_cache(self, tier: str, result: str) -> None:
        self.seen[tier, result] += 1


@pytest.mark.parametrize("seed", range(3))
def test_random_use_by_many_at_once(seed: int) -> None:
    """800 uses of 12 values of 1 to 5 bytes in 10 bytes, of which a fifth is given up while it waits or is used."""
    counts, capacity, rng = Counts(), 10, random.Random(seed)
    tier: MemoryTier[str] = MemoryTier("device", capacity, counts)  # type: ignore[arg-type]
    size = {f"v{n}": 1 + n % 5 for n in range(12)}
    in_use: Counter[str] = Counter()
    loads = SingleFlight[str]()

    async def load(digest: str) -> str:
        await tier.reserve(size[digest])
        try:
            await asyncio.sleep(0)
            if rng.random() < 0.1:
                raise OSError
        except BaseException:
            tier.give_back(size[digest])
            raise
        return tier.put(digest, digest, size[digest])

    async def use(digest: str) -> None:
        with contextlib.suppress(OSError), tier.using(digest):
            value = tier.get(digest)
            if value is None:
                value = await loads.do(digest, partial(load, digest))
            in_use[digest] += 1
            try:
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
                    assert value == digest in tier
                    assert sum(size[one] for one in tier._entries) <= tier._bytes <= capacity
            finally:
                in_use[digest] -= 1

    async def crowd() -> None:
        running: set[asyncio.Task[None]] = set()
        for _ in range(800):
            running.add(asyncio.create_task(use(rng.choice(list(size)))))
            if rng.random() < 0.2:
                rng.choice([*running, *loads._tasks.values()]).cancel()
            await asyncio.sleep(0)
            done = {task for task in running if task.done()}
            running -= done
            assert not [task for task in done if not task.cancelled() and task.exception()]
        left = await asyncio.wait_for(asyncio.gather(*running, *loads._tasks.values(), return_exceptions=True), 10)
        assert not [outcome for outcome in left if isinstance(outcome, AssertionError)]
        assert not tier._line and not tier._users
        assert tier._bytes == sum(size[digest] for digest in tier._entries) <= capacity

    asyncio.run(crowd())
    assert min(counts.seen["device", result] for result in ("hit", "miss", "eviction")) > 20


def test_the_one_used_longest_ago_makes_room() -> None:
    tier: MemoryTier[Any] = MemoryTier("host", 3, Counts())  # type: ignore[arg-type]
    for digest in "abc":
        tier.offer(digest, digest, 1)
    assert tier.get("a") == "a"
    tier.offer("d", "d", 1)
    assert [digest in tier for digest in "abcd"] == [True, False, True, True]
    tier.offer("huge", "huge", 4)
    assert "huge" not in tier and "d" in tier
