"""Jobs that wait until other jobs have succeeded.

    dependencies        a row for each job that a job still waits for
    jobs.not_before     infinity while there is one: the job stands in no line, and no plan reads it

Both change in the transaction that ends a job. What waits for it is locked first, in the order of submission, in which
jobs come after those that they wait for: so no two ends wait for each other, and the later one frees what both were
waited for by.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from jobs.errors import DependencyError
from jobs.job import JobStatus
from jobs.store.schema import dependencies, jobs

MOST_TOLD = 3
_SUBMITTED = jobs.c.created_at, jobs.c.id
_LOST = {JobStatus.FAILED: "has failed", JobStatus.CANCELLED: "was cancelled"}


def unmet(conn: sa.Connection, tenant: str, ids: Sequence[str]) -> list[str]:
    """Return which of these jobs of a tenant have not succeeded yet; none of them ends before the transaction does.

    Raises:
        DependencyError: there is no such job, or it cannot succeed any more; one sentence each.
    """
    if not ids:
        return []
    own = sa.select(jobs.c.id, jobs.c.status).where(jobs.c.id.in_(ids), jobs.c.tenant == tenant).order_by(*_SUBMITTED)
    found = {row.id: JobStatus(row.status) for row in conn.execute(own.with_for_update(read=True))}
    problems = [_problem(job_id, found.get(job_id)) for job_id in ids if found.get(job_id) in (None, *_LOST)]
    if problems:
        raise DependencyError(problems)
    return [job_id for job_id in ids if found[job_id] is not JobStatus.SUCCEEDED]


def add(conn: sa.Connection, job_id: str, needed: Sequence[str]) -> None:
    """Record what a new job waits for."""
    if needed:
        conn.execute(sa.insert(dependencies), [{"job_id": job_id, "needs_id": one} for one in needed])


def release(conn: sa.Connection, job_id: str, at: float) -> list[tuple[str, str]]:
    """Let what waits for a job that has succeeded go on, or wait for what else it waits for; returns why each waits."""
    others = dependencies.alias("others")
    theirs = sa.select(dependencies.c.job_id).where(dependencies.c.needs_id == job_id)
    waiting = sa.select(jobs.c.id).where(jobs.c.id.in_(theirs)).order_by(*_SUBMITTED).with_for_update()
    if not (ids := conn.execute(waiting).scalars().all()):
        return []
    left = sa.select(others.c.job_id, others.c.needs_id).where(others.c.needs_id != job_id)
    needed: dict[str, list[str]] = {}
    for waiting_id, needs_id in conn.execute(left.where(others.c.job_id.in_(theirs)).order_by(others.c.needs_id)):
        needed.setdefault(waiting_id, []).append(needs_id)
    free = sa.update(jobs).where(jobs.c.id.in_(theirs), ~left.where(others.c.job_id == jobs.c.id).exists())
    conn.execute(free.values(not_before=None, updated_at=at))
    conn.execute(sa.delete(dependencies).where(dependencies.c.needs_id == job_id))
    return [(one, waits_for(needed[one]) if one in needed else f"waits: {job_id} has succeeded") for one in ids]


def take_dependents(conn: sa.Connection, job_id: str) -> list[tuple[str, JobStatus]]:
    """Forget what a job that cannot succeed waited for, and what all those did that waited for it, through others, too;
    returns these with their states.
    """
    lost = sa.select(sa.literal(job_id).label("id")).cte("lost", recursive=True)
    lost = lost.union(sa.select(dependencies.c.job_id).where(dependencies.c.needs_id == lost.c.id))
    ids = sa.select(lost.c.id)
    theirs = sa.select(jobs.c.id, jobs.c.status).where(jobs.c.id.in_(ids), jobs.c.id != job_id)
    found = conn.execute(theirs.order_by(*_SUBMITTED).with_for_update()).all()
    conn.execute(sa.delete(dependencies).where(dependencies.c.job_id.in_(ids)))
    return [(row.id, JobStatus(row.status)) for row in found]


def waits_for(ids: Sequence[str]) -> str:
    """Say what a job waits for."""
    more = [f"{len(ids) - MOST_TOLD} more"] if len(ids) > MOST_TOLD else []
    *first, last = [*ids[:MOST_TOLD], *more]
    return f"waits: for {', '.join(first)}{' and ' * bool(first)}{last} to succeed"


def _problem(job_id: str, status: JobStatus | None) -> str:
    if status is None:
        return f"depends_on: there is no job {job_id!r}; give the whole id of a job of yours"
    return f"depends_on: {job_id} {_LOST[status]}, so that it never succeeds; give another job, or leave it out"
