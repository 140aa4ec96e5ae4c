"""Where waiting jobs can go: sessions that stay, those that are to be launched, and workers. Pure.

What is reserved for a job that finds no place is taken out of the room for all others: workers that are free or are
becoming so, and sessions that are to make room, which take no job any more. So whoever is served behind it does not
keep it waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from jobs.job import Session, SessionKey
from jobs.queue_snapshot import QueuedJob, QueueSnapshot


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`workers`: how many ranks fit at once, on the nodes that are there and those that can be added;
    `jobs_per_session`: how many jobs train together at most; `step_tokens`: in the steps of its jobs with which a rank
    is busy, so that one more would only make the others slower.
    """

    workers: int
    jobs_per_session: int
    step_tokens: int


@dataclass(eq=False)
class Place:
    """A session that stays, or is to be launched (None), for jobs of these keys, and what is in it."""

    keys: tuple[SessionKey, ...]
    session: Session | None
    tenants: Counter[str] = field(default_factory=Counter)
    least_colocated: int | None = None
    step_tokens: int = 0
    level: int | None = None
    """The highest with which a job in it was started."""
    joined: bool = False
    """Whether a job goes there by this plan."""
    reserved: bool = False

    @property
    def number(self) -> int:
        """How many jobs are in it."""
        return self.tenants.total()

    @property
    def workers(self) -> int:
        return self.keys[0].num_workers

    @property
    def comes_later(self) -> bool:
        """Whether it does not run yet."""
        return self.session is None or self.session.launching

    def held_with(self, tenant: str) -> dict[str, float]:
        """Return by how much each tenant holds more workers, if one more job of `tenant` comes in."""
        before, after = self.number, self.number + 1
        return {
            name: self.workers * ((self.tenants[name] + (name == tenant)) / after - self.tenants[name] / max(1, before))
            for name in sorted({tenant, *self.tenants})
        }

    def take(self, job: QueuedJob) -> None:
        """Let a job in."""
        self.tenants[job.tenant] += 1
        self.least_colocated = least(self.least_colocated, job.max_colocated)
        self.step_tokens += job.step_tokens
        self.level = job.priority if self.level is None else max(self.level, job.priority)
        self.joined = True


class Room:
    """The places of a snapshot, as one job after the other is served."""

    def __init__(self, snapshot: QueueSnapshot, cluster: Cluster) -> None:
        self._cluster = cluster
        self.free = cluster.workers - sum(session.num_workers for session in snapshot.sessions)
        self._coming = sum(session.num_workers for session in snapshot.sessions if session.leaving)
        oldest_first = sorted(snapshot.sessions, key=lambda session: (session.created_at, session.id))
        places = {one.id: Place(one.session_keys, one) for one in oldest_first if not one.leaving}
        for jobs in snapshot.running:
            if (place := places.get(jobs.session_id)) is not None:
                place.tenants[jobs.tenant] += jobs.number
                place.least_colocated = least(place.least_colocated, jobs.max_colocated)
                place.step_tokens += jobs.step_tokens
                place.level = jobs.level if place.level is None else max(place.level, jobs.level)
        self._places = list(places.values())

    def keys_without_a_place(self, jobs: Sequence[QueuedJob]) -> dict[SessionKey, set[str]]:
        """Return those of jobs that could be launched at all, of which there is no session, with the jobs' tenants."""
        there = {key for place in self._places for key in place.keys}
        found: dict[SessionKey, set[str]] = {}
        for job in jobs:
            if job.session_key.num_workers <= self._cluster.workers and job.session_key not in there:
                found.setdefault(job.session_key, set()).add(job.tenant)
        return found

    def idle_for(self, job: QueuedJob) -> Place | None:
        """Find one without a job, and one that runs before one that is still being launched."""
        same = [place for place in self._of(job) if not place.number]
        return min(same, key=lambda place: place.comes_later, default=None)

    def beside_others(self, job: QueuedJob) -> Place | None:
        """Find the one with the fewest jobs where there is room for one more, and one that runs before others."""
        room = [place for place in self._of(job) if self._has_room(place, job)]
        return min(room, key=lambda place: (place.comes_later, place.number), default=None)

    def can_come(self, job: QueuedJob) -> bool:
        """Whether there is a session that it can join once others have left it."""
        return job.max_colocated != 0 and bool(self._of(job))

    def launch(self, place: Place) -> None:
        """Take the workers of a session that is to be launched."""
        self.free -= place.workers
        self._places.append(place)

    def reserve(self, job: QueuedJob, *, wait_for_jobs: bool) -> list[Place] | None:
        """Set aside all that a job needs to be launched, or nothing; returns the sessions that have to stop for it. One
        without jobs stops; if those are not enough, one with jobs of lower priority gives way; else, if the job is to
        `wait_for_jobs`, those that have the fewest take no more, and stop together once they have none (and are not
        returned). None: nothing is set aside.
        """
        need = job.session_key.num_workers
        free = min(self.free, need)  # below 0 where nodes were lost: others have to make up for that first
        coming = min(self._coming, need - free)
        missing = need - free - coming
        unreserved = [place for place in self._places if not place.reserved]
        idle = [place for place in unreserved if not place.number]
        weaker = [one for one in unreserved if one.level is not None and one.level < job.priority and not one.joined]
        weaker.sort(key=lambda place: (place.level or 0, place.number))
        stop = chosen = _enough(idle, missing) or _enough([*idle, *weaker], missing)
        if chosen is None and wait_for_jobs:
            stop, chosen = [], _enough(sorted(unreserved, key=lambda place: place.number), missing)
        if chosen is None:
            return None
        self.free -= max(0, free) if not stop and chosen else free
        self._coming -= coming
        for place in chosen:
            place.reserved = True
        if stop:
            self._coming += sum(place.workers for place in stop) - missing  # what is left of them is for others
        return stop

    def _of(self, job: QueuedJob) -> list[Place]:
        return [place for place in self._places if job.session_key in place.keys and not place.reserved]

    def _has_room(self, place: Place, job: QueuedJob) -> bool:
        """Whether a job may join: one of a higher priority than all that are there, also where they keep ranks busy."""
        limit = least(place.least_colocated, job.max_colocated)
        if place.number >= self._cluster.jobs_per_session or (limit is not None and place.number > limit):
            return False
        busy = place.step_tokens >= self._cluster.step_tokens * place.workers
        return not busy or (place.level is not None and place.level < job.priority)


def least(one: int | None, other: int | None) -> int | None:
    """Return the smaller of two limits, of which None is none."""
    return other if one is None else one if other is None else min(one, other)


def _enough(places: Sequence[Place], missing: int) -> list[Place] | None:
    """Choose places that together hold `missing` workers, none more than needed, the first ones before later ones; None
    where all are not enough.
    """
    chosen, held = [], 0
    for place in places:
        if held < missing:
            chosen.append(place)
            held += place.workers
    if held < missing:
        return None
    for place in reversed(chosen[:]):
        if held - place.workers >= missing:
            chosen.remove(place)
            held -= place.workers
    return chosen
