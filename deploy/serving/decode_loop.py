"""The one thread that owns a generator: it takes commands between steps, and hands each request its tokens.

torch runs here and nowhere else in the replica while requests are answered; the replica's event loop only waits.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from lora_core.inference.engine import GeneratedToken, GenerationRequest, Generator

log = logging.getLogger("ray.serve.lora")  # below `ray.serve`, whose handlers write the replica's log

T = TypeVar("T")

_IDLE_SECONDS = 5.0


class DecodeLoopError(RuntimeError):
    """The thread is dead: a step failed, so nobody knows what the cache holds. The replica must be replaced."""


@dataclass(eq=False)
class _RequestHandle:
    """One request from the side of the caller, who may leave before the generator has even taken it."""

    deliver: Callable[[GeneratedToken | DecodeLoopError], None]
    number: int | None = None


class DecodeLoop:
    """Runs `generator` on a thread of its own, with `threads` torch threads.

    `observe(running, waiting)` is called after every step, and every few seconds.
    """

    def __init__(self, generator: Generator, *, threads: int, observe: Callable[[int, int], None]) -> None:
        self.error: DecodeLoopError | None = None
        self._generator, self._threads, self._observe = generator, threads, observe
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._handles: dict[int, _RequestHandle] = {}
        self._lock = threading.Lock()  # so that no command comes after the thread's last look at the queue
        threading.Thread(target=self._run, name="decode", daemon=True).start()

    async def call(self, function: Callable[[], T]) -> T:
        """Return the result of a function that ran on the thread, between two steps."""
        future: Future[T] = Future()

        def command() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    if self.error is not None:
                        raise self.error
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

        if not self._post(command):
            command()
        return await asyncio.wrap_future(future)

    @asynccontextmanager
    async def answering(self, request: GenerationRequest) -> AsyncIterator[AsyncIterator[list[GeneratedToken]]]:
        """Yield the events of a request, those that came together together; leaving the block gives the request up.

        Raises:
            PromptTooLongError: and what else `Generator.add` refuses.
            DecodeLoopError: the thread is dead, or dies (then out of the iterator).
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[GeneratedToken | DecodeLoopError]()

        def deliver(event: GeneratedToken | DecodeLoopError) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        handle = _RequestHandle(deliver)

        def add() -> None:
            handle.number = self._generator.add(request)
            self._handles[handle.number] = handle

        try:
            await self.call(add)
            yield _together(events)
        finally:
            self._post(lambda: self._give_up(handle))

    def _give_up(self, handle: _RequestHandle) -> None:
        if handle.number is not None:
            self._generator.abort(handle.number)
            self._handles.pop(handle.number, None)

    def _post(self, command: Callable[[], None]) -> bool:
        """Return whether the thread lives to take it."""
        with self._lock:
            if self.error is None:
                self._commands.put(command)
            return self.error is None

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # Ray sets OMP_NUM_THREADS=1
        try:
            while True:
                self._take_commands()
                for event in self._generator.step():
                    self._handles[event.request].deliver(event)
                self._observe(self._generator.running, self._generator.waiting)
        except Exception as error:
            log.exception("event=decode_failed requests=%d", len(self._handles))
            self._die(DecodeLoopError(f"decoding failed: {type(error).__name__}: {error}"))

    def _take_commands(self) -> None:
        """Run all that are there; where nobody is being answered, wait for one."""
        busy = self._generator.running or self._generator.waiting
        try:
            command = self._commands.get(block=not busy, timeout=_IDLE_SECONDS)
            while True:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _die(self, error: DecodeLoopError) -> None:
        with self._lock:
            self.error = error
        while not self._commands.empty():
            self._commands.get()()
        for handle in self._handles.values():
            handle.deliver(error)


async def _together(events: asyncio.Queue[GeneratedToken | DecodeLoopError]) -> AsyncIterator[list[GeneratedToken]]:
    finished = False
    while not finished:
        batch = [await events.get()]
        while not events.empty():
            batch.append(events.get_nowait())
        tokens: list[GeneratedToken] = []
        for event in batch:
            if isinstance(event, DecodeLoopError):
                raise event
            tokens.append(event)
        finished = tokens[-1].finish_reason is not None
        yield tokens
