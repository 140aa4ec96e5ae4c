"""Which session to launch, which job goes where, which session has to make room: pure, from rows to actions.

Waiting jobs are served strictly in order: higher priority first, then whoever came first. A job goes to an idle session
of its key (same base, precision, number of ranks), else waits for one that is being launched, else gets a session
launched. Where its workers are missing, idle sessions of other keys are stopped, but only if that makes enough room,
and nothing behind it is served until it is: whatever overtakes the first job in line could delay it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jobs.job import Job, Session, SessionState


@dataclass(frozen=True, kw_only=True)
class WaitingJob:
    """A queued job."""

    id: str
    session_key: str
    num_workers: int
    priority: int
    created_at: float


@dataclass(frozen=True, kw_only=True)
class RunningJob:
    """A job that a session works on."""

    id: str
    session_id: str


@dataclass(frozen=True, kw_only=True)
class LiveSession:
    """A session that has not ended and so holds its workers. `leaving`: it is stopping, or was asked to."""

    id: str
    session_key: str
    num_workers: int
    launching: bool
    leaving: bool
    created_at: float


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`workers`: how many ranks fit at once, on the nodes that are there and those that can be added."""

    workers: int


@dataclass(frozen=True)
class Launch:
    """Launch a session, because `job_id` has none to go to."""

    session_key: str
    num_workers: int
    job_id: str


@dataclass(frozen=True)
class Assign:
    """Give a job to an idle session."""

    job_id: str
    session_id: str


@dataclass(frozen=True)
class Stop:
    """Ask a session without a job to stop."""

    session_id: str
    reason: str


Action = Launch | Assign | Stop


def snapshot(
    queued: Iterable[Job], running: Iterable[Job], sessions: Iterable[Session]
) -> tuple[list[WaitingJob], list[RunningJob], list[LiveSession]]:
    """What `plan` needs of the rows."""
    waiting = [
        WaitingJob(
            id=job.id,
            session_key=job.session_key,
            num_workers=job.num_workers,
            priority=job.priority,
            created_at=job.created_at,
        )
        for job in queued
    ]
    at_work = [RunningJob(id=job.id, session_id=job.session_id) for job in running if job.session_id is not None]
    live = [
        LiveSession(
            id=session.id,
            session_key=session.session_key,
            num_workers=session.num_workers,
            launching=session.state is SessionState.LAUNCHING,
            leaving=session.state is SessionState.STOPPING or session.wish is not None,
            created_at=session.created_at,
        )
        for session in sessions
        if session.state is not SessionState.ENDED
    ]
    return waiting, at_work, live


def plan(
    queued: Sequence[WaitingJob], running: Sequence[RunningJob], sessions: Sequence[LiveSession], cluster: Cluster
) -> list[Action]:
    """The next actions. They depend on nothing but the arguments, and not on the order in which those are listed. A
    job that needs more workers than the cluster will ever have is left out (`submit` refuses it; the cluster may have
    shrunk)."""
    busy = {job.session_id for job in running}
    oldest_first = sorted(sessions, key=lambda session: (session.created_at, session.id))
    idle = [session for session in oldest_first if session.id not in busy and not session.leaving]
    free = cluster.workers - sum(session.num_workers for session in sessions)
    coming = sum(session.num_workers for session in sessions if session.leaving)
    actions: list[Action] = []
    for job in sorted(queued, key=lambda job: (-job.priority, job.created_at, job.id)):
        if job.num_workers > cluster.workers:
            continue
        # One that runs before one that is still being launched.
        same = sorted((s for s in idle if s.session_key == job.session_key), key=lambda session: session.launching)
        if same:
            idle.remove(same[0])
            if not same[0].launching:
                actions.append(Assign(job.id, same[0].id))
        elif job.num_workers <= free:
            free -= job.num_workers
            actions.append(Launch(job.session_key, job.num_workers, job.id))
        else:
            missing = job.num_workers - free - coming
            reason = f"its workers are needed by {job.id}"
            return actions + [Stop(session.id, reason) for session in _to_stop(idle, missing)]
    return actions


def _to_stop(idle: Sequence[LiveSession], missing: int) -> list[LiveSession]:
    """Sessions that together hold `missing` workers, none more than needed; none at all where all of them are not
    enough."""
    if sum(session.num_workers for session in idle) < missing:
        return []
    chosen = list(idle)
    for session in sorted(idle, key=lambda session: session.num_workers):
        if sum(other.num_workers for other in chosen) - session.num_workers >= missing:
            chosen.remove(session)
    return chosen
