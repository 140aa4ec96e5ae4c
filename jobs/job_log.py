"""A job's log in storage, where it outlives nodes and databases: lines of JSON in pieces, since nothing is appended to.

    {"at": 1764547200.0, "level": "info", "message": "submitted", "event": 12}

The drivers of its sessions copy its history there (`event` is the id), and add what is no event of it: checkpoints, and
tracebacks of its own failures. Before the first of them lies what its submission has found.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cluster.storage.base import Storage
from cluster.storage.keys import job_log_key, job_logs_prefix
from jobs.job import QueueEvent
from jobs.store.jobs import JobQueue

LOOK_SECONDS = 2.0  # between two looks for new pieces, each of which lists keys


@dataclass(frozen=True)
class LogLine:
    """`event` is the id of an event of the job's history; None: it is none."""

    at: float
    level: str
    message: str
    event: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def line_of(event: QueueEvent) -> LogLine:
    return LogLine(event.at, event.level, event.message, event.id)


class JobLogWriter:
    """The log of one attempt of a job, on the side that writes it; the first piece has the history so far."""

    def __init__(self, storage: Storage, job_id: str, attempt: int) -> None:
        self._storage, self._job_id, self._attempt = storage, job_id, attempt
        self._lines: list[LogLine] = []
        self._pieces = 0
        self.copied = 0
        """The last event of the history that is there."""

    def add(self, message: str, level: str = "info") -> None:
        """Add a line that is no event. Characters that cannot be written are replaced, as in events."""
        written = message.encode("utf-8", "replace").decode()
        self._lines.append(LogLine(time.time(), level, written))

    def write(self, events: Sequence[QueueEvent]) -> None:
        """Write what is new, with these events. Raises StorageError; then the next call writes it."""
        known = {line.event for line in self._lines}
        self._lines += [line_of(event) for event in events if event.id not in known]
        if not self._lines:
            return
        in_order = sorted(self._lines, key=lambda line: line.at)
        key = job_log_key(self._job_id, self._attempt, self._pieces)
        self._storage.put(key, "".join(f"{line.to_json()}\n" for line in in_order).encode())
        self._pieces += 1
        self.copied = max([self.copied, *(line.event for line in in_order if line.event is not None)])
        self._lines = []


class JobLog:
    """A job's log on the side that reads it: the pieces, and what its history has beyond them. Without a storage, its
    history alone.
    """

    def __init__(self, queue: JobQueue, job_id: str, storage: Storage | None = None) -> None:
        self._queue, self._job_id, self._storage = queue, job_id, storage
        self._seen = 0
        self._read: set[str] = set()
        self._looked = float("-inf")

    def read(self, *, whole: bool) -> list[LogLine]:
        """Return the lines that were not there the last time, in order; `whole`: also from pieces that are not looked
        for yet. Raises StorageError, DatabaseUnavailableError.
        """
        lines = [line for line in self._new_pieces(whole) if line.event is None or line.event > self._seen]
        known = {line.event for line in lines}
        lines += [
            line_of(event) for event in self._queue.events(self._job_id, after=self._seen) if event.id not in known
        ]
        self._seen = max([self._seen, *(line.event for line in lines if line.event is not None)])
        return sorted(lines, key=lambda line: line.at)

    def _new_pieces(self, whole: bool) -> list[LogLine]:
        if self._storage is None or (not whole and time.monotonic() - self._looked < LOOK_SECONDS):
            return []
        self._looked = time.monotonic()
        lines: dict[LogLine, None] = {}
        for key in self._storage.list(job_logs_prefix(self._job_id)):
            if key not in self._read:
                self._read.add(key)
                text = self._storage.get(key).decode()
                lines |= dict.fromkeys(LogLine(**json.loads(line)) for line in text.split("\n") if line)
        return [*lines]
