"""A job that was checked goes into the queue: the same for the command line and the API."""

from __future__ import annotations

from cluster.ray_runtime import code_version
from cluster.settings import Settings
from jobs.admitted import Admitted
from jobs.job import ClientRequest, Job
from jobs.job_log import JobLogWriter
from jobs.spec import JobSpec
from jobs.store.jobs import JobQueue


def enqueue(
    queue: JobQueue,
    settings: Settings,
    spec: JobSpec,
    admitted: Admitted,
    *,
    cluster: str,
    tenant: str,
    again: bool = False,
    request: ClientRequest | None = None,
    most_unfinished: int | None = None,
) -> tuple[Job, bool]:
    """Return the job, and whether it is new (see `JobQueue.submit`). Raises TooManyJobsError, DependencyError,
    DatabaseUnavailableError, StorageError.
    """
    job, new = queue.submit(
        spec,
        cluster=cluster,
        base=settings.base_name(spec.base_model),
        dataset_sha=admitted.dataset_sha,
        validation_sha=admitted.validation_sha,
        examples_sha=admitted.examples_sha,
        init_adapter_sha=admitted.init_adapter_sha,
        forward_path=admitted.forward_path,
        step_tokens=admitted.rows.step_tokens,
        code_version=code_version(),
        tenant=tenant,
        again=again,
        request=request,
        most_unfinished=most_unfinished,
        most_queued=settings.quota(tenant).queued_jobs,
        trials=admitted.trials,
    )
    admitted.record(job)
    if new:
        found = JobLogWriter(admitted.storage, job.id, attempt=0)
        for line in admitted.summary:
            found.add(line)
        found.write(queue.events(job.id))
    return job, new
