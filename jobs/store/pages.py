"""Jobs as a client of the API sees them: a tenant's own, found by their whole id, in pages with the newest first."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from jobs.errors import JobNotFoundError
from jobs.job import TERMINAL, EventKind, FailureCode, Job, JobStatus, QueueEvent, RequestedAction
from jobs.store.schema import events, jobs
from jobs.store.sessions import event_of
from jobs.store.step_metrics import StepMetricsTable

NO_TRIAL = sa.or_(jobs.c.sweep_id.is_(None), jobs.c.sweep_id == jobs.c.id)


class JobPages(StepMetricsTable):
    """The part of the queue that only reads."""

    def find(self, tenant: str, job_id: str) -> Job:
        """Return a tenant's job. Raises JobNotFoundError."""
        query = sa.select(jobs).where(jobs.c.id == job_id, jobs.c.tenant == tenant)
        with self._db.read() as conn:
            row = conn.execute(query).one_or_none()
        if row is None:
            raise JobNotFoundError(job_id, [])
        return job_of(row)

    def find_by_key(self, tenant: str, idempotency_key: str) -> Job | None:
        """Return the job that a tenant made with this key, if there is one."""
        query = sa.select(jobs).where(jobs.c.tenant == tenant, jobs.c.idempotency_key == idempotency_key)
        with self._db.read() as conn:
            row = conn.execute(query).one_or_none()
        return None if row is None else job_of(row)

    def waiting_before(self, cluster: str, priority: int) -> int:
        """Return how many jobs wait on a cluster with this priority or a higher one."""
        waiting = (jobs.c.cluster == cluster, jobs.c.status == JobStatus.QUEUED, jobs.c.priority >= priority)
        with self._db.read() as conn:
            found: int = conn.execute(sa.select(sa.func.count()).select_from(jobs).where(*waiting)).scalar_one()
        return found

    def page(
        self,
        tenant: str | None,
        limit: int,
        after: str | None = None,
        metadata: Mapping[str, str] | None = None,
        statuses: Collection[JobStatus] | None = None,
        trials: bool = False,
    ) -> tuple[Sequence[Job], bool]:
        """Return a tenant's jobs (None: everybody's) that follow the one `after`, and whether there are more; those
        that have all of `metadata`, or for an empty mapping those that have none, in one of `statuses`. The `trials` of
        sweeps are left out if nobody asks for them. Raises JobNotFoundError.
        """
        query = sa.select(jobs)
        if not trials:
            query = query.where(NO_TRIAL)
        if tenant is not None:
            query = query.where(jobs.c.tenant == tenant)
        if statuses is not None:
            query = query.where(jobs.c.status.in_(sorted(statuses)))
        if after is not None:
            assert tenant is not None
            last = self.find(tenant, after)
            query = query.where(sa.tuple_(jobs.c.created_at, jobs.c.id) < sa.tuple_(last.created_at, last.id))
        if metadata is not None and not metadata:
            query = query.where(jobs.c.metadata.is_(None))
        query = query.order_by(jobs.c.created_at.desc(), jobs.c.id.desc()).limit(limit + 1)
        with self._db.read() as conn:
            for pair in (metadata or {}).items():
                query = query.where(_has(*pair, conn.dialect.name))
            found = [job_of(row) for row in conn.execute(query)]
        return found[:limit], len(found) > limit

    def unfinished(self) -> Mapping[tuple[str, str, JobStatus], int]:
        """Return how many jobs have not ended, by tenant, base and state: those of all tenants."""
        columns = jobs.c.tenant, jobs.c.base, jobs.c.status
        query = sa.select(*columns, sa.func.count()).where(jobs.c.status.not_in(sorted(TERMINAL))).group_by(*columns)
        with self._db.read() as conn:
            return {(tenant, base, JobStatus(status)): n for tenant, base, status, n in conn.execute(query)}

    def checkpoints_page(self, job_id: str, limit: int, before: int | None = None) -> tuple[Sequence[QueueEvent], bool]:
        """Return the events of a job's checkpoints from before that one on, the newest first, and whether there are
        more.
        """
        query = sa.select(events).where(events.c.subject == job_id, events.c.kind == EventKind.CHECKPOINT)
        if before is not None:
            query = query.where(events.c.id < before)
        with self._db.read() as conn:
            found = [event_of(row) for row in conn.execute(query.order_by(events.c.id.desc()).limit(limit + 1))]
        return found[:limit], len(found) > limit


def _has(key: str, value: str, dialect: str) -> sa.ColumnElement[bool]:
    """Whether a job's metadata have this pair. Not by SQLite's path into JSON, which misses keys that JSON escapes."""
    each = sa.func.json_each if dialect == "sqlite" else sa.func.json_each_text
    pairs = each(jobs.c.metadata).table_valued("key", "value")
    return sa.select(sa.literal(1)).select_from(pairs).where(pairs.c.key == key, pairs.c.value == value).exists()


def job_of(row: sa.Row[Any]) -> Job:
    """Return a row of `jobs`."""
    values = dict(row._mapping)
    del values["copy"]
    requested = None if values["requested"] is None else RequestedAction(values["requested"])
    code = None if values["error_code"] is None else FailureCode(values["error_code"])
    return Job(**values | {"status": JobStatus(values["status"]), "requested": requested, "error_code": code})
