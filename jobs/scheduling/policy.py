"""Which session to launch, which job goes where, which session has to make room: pure, from rows to actions.

Waiting jobs are served strictly in order: higher priority first, then whoever came first. A job goes to an idle session
of its key (same base, precision, number of ranks), or waits for one that is being launched; else gets one launched
where workers are free; else trains beside the jobs of the emptiest session of its key, on the base that lies there.
Where none has room, idle sessions of other keys are stopped, but only if that makes enough room, and nothing behind
it is served until it is: whatever overtakes the first job in line could delay it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.job import Job, Session, SessionKey

MOST_TOLD = 10
"""A place in line beyond this one is not told of, so that a long queue is not written anew with each job that ends."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`workers`: how many ranks fit at once, on the nodes that are there and those that can be added;
    `jobs_per_session`: how many jobs train together at most.
    """

    workers: int
    jobs_per_session: int


@dataclass(frozen=True)
class Launch:
    """Launch a session, because `job_id` has none to go to."""

    session_key: SessionKey
    job_id: str


@dataclass(frozen=True)
class Assign:
    """Give a job to a running session, which may have others."""

    job_id: str
    session_id: str


@dataclass(frozen=True)
class Stop:
    """Ask a session without a job to stop."""

    session_id: str
    reason: str


Action = Launch | Assign | Stop


def plan(
    queued: Sequence[Job], running: Sequence[Job], sessions: Sequence[Session], cluster: Cluster
) -> tuple[list[Action], dict[str, str]]:
    """Return the next actions, and why each job that still waits once they are carried out does, in a sentence for
    whoever follows it.

    Both depend on nothing but the arguments (the jobs that wait, those that run and the sessions that have not ended),
    and not on the order in which those are listed. A job that needs more workers than the cluster will ever have is
    left out (`submit` refuses it; the cluster may have shrunk).
    """
    targets = _Targets(running, sessions, cluster.jobs_per_session)
    free = cluster.workers - sum(session.num_workers for session in sessions)
    coming = sum(session.num_workers for session in sessions if session.leaving)
    actions: list[Action] = []
    why = {
        job.id: f"waits: it needs {job.num_workers} workers, and the cluster has room for {cluster.workers}; add nodes,"
        " or cancel it and submit it with a lower num_workers"
        for job in queued
        if job.num_workers > cluster.workers
    }
    fitting = [job for job in queued if job.id not in why]
    in_order = sorted(fitting, key=lambda job: (-job.priority, job.created_at, job.id))
    for number, job in enumerate(in_order):
        target = targets.idle_for(job)
        if target is None and job.num_workers <= free:
            free -= job.num_workers
            actions.append(Launch(job.session_key, job.id))
            target = targets.launched(job)
        target = target or targets.beside_others(job)
        if target is None:
            missing = job.num_workers - free - coming
            reason = f"its workers are needed by {job.id}"
            actions += [Stop(session.id, reason) for session in _to_stop(targets.idle(), missing)]
            return actions, why | _in_line(in_order[number:], cluster)
        target.colocated.append(job.max_colocated)
        if target.session is not None and not target.session.launching:
            actions.append(Assign(job.id, target.session.id))
        else:
            why[job.id] = "waits: its session is being started"
    return actions, why


def _in_line(waiting: Sequence[Job], cluster: Cluster) -> dict[str, str]:
    """Tell jobs for which there is no room why, in order. No number grows without end: each is recorded."""
    first, *others = waiting
    why = {
        first.id: f"waits: others have the workers of which it needs {first.num_workers}; the cluster has"
        f" {cluster.workers}"
    }
    for before, job in enumerate(others, start=1):
        number = str(before) if before <= MOST_TOLD else f"more than {MOST_TOLD}"
        why[job.id] = f"waits: {number} job{'s' * (before > 1)} before it in line"
    return why


@dataclass
class _Target:
    """A session that stays, or is to be launched (None), for jobs of these keys; `max_colocated` of each job in it."""

    keys: tuple[SessionKey, ...]
    session: Session | None
    colocated: list[int | None]

    @property
    def comes_later(self) -> bool:
        """Whether it does not run yet."""
        return self.session is None or self.session.launching


class _Targets:
    """Where jobs can go, as one after the other is assigned."""

    def __init__(self, running: Sequence[Job], sessions: Sequence[Session], jobs_per_session: int) -> None:
        self._most = jobs_per_session - 1  # others
        oldest_first = sorted(sessions, key=lambda session: (session.created_at, session.id))
        self._targets = [
            _Target(
                session.session_keys, session, [job.max_colocated for job in running if job.session_id == session.id]
            )
            for session in oldest_first
            if not session.leaving
        ]

    def idle(self) -> list[Session]:
        """Return the sessions without a job."""
        return [target.session for target in self._targets if target.session is not None and not target.colocated]

    def idle_for(self, job: Job) -> _Target | None:
        """Find one without a job, and one that runs before one that is still being launched."""
        same = [target for target in self._targets if job.session_key in target.keys and not target.colocated]
        return min(same, key=lambda target: target.comes_later, default=None)

    def launched(self, job: Job) -> _Target:
        """Return a session that is to be launched for it."""
        self._targets.append(_Target((job.session_key,), None, []))
        return self._targets[-1]

    def beside_others(self, job: Job) -> _Target | None:
        """Find the one with the fewest jobs where everybody agrees to one more, and one that runs before others."""
        room = [target for target in self._targets if job.session_key in target.keys and self._has_room(target, job)]
        return min(room, key=lambda target: (target.comes_later, len(target.colocated)), default=None)

    def _has_room(self, target: _Target, job: Job) -> bool:
        limits = [most for most in (*target.colocated, job.max_colocated) if most is not None]
        return len(target.colocated) <= min([self._most, *limits])


def _to_stop(idle: Sequence[Session], missing: int) -> list[Session]:
    """Choose sessions that together hold `missing` workers, none more than needed; none where all are not enough."""
    if sum(session.num_workers for session in idle) < missing:
        return []
    chosen = list(idle)
    for session in sorted(idle, key=lambda session: session.num_workers):
        if sum(other.num_workers for other in chosen) - session.num_workers >= missing:
            chosen.remove(session)
    return chosen
