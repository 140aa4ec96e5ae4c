"""Work that is done once for all who want it at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Tasks by key, on one event loop; a task goes on when the one who started it leaves."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[T]] = {}

    def start(self, key: Hashable, begin: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Return the task of this key, which runs already or begins now."""
        task = self._tasks.get(key)
        if task is None or task.done():  # one that is done may be about something that has changed since
            task = self._tasks[key] = asyncio.create_task(begin())
            task.add_done_callback(lambda done: self._finish(key, done))
        return task

    async def do(self, key: Hashable, begin: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what the task of this key does. Raises what it raises."""
        return await asyncio.shield(self.start(key, begin))

    def _finish(self, key: Hashable, done: asyncio.Task[T]) -> None:
        if self._tasks.get(key) is done:
            del self._tasks[key]
        if not done.cancelled():
            done.exception()  # looked at: nobody may be left to raise it to
