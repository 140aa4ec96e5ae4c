"""Memory for adapters, bounded in bytes: the one used longest ago makes room, one in use never does.

with tier.using(digest):                     from here on it stays, once it is there
    value = tier.get(digest)
    if value is None:
        await tier.reserve(nbytes)           waits until others are used no longer, where these take all of it
        tier.put(digest, value, nbytes)
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from deploy.serving.metrics import ServingMetrics

log = logging.getLogger("ray.serve.lora")

T = TypeVar("T")


class MemoryTier(Generic[T]):
    """One kind of memory, called `name` in metrics. It lives on one event loop."""

    def __init__(self, name: str, capacity: int, metrics: ServingMetrics) -> None:
        self._name, self.capacity, self._metrics = name, capacity, metrics
        self._entries: OrderedDict[str, tuple[T, int]] = OrderedDict()  # value and bytes, used longest ago first
        self._bytes = 0  # of entries, and of what is reserved
        self._users: Counter[str] = Counter()
        self._line: deque[tuple[int, asyncio.Future[None]]] = deque()

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Of what is there, or has a place reserved."""
        return self._bytes

    def get(self, digest: str) -> T | None:
        """Return what is there, which is now the one used last."""
        entry = self._entries.get(digest)
        self._metrics.adapter_cache(self._name, "miss" if entry is None else "hit")
        if entry is None:
            return None
        self._entries.move_to_end(digest)
        return entry[0]

    @contextmanager
    def using(self, digest: str) -> Iterator[None]:
        """Keep it, whether it is there already or comes meanwhile, until the block ends."""
        self._users[digest] += 1
        try:
            yield
        finally:
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest]
            self._admit()

    async def reserve(self, nbytes: int) -> None:
        """Return once there is room for so much, first come, first served; what is larger than all of it gets it alone.

        Afterwards comes `put`, or `give_back`.
        """
        admitted = asyncio.get_running_loop().create_future()
        self._line.append((nbytes, admitted))
        self._admit()
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.done() and not admitted.cancelled():
                self.give_back(nbytes)
            raise

    def put(self, digest: str, value: T, nbytes: int) -> T:
        """Keep what room was reserved for; returns it, or the same that somebody else has put there before."""
        if digest in self._entries:
            self._bytes -= nbytes
        else:
            self._entries[digest] = (value, nbytes)
        kept = self._entries[digest][0]
        self._admit()
        return kept

    def give_back(self, nbytes: int) -> None:
        """Let go of a reservation."""
        self._bytes -= nbytes
        self._admit()

    def offer(self, digest: str, value: T, nbytes: int) -> None:
        """Keep it where there is room at once."""
        if digest not in self._entries and nbytes <= self.capacity and self._has_room(nbytes):
            self._bytes += nbytes
            self._entries[digest] = (value, nbytes)

    def _admit(self) -> None:
        while self._line and (self._line[0][1].done() or self._has_room(self._line[0][0])):
            nbytes, admitted = self._line.popleft()
            if not admitted.done():  # else it was cancelled
                self._bytes += nbytes
                admitted.set_result(None)

    def _has_room(self, nbytes: int) -> bool:
        """Make what room can be made."""
        unused = [digest for digest in self._entries if digest not in self._users] if self._is_full(nbytes) else []
        for digest in unused:
            if not self._is_full(nbytes):
                break
            _, freed = self._entries.pop(digest)
            self._bytes -= freed
            self._metrics.adapter_cache(self._name, "eviction")
            log.info("event=adapter_evicted tier=%s digest=%s bytes=%d", self._name, digest[:16], freed)
        return not self._is_full(nbytes) or self._bytes == 0

    def _is_full(self, nbytes: int) -> bool:
        return self._bytes + nbytes > self.capacity
