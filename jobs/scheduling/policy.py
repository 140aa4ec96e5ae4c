"""Which session to launch, which job goes where, which session has to make room: pure, from rows to actions.

Waiting jobs are served in a fair order (`fair_order.py`). Each goes to an idle session of its key (same base,
precision, path, number of ranks), else has one launched where all its workers are free, else trains beside the jobs of
the emptiest session of its key that has room, on the base that lies there. Where somebody in line has no session of its
key at all, the workers for one are left to it, and who can share does.

For a job that finds no place all the workers that it needs are set aside, or none (`room.py`). If free ones are not
enough, idle sessions stop; else sessions whose jobs were all started with a lower priority give way, and their jobs go
on elsewhere or later from where they were; else, where no session of its key may have room one day, or its line has
waited for too long, the sessions that have the fewest jobs take no more until it can start. Others are served from what
is left: whatever overtakes a job in line cannot delay it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from jobs.job import SessionKey
from jobs.queue_snapshot import QueuedJob, QueueSnapshot
from jobs.scheduling.fair_order import FairOrder, Rules
from jobs.scheduling.room import Cluster, Place, Room

MOST_TOLD = 10
"""A place in line beyond this one is not told of, so that a long queue is not written anew with each job that ends."""
ROUNDING = 1e-6  # of workers that are split


@dataclass(frozen=True)
class Launch:
    """Launch a session, because `job_id` has none to go to."""

    session_key: SessionKey
    job_id: str


@dataclass(frozen=True)
class Assign:
    """Give a job to a running session, which may have others; `level`: its priority, raised by how long it waited."""

    job_id: str
    session_id: str
    level: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Stop:
    """Ask a session without a job to stop."""

    session_id: str
    reason: str


@dataclass(frozen=True)
class Preempt:
    """Ask a session to put its jobs back into the queue, once where they are is written, and to stop."""

    session_id: str
    reason: str


Action = Launch | Assign | Stop | Preempt


def plan(snapshot: QueueSnapshot, cluster: Cluster, rules: Rules) -> tuple[list[Action], dict[str, str]]:
    """Return the next actions, and why each job that still waits once they are carried out does, in a sentence for
    whoever follows it.

    Both depend on nothing but the arguments, and not on the order in which rows are listed. A job that needs more
    workers than the cluster will ever have is left out (`submit` refuses it; the cluster may have shrunk).
    """
    return _Planner(snapshot, cluster, rules).plan()


class _Planner:
    """One plan while it is made."""

    def __init__(self, snapshot: QueueSnapshot, cluster: Cluster, rules: Rules) -> None:
        self._cluster, self._rules = cluster, rules
        self._order, self._room = FairOrder(snapshot, rules), Room(snapshot, cluster)
        self._running_jobs: dict[str, int] = {}
        for jobs in snapshot.running:
            self._running_jobs[jobs.tenant] = self._running_jobs.get(jobs.tenant, 0) + jobs.number
        self._placed: list[tuple[QueuedJob, Place, int]] = []
        self._without = self._room.keys_without_a_place(
            [job for job in snapshot.queued if self._may_run_more(job.tenant)]
        )
        self._in_vain: set[tuple[SessionKey, int | None]] = set()
        self._making_room: list[Action] = []
        self._why: dict[str, str] = {}
        self._in_line = 0

    def plan(self) -> tuple[list[Action], dict[str, str]]:
        while (job := self._order.next()) is not None:
            reason = self._serve(job)
            if reason is not None:
                self._order.pass_over(job)
                self._why[job.id] = f"waits: {reason}"
        return [*self._actions(), *self._making_room], self._why

    def _serve(self, job: QueuedJob) -> str | None:
        """Find a place for a job; or return why there is none."""
        quota, workers = self._rules.quota(job.tenant), job.session_key.num_workers
        if workers > self._cluster.workers:
            return (
                f"it needs {workers} workers, and the cluster has room for {self._cluster.workers}; add nodes,"
                " or cancel it and submit it with a lower num_workers"
            )
        if not self._may_run_more(job.tenant):
            return f"{job.tenant} may have {quota.running_jobs} running jobs at a time"
        if (job.session_key, job.max_colocated) in self._in_vain:
            return self._behind_others()
        for place in self._choices(job):
            if self._allowed(job, place):
                self._put(job, place)
                return None
        if not self._allowed(job, Place((job.session_key,), None)):
            return f"{job.tenant} may have {quota.workers} workers at a time"
        self._in_vain.add((job.session_key, job.max_colocated))
        self._make_room(job)
        if self._in_line:
            return self._behind_others()
        self._in_line = 1
        return f"others have the workers of which it needs {workers}; the cluster has {self._cluster.workers}"

    def _may_run_more(self, tenant: str) -> bool:
        most = self._rules.quota(tenant).running_jobs
        return most is None or self._running_jobs.get(tenant, 0) < most

    def _choices(self, job: QueuedJob) -> Iterator[Place]:
        """Yield places for a job, the best first."""
        if (idle := self._room.idle_for(job)) is not None:
            yield idle
        own, shared = Place((job.session_key,), None), self._room.beside_others(job)
        others = sum(key.num_workers for key in self._without if key != job.session_key)
        if self._room.free >= job.session_key.num_workers + (0 if shared is None else others):
            yield own
        if shared is not None:
            yield shared

    def _allowed(self, job: QueuedJob, place: Place) -> bool:
        most = self._rules.quota(job.tenant).workers
        more = place.held_with(job.tenant)[job.tenant]
        return most is None or self._order.held(job.tenant) + more <= most + ROUNDING

    def _put(self, job: QueuedJob, place: Place) -> None:
        level = self._order.level(job)
        self._order.serve(job, place.held_with(job.tenant))
        self._running_jobs[job.tenant] = self._running_jobs.get(job.tenant, 0) + 1
        if place.session is None and not place.number:
            self._room.launch(place)
        self._without.pop(job.session_key, None)
        if not self._may_run_more(job.tenant):
            self._leave_nothing_to(job.tenant)
        place.take(job)
        self._placed.append((job, place, level))

    def _leave_nothing_to(self, tenant: str) -> None:
        """Leave no workers for keys that only this tenant's jobs have: none of them starts now."""
        for key, tenants in list(self._without.items()):
            tenants.discard(tenant)
            if not tenants:
                del self._without[key]

    def _make_room(self, job: QueuedJob) -> None:
        """Set aside what a job needs that has no place, if that is possible."""
        too_long = self._order.level(job) > job.priority
        stopping = self._room.reserve(job, wait_for_jobs=too_long or not self._room.can_come(job))
        for place in stopping or []:
            assert place.session is not None
            if place.number:
                reason = f"its workers are needed by {job.id}, of priority {job.priority}"
                self._making_room.append(Preempt(place.session.id, reason))
            else:
                self._making_room.append(Stop(place.session.id, f"its workers are needed by {job.id}"))

    def _behind_others(self) -> str:
        """Count a job in line. No number grows without end: each is recorded."""
        before = str(self._in_line) if self._in_line <= MOST_TOLD else f"more than {MOST_TOLD}"
        plural = "s" * (self._in_line > 1)
        self._in_line += 1
        return f"{before} job{plural} before it in line"

    def _actions(self) -> Iterator[Action]:
        launched: list[Place] = []
        for job, place, level in self._placed:
            if place.session is not None and not place.session.launching:
                yield Assign(job.id, place.session.id, level)
                continue
            self._why[job.id] = "waits: its session is being started"
            if place.session is None and place not in launched:
                launched.append(place)
                yield Launch(job.session_key, job.id)
