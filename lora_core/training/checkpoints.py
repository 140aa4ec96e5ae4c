"""Checkpoints of jobs in training: a state is taken between two steps, and written beside the next ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from lora_core.training.active_job import LiveJob
from lora_core.training.optimizer import Snapshot

log = logging.getLogger("lora.checkpoints")

Key = TypeVar("Key", bound=Hashable)


class CheckpointWriter(Generic[Key]):
    """Gives the state of each job to `write`, with the job's key and step, every `seconds` (None: never).

    That runs on a thread, for one job at a time: host memory has room for one state (see `memory/predictor.py`),
    and several would only share the way to the disk. What it raises is logged: training goes on, and the checkpoint
    before stays the one to resume from.
    """

    def __init__(self, seconds: float | None, write: Callable[[Key, int, Snapshot], None]) -> None:
        self._seconds, self._write = seconds, write
        self._taken: dict[Key, tuple[float, int]] = {}  # when, and after which step
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def write_oldest(self, jobs: Mapping[Key, LiveJob]) -> None:
        """Of all that train, the job whose time came first, if it has made a step since; none while another is being
        written.
        """
        now = time.monotonic()
        self._taken = {key: self._taken.get(key, (now, 0)) for key in jobs}
        if self._seconds is None or (self._writing is not None and not self._writing.done()):
            return
        due = [
            key
            for key, (taken, step) in self._taken.items()
            if now - taken >= self._seconds and jobs[key].progress.step > step and not jobs[key].done
        ]
        if due:
            oldest = min(due, key=lambda key: self._taken[key][0])
            self.write(oldest, jobs[oldest])

    def write(self, key: Key, live: LiveJob) -> Future[None] | None:
        """The state of a job as it is now; returns when it is written."""
        if self._seconds is None:
            return None
        self.wait()
        step, snapshot = live.progress.step, live.snapshot()
        self._taken[key] = time.monotonic(), step
        self._writing = self._thread.submit(self._write_logged, key, step, snapshot)
        return self._writing

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._writing is not None:
            self._writing.result()

    def close(self) -> None:
        """Wait until all is written, and end the thread."""
        self._thread.shutdown()

    def _write_logged(self, key: Key, step: int, snapshot: Snapshot) -> None:
        try:
            self._write(key, step, snapshot)
        except Exception:
            log.exception("event=checkpoint_failed job=%s step=%d", key, step)
