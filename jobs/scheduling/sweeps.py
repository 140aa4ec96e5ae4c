"""Takes sweeps on: begins and ends them with their trials, and decides rungs at which these wait.

All that it goes by is in rows, so that whoever schedules next goes on where this one was lost.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from jobs.halving import decide
from jobs.job import FailureCode, Job, JobStatus, Lease
from jobs.store.jobs import JobQueue
from jobs.trials import Trial

log = logging.getLogger("lora.scheduler")


def settle_sweeps(queue: JobQueue, cluster: str, lease: Lease | None = None) -> bool:
    """Take every sweep of a cluster as far as its trials have come; returns whether there is one that goes on."""
    found = queue.open_sweeps(cluster)
    for sweep, trials in found:
        _settle(queue, sweep, trials, lease)
    return bool(found)


def _settle(queue: JobQueue, sweep: Job, trials: Sequence[Trial], lease: Lease | None) -> None:
    status, options = sweep.status, sweep.spec.sweep
    assert options is not None
    if status is JobStatus.QUEUED and any(trial.attempt for trial in trials):
        if not queue.begin_sweep(sweep.id, lease=lease):
            return
        status = JobStatus.RUNNING
    if all(trial.ended for trial in trials):
        _end(queue, sweep, status, trials, lease)
    elif sweep.requested is not None:
        if not any(trial.status is JobStatus.RUNNING for trial in trials):
            to = sweep.requested.status
            queue.move(sweep.id, status, to, message=f"{to} as requested", lease=lease)
    elif (decision := decide(options, trials)) is not None:
        settled = queue.settle_rung(sweep.id, decision, lease=lease)
        log.info("job=%s event=rung_decided rung=%d done=%s", sweep.id, decision.rung, settled)


def _end(queue: JobQueue, sweep: Job, status: JobStatus, trials: Sequence[Trial], lease: Lease | None) -> None:
    """End a sweep as its best trial has ended."""
    for trial in trials:
        if trial.status is JobStatus.SUCCEEDED:
            best = queue.get(trial.job_id)
            assert best.result is not None
            message = f"{trial} published {best.result['model']} version {best.result['version']}"
            queue.move(
                sweep.id, status, JobStatus.SUCCEEDED, message=message, result=best.result, progress=best.progress,
                lease=lease,
            )  # fmt: skip
            return
    if (failed := [trial for trial in trials if trial.status is JobStatus.FAILED]) and sweep.requested is None:
        last = queue.get(max(failed, key=lambda trial: trial.reached).job_id)
        error = f"{len(failed)} of its {len(trials)} trials failed and none is left; {last.id}: {last.error}"
        code = last.error_code or FailureCode.UNKNOWN
        queue.move(sweep.id, status, JobStatus.FAILED, message=error, error=error, code=code, lease=lease)
    else:
        queue.move(sweep.id, status, JobStatus.CANCELLED, message="all of its trials are cancelled", lease=lease)
