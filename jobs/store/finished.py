"""Jobs that have ended, and are to be forgotten one day."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from jobs.job import TERMINAL
from jobs.store.schema import events, jobs, step_metrics, trials, webhook_deliveries
from jobs.store.sessions import SessionTable


class FinishedJobs(SessionTable):
    """The part of the queue that forgets."""

    def ended_before(self, at: float, limit: int) -> Sequence[str]:
        """Return the ids of jobs that ended before then, in the order of their ends; not the trials of a sweep that
        still counts them.
        """
        sweep = jobs.alias("sweep")
        counts = sa.select(sweep.c.id).where(sweep.c.id == jobs.c.sweep_id, sweep.c.finished_at.is_(None))
        query = sa.select(jobs.c.id).where(jobs.c.finished_at < at, jobs.c.status.in_(sorted(TERMINAL)))
        query = query.where(~counts.exists())
        with self._db.read() as conn:
            return conn.execute(query.order_by(jobs.c.finished_at, jobs.c.id).limit(limit)).scalars().all()

    def forget(self, job_ids: Sequence[str]) -> None:
        """Delete those that have ended, with their histories, their steps' metrics and what is to be told of them."""
        ended = sa.select(jobs.c.id).where(jobs.c.id.in_(job_ids), jobs.c.status.in_(sorted(TERMINAL)))
        with self._db.write() as conn:
            of_jobs = events.c.subject, step_metrics.c.job_id, trials.c.job_id, webhook_deliveries.c.job_id, jobs.c.id
            for of_job in of_jobs:
                conn.execute(sa.delete(of_job.table).where(of_job.in_(ended)))
