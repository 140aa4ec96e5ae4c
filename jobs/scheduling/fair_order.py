"""In which order waiting jobs are served: by priority, then by what their tenants have had, then by age. Pure.

    level = priority + floor(time since the job came, or a job of its line was served / aging)      the higher first
    share = (held + mean) / weight                                                                  the smaller first
    held  = over the tenant's running jobs: workers of the session / jobs in the session            now
    mean' = (held - mean) * ln 2 / half-life                             over the past, kept in the table `lines`
    then whoever came first

A line is what waits of one tenant and priority. That one which is served grows no older, and that one which is passed
over does, keeps a long line from going before everybody for being long, and lets every line be the first one day.
`held` changes with each job that is served, so that many who find an empty cluster share it as well.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster.settings import EVERYBODY_ELSE, Quota, Settings
from jobs.queue_snapshot import Line, QueuedJob, QueueSnapshot

COUNTED_SECONDS = 60.0
DIGITS = 6  # of a share: the same share, summed up in another order, is the same


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What an operator has set: `quotas` of the tenants that have one of their own, `others` of all others."""

    quotas: Mapping[str, Quota]
    others: Quota
    aging_seconds: float
    half_life_seconds: float

    @classmethod
    def of(cls, settings: Settings) -> Rules:
        """Return those of an operator's settings."""
        return cls(
            quotas=settings.quotas,
            others=settings.quota(EVERYBODY_ELSE),
            aging_seconds=settings.aging_seconds,
            half_life_seconds=settings.usage_half_life_seconds,
        )

    def quota(self, tenant: str) -> Quota:
        """Return what a tenant may have."""
        return self.quotas.get(tenant, self.others)


class FairOrder:
    """Hands out the waiting jobs of a snapshot one by one, while what tenants hold changes."""

    def __init__(self, snapshot: QueueSnapshot, rules: Rules) -> None:
        self._rules, self._at = rules, snapshot.at
        self._held: dict[str, float] = defaultdict(float)
        self._mean: dict[str, float] = defaultdict(float)
        held = held_by_line(snapshot)
        for (tenant, _), workers in sorted(held.items()):
            self._held[tenant] += workers
        for line in sorted(snapshot.lines, key=lambda line: (line.tenant, line.priority)):
            now = held.get((line.tenant, line.priority), 0.0)
            self._mean[line.tenant] += line_until(snapshot.at, line, now, rules.half_life_seconds).mean_workers
        self._served = {(line.tenant, line.priority): line.served_at for line in snapshot.lines}
        self._passed: set[tuple[str, int]] = set()
        self._jobs: dict[tuple[str, int], list[QueuedJob]] = defaultdict(list)  # the oldest last
        for job in sorted(snapshot.queued, key=lambda job: (job.created_at, job.id), reverse=True):
            self._jobs[job.tenant, job.priority].append(job)
        self._lines: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for name in self._jobs:
            self._lines[name[0]].append(name)
        self._versions: dict[str, int] = defaultdict(int)
        self._heap: list[tuple[int, float, float, str, int, tuple[str, int]]] = []
        for name in self._jobs:
            self._push(name)

    def next(self) -> QueuedJob | None:
        """Take the job that is to be served next; None after the last one."""
        while self._heap:
            *_, version, line = heapq.heappop(self._heap)
            if version == self._versions[line[0]]:
                job = self._jobs[line].pop()
                self._push(line)
                return job
        return None

    def held(self, tenant: str) -> float:
        """Return the workers that a tenant holds now."""
        return self._held[tenant]

    def serve(self, job: QueuedJob, held: Mapping[str, float]) -> None:
        """Record that a job is served, and by how much its tenant and others hold more or less with it."""
        if (job.tenant, job.priority) not in self._passed:
            self._served[job.tenant, job.priority] = self._at
        for tenant, workers in held.items():
            self._held[tenant] += workers
            self._versions[tenant] += 1
            for line in self._lines[tenant]:
                self._push(line)

    def pass_over(self, job: QueuedJob) -> None:
        """Record that a job is not served: whoever of its line is does not make it any younger."""
        self._passed.add((job.tenant, job.priority))

    def level(self, job: QueuedJob) -> int:
        """Return a job's priority, raised by how long it and its line have waited."""
        since = max(job.waits_since, self._served.get((job.tenant, job.priority)) or -math.inf)
        return job.priority + max(0, int((self._at - since) // self._rules.aging_seconds))

    def _push(self, line: tuple[str, int]) -> None:
        if self._jobs[line]:
            job, tenant = self._jobs[line][-1], line[0]
            workers = self._held[tenant] + self._mean[tenant]
            share = round(workers / self._rules.quota(tenant).weight, DIGITS)
            entry = (-self.level(job), share, job.created_at, job.id, self._versions[tenant], line)
            heapq.heappush(self._heap, entry)


def held_by_line(snapshot: QueueSnapshot) -> dict[tuple[str, int], float]:
    """Return how many workers the running jobs of each line hold: sessions are split evenly between their jobs."""
    width = {session.id: session.num_workers for session in snapshot.sessions}
    inside: dict[str, int] = defaultdict(int)
    for jobs in snapshot.running:
        inside[jobs.session_id] += jobs.number
    found: dict[tuple[str, int], float] = defaultdict(float)
    for jobs in sorted(snapshot.running, key=lambda jobs: (jobs.session_id, jobs.tenant, jobs.priority)):
        share = jobs.number / inside[jobs.session_id]
        found[jobs.tenant, jobs.priority] += width.get(jobs.session_id, 0) * share
    return dict(found)


def line_until(at: float, line: Line, held: float, half_life: float) -> Line:
    """Return a line whose mean counts what it has held since it was written, for `COUNTED_SECONDS` at most: in the time
    before, of a line that is written so seldom, it held nothing, or nobody scheduled.
    """
    gap = max(0.0, at - line.at)
    kept = 2.0 ** (-min(gap, COUNTED_SECONDS) / half_life)
    mean = line.mean_workers * 2.0 ** (-gap / half_life) + held * (1 - kept)
    return replace(line, mean_workers=mean, at=line.at + gap)


def lines_to_write(snapshot: QueueSnapshot, half_life: float, seconds: float) -> list[Line]:
    """Return the lines that hold workers, as they are now, if any of them was not written for so long."""
    held, known = held_by_line(snapshot), {(line.tenant, line.priority): line for line in snapshot.lines}
    if all(name in known and snapshot.at - known[name].at < seconds for name in held):
        return []
    new = {
        name: Line(tenant=name[0], priority=name[1], mean_workers=0.0, at=snapshot.at, served_at=None) for name in held
    }
    return [line_until(snapshot.at, known.get(name, new[name]), workers, half_life) for name, workers in held.items()]
