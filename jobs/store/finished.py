"""Jobs that have ended, and are to be forgotten one day."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from jobs.job import TERMINAL
from jobs.store.schema import events, jobs, step_metrics, webhook_deliveries
from jobs.store.sessions import SessionTable


class FinishedJobs(SessionTable):
    """The part of the queue that forgets."""

    def ended_before(self, at: float, limit: int) -> Sequence[str]:
        """Return the ids of jobs that ended before then, in the order of their ends."""
        query = sa.select(jobs.c.id).where(jobs.c.finished_at < at, jobs.c.status.in_(sorted(TERMINAL)))
        with self._db.read() as conn:
            return conn.execute(query.order_by(jobs.c.finished_at, jobs.c.id).limit(limit)).scalars().all()

    def forget(self, job_ids: Sequence[str]) -> None:
        """Delete those that have ended, with their histories, their steps' metrics and what is to be told of them."""
        ended = sa.select(jobs.c.id).where(jobs.c.id.in_(job_ids), jobs.c.status.in_(sorted(TERMINAL)))
        with self._db.write() as conn:
            for of_job in (events.c.subject, step_metrics.c.job_id, webhook_deliveries.c.job_id, jobs.c.id):
                conn.execute(sa.delete(of_job.table).where(of_job.in_(ended)))
