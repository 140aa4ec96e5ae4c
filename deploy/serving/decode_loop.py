"""The one thread that owns a generator: it takes commands between steps, and hands each request its tokens.

torch runs here and nowhere else in the replica while requests are answered; the replica's event loop only waits.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from deploy.serving.outbox import Outbox, Receiver
from lora_core.inference.engine import Generator
from lora_core.inference.generation import FailedRequest, GeneratedToken, GenerationRequest

log = logging.getLogger("ray.serve.lora")  # below `ray.serve`, whose handlers write the replica's log

T = TypeVar("T")

_IDLE_SECONDS = 5.0


class DecodeLoopError(RuntimeError):
    """The thread is dead: a step failed, so nobody knows what the cache holds. The replica must be replaced."""


ChoiceToken = tuple[int, GeneratedToken]
"""Which of the answers to a prompt, and its next token."""


_Receiver = Receiver[ChoiceToken | Exception]


@dataclass(eq=False)
class _RequestHandle:
    """The answers to one prompt from the side of the caller, who may leave before the generator has even taken them."""

    receiver: _Receiver
    choices: dict[int, int] = field(default_factory=dict)  # by the generator's id


class DecodeLoop:
    """Runs `generator` on a thread of its own, with `threads` torch threads.

    `observe(running, waiting)` is called after every step, and every few seconds. A thread whose step or command takes
    longer than `patience` seconds counts as stuck.
    """

    def __init__(
        self, generator: Generator, *, threads: int, observe: Callable[[int, int], None], patience: float = math.inf
    ) -> None:
        self.error: DecodeLoopError | None = None
        self._generator, self._threads, self._observe, self._patience = generator, threads, observe, patience
        self._began: float | None = None  # the step or command that runs now; None where there is nothing to do
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._handles: dict[int, _RequestHandle] = {}
        self._outbox = Outbox[ChoiceToken | Exception]()
        self._lock = threading.Lock()  # so that no command comes after the thread's last look at the queue
        threading.Thread(target=self._run, name="decode", daemon=True).start()

    def check_health(self) -> None:
        """Raise DecodeLoopError where the thread is dead, or its last step too long ago while there is work."""
        if self.error is not None:
            raise self.error
        age = 0.0 if (began := self._began) is None else time.monotonic() - began
        if age > self._patience:
            raise DecodeLoopError(
                f"decoding is stuck: its step has taken {age:.0f} s; if it must, raise"
                f" LORA_ENGINE_ITERATION_TIMEOUT_SECONDS above {self._patience:.0f}"
            )

    async def call(self, function: Callable[[], T]) -> T:
        """Return the result of a function that ran on the thread, between two steps."""
        return await asyncio.wrap_future(self.submit(function))

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Let the thread run a function as soon as it can."""
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
        return future

    @asynccontextmanager
    async def answering(self, choices: Sequence[GenerationRequest]) -> AsyncIterator[AsyncIterator[list[ChoiceToken]]]:
        """Yield the tokens of the answers to one prompt, which is read once; those that came together together. Leaving
        the block gives the answers up.

        Raises:
            PromptTooLongError: and what else `Generator.add` refuses.
            GrammarError: an answer cannot go on (out of the iterator).
            DecodeLoopError: the thread is dead, or dies (then out of the iterator).
        """
        handle = _RequestHandle(_Receiver())

        def add() -> None:
            for index, request in enumerate(choices):
                number = self._generator.add(request, after=next(iter(handle.choices), None))
                handle.choices[number], self._handles[number] = index, handle

        try:
            await self.call(add)
            yield _together(handle.receiver, len(choices))
        finally:
            self._post(lambda: self._give_up(handle))

    def _give_up(self, handle: _RequestHandle) -> None:
        for number in handle.choices:
            self._generator.abort(number)
            self._handles.pop(number, None)
        self._outbox.drop(handle.receiver)

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
                self._began = time.monotonic()
                for event in self._generator.step():
                    self._queue(event)
                self._outbox.flush(time.monotonic())
                self._observe(self._generator.running, self._generator.waiting)
        except Exception as error:
            log.exception("event=decode_failed requests=%d", len(self._handles))
            self._die(DecodeLoopError(f"decoding failed: {type(error).__name__}: {error}"))

    def _queue(self, event: GeneratedToken | FailedRequest) -> None:
        """Put it into the outbox: the first token of an answer, and its end, go at once."""
        handle = self._handles[event.request]
        if isinstance(event, FailedRequest):
            self._outbox.add(handle.receiver, event.error, urgent=True)
        else:
            urgent = event.completion_tokens <= 1 or event.finish_reason is not None
            self._outbox.add(handle.receiver, (handle.choices[event.request], event), urgent=urgent)

    def _take_commands(self) -> None:
        """Run all that are there; where nobody is being answered, wait for one."""
        busy = self._generator.running or self._generator.waiting
        if not busy:
            self._began = None
        try:
            command = self._commands.get(block=not busy, timeout=_IDLE_SECONDS)
            while True:
                self._began = time.monotonic()
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _die(self, error: DecodeLoopError) -> None:
        with self._lock:
            self.error = error
        while not self._commands.empty():
            self._commands.get()()
        for handle in set(self._handles.values()):
            self._outbox.add(handle.receiver, error, urgent=True)
        self._outbox.flush(time.monotonic())


async def _together(receiver: _Receiver, choices: int) -> AsyncIterator[list[ChoiceToken]]:
    while choices:
        events = await receiver.receive()
        tokens = [event for event in events if not isinstance(event, Exception)]
        choices -= sum(token.finish_reason is not None for _, token in tokens)
        if tokens:
            yield tokens
        if choices and (errors := [event for event in events if isinstance(event, Exception)]):
            raise errors[0]
