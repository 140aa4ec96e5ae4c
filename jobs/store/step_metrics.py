"""The metrics of a job's optimizer steps, which a session's driver writes in batches, under its fence.

    all of the newest steps            KEPT to KEPT + SLACK of them
    every 2nd, 4th, ... before them    as many as make KEPT at most, evenly over all of training
    every step that was validated

So a curve of any job is whole, and as fine as a screen shows, while its rows stay bounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from jobs.job import JobStatus, JobSteps, QueueEvent, StepMetrics
from jobs.store.schema import events, jobs, sessions, step_metrics
from jobs.store.sessions import SessionTable, event_of, fence_holds

KEPT, SLACK = 512, 256


class StepMetricsTable(SessionTable):
    """The part of the queue that holds the metrics of steps."""

    def record_steps(
        self, session_id: str, fence: int, jobs_: Sequence[JobSteps], tokens_per_second: float | None = None
    ) -> bool:
        """Record what the jobs of a session have come to, with the metrics of their newest steps, and how fast it
        trains. What is there of these or later steps is replaced: it is of training that was lost.
        """
        with self._db.write() as conn:
            if not fence_holds(conn, (session_id, fence)):
                return False
            if tokens_per_second is not None:
                change = sa.update(sessions).where(sessions.c.id == session_id)
                conn.execute(change.values(tokens_per_second=tokens_per_second))
            for job in jobs_:
                self._record(conn, session_id, job)
            return True

    def step_metrics(self, job_id: str, after: int = 0) -> Sequence[StepMetrics]:
        """Return those of the steps after that one which are kept, oldest first."""
        query = sa.select(step_metrics).where(step_metrics.c.job_id == job_id, step_metrics.c.step > after)
        with self._db.read() as conn:
            return [_metrics_of(row) for row in conn.execute(query.order_by(step_metrics.c.step))]

    def history_page(
        self, job_id: str, limit: int, before: tuple[int, int] | None = None
    ) -> tuple[Sequence[QueueEvent | StepMetrics], bool]:
        """Return a job's events and the metrics of its steps, the newest first, and whether there are more. Each has
        the place (event, step), which for an event is its id and 0, and for a step the newest event before it and the
        step; `before` is such a place.
        """
        told = sa.select(events).where(events.c.subject == job_id)
        steps = sa.select(step_metrics).where(step_metrics.c.job_id == job_id)
        place = sa.tuple_(step_metrics.c.event_id, step_metrics.c.step)
        if before is not None:
            told = told.where(events.c.id < before[0] + (before[1] > 0))
            steps = steps.where(place < sa.tuple_(*map(sa.literal, before)))
        newest = step_metrics.c.event_id.desc(), step_metrics.c.step.desc()
        with self._db.read() as conn:
            found: list[QueueEvent | StepMetrics] = [
                event_of(row) for row in conn.execute(told.order_by(events.c.id.desc()).limit(limit + 1))
            ]
            found += [_metrics_of(row) for row in conn.execute(steps.order_by(*newest).limit(limit + 1))]
        found.sort(key=lambda one: one.place, reverse=True)
        return found[:limit], len(found) > limit

    def _record(self, conn: sa.Connection, session_id: str, job: JobSteps) -> None:
        """Record what one job has come to. The metrics of its last steps may come when it has ended here."""
        here = (jobs.c.id == job.job_id, jobs.c.session_id == session_id)
        values = {"progress": job.progress, "updated_at": self._clock()}
        conn.execute(sa.update(jobs).where(*here, jobs.c.status == JobStatus.RUNNING).values(values))
        if not job.steps or conn.execute(sa.select(jobs.c.id).where(*here)).first() is None:
            return
        own, first, last = step_metrics.c.job_id == job.job_id, job.steps[0].step, job.steps[-1].step
        conn.execute(sa.delete(step_metrics).where(own, step_metrics.c.step >= first))
        newest = sa.select(sa.func.coalesce(sa.func.max(events.c.id), 0)).where(events.c.subject == job.job_id)
        shared = {"job_id": job.job_id, "event_id": conn.execute(newest).scalar_one()}
        rows = [
            {"step": one.step, "at": one.at, "validated": "valid_loss" in one.figures, "figures": one.figures}
            for one in job.steps
        ]
        conn.execute(sa.insert(step_metrics), [shared | row for row in rows])
        if (first - 1) // SLACK != last // SLACK and last > KEPT:
            stride = 1 << (last // KEPT).bit_length()
            between = step_metrics.c.step > 1, step_metrics.c.step <= last - KEPT, step_metrics.c.step % stride != 0
            conn.execute(sa.delete(step_metrics).where(own, *between, sa.not_(step_metrics.c.validated)))


def _metrics_of(row: sa.Row[tuple[object, ...]]) -> StepMetrics:
    return StepMetrics(row.step, row.at, row.figures, row.event_id)
