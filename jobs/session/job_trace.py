"""The trace of a job that ended in a session, from its submission on."""

from __future__ import annotations

from cluster.tracing import record_job
from jobs.job import Job


def trace_job(job: Job, published_from: float | None) -> None:
    """Record how long it waited, trained and was published."""
    ended = job.finished_at or job.updated_at
    started = job.started_at or ended
    parts = [("wait", job.created_at, started), ("train", started, published_from or ended)]
    if published_from is not None:
        parts.append(("publish", published_from, ended))
    attributes = {"tenant": job.tenant, "adapter": f"{job.base}:{job.spec.adapter}", "session": job.session_id or ""}
    record_job(job.id, job.created_at, ended, parts, job.error, status=str(job.status), **attributes)
