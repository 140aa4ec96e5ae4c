"""What a plan is made from: rows of the queue with no more of them than it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.job import Session, SessionKey


@dataclass(frozen=True, kw_only=True, slots=True)
class QueuedJob:
    """What a plan needs to know of a job that waits: since `waits_since`, if it has been started before. `step_tokens`
    are 0 where they are not known.
    """

    id: str
    tenant: str
    priority: int
    session_key: SessionKey
    max_colocated: int | None
    step_tokens: int
    created_at: float
    waits_since: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningJobs:
    """The jobs of one tenant and priority that run in one session: how many, the highest `level` with which one was
    started (its priority, raised by how long it had waited), the least `max_colocated`, and the sum of `step_tokens`.
    """

    session_id: str
    tenant: str
    priority: int
    level: int
    number: int
    max_colocated: int | None
    step_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """What the jobs of one tenant and priority had: `mean_workers` on average until `at` (see
    `jobs/scheduling/fair_order.py`), and when the oldest of those that waited was last given to a session.
    """

    tenant: str
    priority: int
    mean_workers: float
    at: float
    served_at: float | None


@dataclass(frozen=True, kw_only=True)
class QueueSnapshot:
    """What a plan is made from, as it was at one moment: of the waiting jobs the oldest of each line."""

    at: float
    queued: Sequence[QueuedJob] = ()
    running: Sequence[RunningJobs] = ()
    sessions: Sequence[Session] = ()
    lines: Sequence[Line] = ()
