"""What controls a session: the thread of its driver with SQL and storage on one side, and the ranks' mailbox on the
other.

It renews the lease, tells the ranks which jobs to train, and writes what they report. Every write carries the fence, so
that a driver which was given up on, but lives, can neither commit nor publish.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.registry import AdapterRegistry
from cluster.settings import Settings
from cluster.storage.base import StorageError
from cluster.storage.directory import open_storage
from cluster.storage.keys import checkpoint_marker_key, checkpoints_prefix, committed_checkpoint, job_result_key
from jobs.duration import duration_text
from jobs.job import (
    MAX_INFRASTRUCTURE_FAILURES,
    TERMINAL,
    EventKind,
    FailureCode,
    Job,
    JobResult,
    JobStatus,
    RequestedAction,
    SessionState,
    backoff_seconds,
)
from jobs.job_log import JobLogWriter
from jobs.job_report import accuracy_line
from jobs.session.job_trace import trace_job
from jobs.session.messages import (
    AdapterKept,
    Assignment,
    CheckpointWritten,
    DesiredJobs,
    Evaluated,
    Expected,
    JobFailed,
    Message,
    NoRoom,
    RankBroke,
    RanksStarted,
    RungReached,
    StepsDone,
    Trained,
    start_mailbox,
)
from jobs.session.metrics import SessionMetrics
from jobs.store.jobs import JobQueue

log = logging.getLogger("lora.session")

RECONCILE_SECONDS = 0.5
SLOW_SECONDS = 60.0  # for the workers to start and load the base, after which whoever follows is told
KEPT_CHECKPOINTS = 2
LOG_SECONDS = 2.0  # between two pieces of a job's log
FIRST_JOB_SECONDS = 5.0
"""A session stays for so long at least until its first job comes, which a scheduler assigns once it is up."""
STOP_SECONDS = 3.0
"""Ranks without a job end within so long of being told to; where they do not, there is nothing to wait for."""


class SessionController:
    """The thread beside `fit()`: SQL and storage on one side, the mailbox on the other."""

    def __init__(self, settings: Settings, queue: JobQueue, session_id: str, fence: int) -> None:
        self._settings, self._queue = settings, queue
        self._session_id, self._fence = session_id, fence
        self._storage = open_storage(settings.storage_url)
        self._registry = AdapterRegistry(self._storage, settings.tenant)
        self.mailbox: Any = start_mailbox()
        self._metrics = SessionMetrics()
        self._known: dict[str, Assignment] = {}
        self._pending: list[Message] = []
        self._starts = 0
        self._began = time.monotonic()
        self._told: set[str] = set()
        self._logs: dict[tuple[str, int], JobLogWriter] = {}  # of a job and its attempt
        self._left: set[tuple[str, int]] = set()  # of those, the attempts that are over
        self._logged = 0.0
        self._busy = time.monotonic()
        self._had_jobs = self._stop = False
        self._stopped = 0.0
        self._renewed = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Take the last reports and end the thread."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            ended = self._ended.is_set()
            try:
                if self.round():
                    continue
            except Exception:  # SQL or storage may be away for a while; training goes on meanwhile
                log.exception("session=%s event=reconcile_failed", self._session_id)
                self._metrics.round_failed()
            if ended:
                return
            self._pause()

    def round(self) -> bool:
        """Make one round; returns whether the next one is to tell the ranks at once that they should end. Those that
        are still being started, or again, would hear of it late: the session then ends with this process.
        """
        before, self._stop = self._stop, self._reconcile(self._stop)
        if not self._stop:
            return False
        if not before:
            self._stopped = time.monotonic()
        if self._starts == 0 or time.monotonic() - self._stopped > STOP_SECONDS:
            ended = SessionState.STOPPING, SessionState.ENDED
            reason = "nothing to do; its ranks were not waited for"
            self._queue.session_move(self._session_id, *ended, reason=reason, fence=self._fence)
            log.info("session=%s event=ended reason=%s", self._session_id, reason)
            leave()
        return not before

    def _pause(self) -> None:
        """Wait for the next round, which the end of a job brings forward."""
        try:
            ray.get(self.mailbox.wait_for_end.remote(RECONCILE_SECONDS))
        except RayError:
            self._ended.wait(RECONCILE_SECONDS)

    def _reconcile(self, stop: bool) -> bool:
        """Make one round; returns whether the ranks should end."""
        self._renew()
        jobs = {job.id: job for job in self._queue.assigned(self._session_id)}
        self._metrics.show(jobs)
        late = {job.id for job in jobs.values() if job.requested is None and job.is_late(time.time())}
        staying = [job for job in jobs.values() if job.requested is None and job.id not in late]
        wanted = tuple(self._assignment(job) for job in staying)
        leaving = (RequestedAction.PAUSE, RequestedAction.REQUEUE)
        pausing = tuple(job.id for job in jobs.values() if job.requested in leaving)
        active, reports = ray.get(self.mailbox.exchange.remote(DesiredJobs(wanted, stop, pausing)))
        self._pending += reports
        while self._pending:  # one that cannot be recorded now, since SQL or storage is away, is tried again next time
            self._record(self._pending[0])
            del self._pending[0]
        if self._starts == 0 and time.monotonic() - self._began > SLOW_SECONDS:
            self._tell_of_slow_start(jobs)
        gone = [job for job in jobs.values() if (job.requested or job.id in late) and job.id not in active]
        for job in gone:
            if job.requested is not None:
                self._move(job.id, job.requested.status, f"{job.requested.status} while running")
            else:
                self._end_late(job)
        if self._left or time.monotonic() - self._logged > LOG_SECONDS:
            try:
                self._write_logs()
            except Exception:  # storage, most likely: the next time
                log.exception("session=%s event=logs_not_written", self._session_id)
        if jobs:
            self._busy, self._had_jobs = time.monotonic(), True
        if len(jobs) == len(gone) and not stop and (self._asked_to_stop() or self._idle_for_too_long()):
            # In one transaction with the look for jobs: one that is just being assigned keeps the session.
            stop = self._queue.session_move(
                self._session_id,
                SessionState.RUNNING,
                SessionState.STOPPING,
                reason="nothing to do",
                fence=self._fence,
                only_idle=True,
            )
        return stop

    def _renew(self) -> None:
        if time.monotonic() - self._renewed < self._settings.lease_seconds / 3:
            return
        if not self._queue.renew_session(self._session_id, self._fence, self._settings.lease_seconds):
            log.error("session=%s event=fenced_off fence=%d", self._session_id, self._fence)
            os.kill(os.getpid(), signal.SIGINT)
            self._ended.set()
        self._renewed = time.monotonic()

    def _asked_to_stop(self) -> bool:
        session = self._queue.session(self._session_id)
        return session is not None and session.requested == "stop"

    def _idle_for_too_long(self) -> bool:
        allowed = self._settings.session_idle_seconds
        return time.monotonic() - self._busy >= (allowed if self._had_jobs else max(allowed, FIRST_JOB_SECONDS))

    def _assignment(self, job: Job) -> Assignment:
        """Return what the ranks need; the checkpoint is looked up once, and known from reports afterwards."""
        if job.id not in self._known:
            commits = self._commits(job.id)
            newest: dict[str, str] = json.loads(self._storage.get(commits[-1][1])) if commits else {}
            trial = self._queue.trial(job)
            self._logs[job.id, job.attempt] = JobLogWriter(self._storage, job.id, job.attempt)
            self._known[job.id] = Assignment(
                job.id,
                job.attempt,
                job.spec_json,
                job.examples_sha,
                job.init_adapter_sha,
                newest.get("key"),
                newest.get("sha256"),
                None if trial is None else trial.until_step,
            )
        return self._known[job.id]

    def _commits(self, job_id: str) -> list[tuple[tuple[int, int], str]]:
        """List ((attempt, step), marker's key) of every committed checkpoint, oldest first."""
        keys = self._storage.list(checkpoints_prefix(job_id))
        return sorted((index, key) for key in keys if (index := committed_checkpoint(key)) is not None)

    def _record(self, report: Message) -> None:
        match report:
            case StepsDone(jobs, tokens_per_second):
                self._queue.record_steps(self._session_id, self._fence, jobs, tokens_per_second)
            case Expected(job_id, seconds):
                self._queue.log(job_id, f"training takes about {max(1, round(seconds / 60))} min here, if it is alone")
            case Evaluated(job_id, evaluation, stopped):
                self._tell_of_evaluation(job_id, evaluation, stopped)
            case RanksStarted():
                self._queue.resolve_session(self._session_id, self._fence, asdict(report))
                self._starts += 1
                if self._starts > 1:
                    self._tell_of_restart()
            case CheckpointWritten():
                self._commit(report)
            case AdapterKept():
                self._keep(report)
            case Trained():
                self._publish(report)
            case RungReached(job_id, step, loss):
                message = f"waits for the other trials after step {step}: validation loss {loss:.4f}"
                self._move(job_id, JobStatus.PAUSED, message, kind=EventKind.WAITS, rung_loss=loss)
            case JobFailed(job_id, reason, trace, code):
                self._add_to_log(job_id, trace)
                self._fail(job_id, reason, code)
            case NoRoom(job_id, others):
                message = f"waits: it does not fit into memory beside {others} other{'s' * (others > 1)}"
                self._move(job_id, JobStatus.QUEUED, message, kind=EventKind.WAITS, max_colocated=others - 1)
            case RankBroke(rank, reason, active, trace, code):
                suspects = active or tuple(self._known)
                if len(suspects) == 1:  # else it may be a neighbour's
                    self._add_to_log(suspects[0], trace)
                self._blame(suspects, f"rank {rank}: {reason}", code)

    def _write_logs(self) -> None:
        """Copy what is new in the histories of the jobs that are here, or were, to their logs."""
        self._logged = time.monotonic()
        for (job_id, attempt), writer in list(self._logs.items()):
            writer.write(self._queue.events(job_id, after=writer.copied))
            if (job_id, attempt) in self._left:
                self._left.discard((job_id, attempt))
                del self._logs[job_id, attempt]

    def _add_to_log(self, job_id: str, trace: str | None) -> None:
        if trace is not None and (known := self._known.get(job_id)) is not None:
            self._logs[job_id, known.attempt].add(trace.rstrip(), level="error")

    def _tell_of_evaluation(self, job_id: str, evaluation: dict[str, Any], stopped: str | None) -> None:
        message = f"step {evaluation['step']}: validation loss {evaluation['loss']:.4f}"
        message += f", {accuracy_line(evaluation['accuracy'], evaluation['margin'])}{f'; {stopped}' if stopped else ''}"
        if job_id in self._known:
            self._queue.log(job_id, message, kind=EventKind.EVALUATION, data=evaluation)

    def _tell_of_slow_start(self, jobs: Iterable[str]) -> None:
        for job_id in jobs:
            if job_id not in self._told:
                message = (
                    f"its workers are not up after {SLOW_SECONDS:.0f} s: a large base takes long to load; else Ray"
                )
                self._queue.log(job_id, f"{message} has no room for them, and `ray status` says who has it")
                self._told.add(job_id)

    def _tell_of_restart(self) -> None:
        for job_id, known in self._known.items():
            message = f"a rank was lost; all of them continue from {known.checkpoint_key or 'the start'}"
            self._queue.log(job_id, message, level="warning")

    def _commit(self, report: CheckpointWritten) -> None:
        """Write the marker that makes a checkpoint exist, if the fence is still ours; keep the newest few."""
        known = self._known.get(report.job_id)
        if known is None or not self._runs_here(report.job_id):
            if self._queue.get(report.job_id).status in TERMINAL:  # it was on its way when the job ended
                self._storage.delete(report.key)
            return
        marker = checkpoint_marker_key(report.job_id, known.attempt, report.step)
        self._storage.put(marker, json.dumps({"key": report.key, "sha256": report.sha256}).encode())
        self._known[report.job_id] = replace(known, checkpoint_key=report.key, checkpoint_sha256=report.sha256)
        self._metrics.committed(report.job_id)
        log.info("job=%s event=checkpoint step=%d", report.job_id, report.step)
        self._logs[report.job_id, known.attempt].add(f"checkpoint of step {report.step}")
        self._drop_old_checkpoints(report.job_id)

    def _drop_old_checkpoints(self, job_id: str) -> None:
        for _, marker in self._commits(job_id)[:-KEPT_CHECKPOINTS]:
            commit = json.loads(self._storage.get(marker))
            self._storage.delete(marker)
            self._storage.delete(commit["key"])

    def _keep(self, report: AdapterKept) -> None:
        """Write a version that no alias means, and tell of it once: of a step that is made again it comes again."""
        if not self._runs_here(report.job_id):
            return
        job, metrics = self._queue.get(report.job_id), report.manifest["metrics"]
        manifest = {**report.manifest, "dataset_sha256": job.dataset_sha}
        version = self._registry.of(job.tenant).keep(job.base, job.spec.adapter, report.files, manifest)
        told, _ = self._queue.checkpoints_page(job.id, 1)
        if not told or (told[0].data or {})["metrics"]["step"] < metrics["step"]:
            data = {"model": str(version), "metrics": metrics}
            self._queue.log(job.id, f"checkpoint {version}", kind=EventKind.CHECKPOINT, data=data)

    def _publish(self, report: Trained) -> None:
        """Write adapter, result and row; after a crash in between, the last checkpoint leads to the same."""
        if not self._runs_here(report.job_id):
            return
        began = time.time()
        job = self._queue.get(report.job_id)
        manifest = {**report.manifest, "dataset_sha256": job.dataset_sha, **self._lineage(job)}
        version = self._registry.of(job.tenant).publish(job.base, job.spec.adapter, report.files, manifest)
        result: JobResult = {
            "model": f"{job.base}:{job.spec.adapter}",
            "version": version.version,
            "number": version.number,
            "digest": version.digest,
            "adapter_bytes": sum(len(content) for content in report.files.values()),
            "metrics": report.manifest["metrics"],
        }
        self._storage.put(job_result_key(job.id), json.dumps(result).encode())
        self._queue.progress(job.id, self._session_id, self._fence, report.progress)
        self._move(
            job.id, JobStatus.SUCCEEDED, f"published {result['model']} version {version.version}", began, result=result
        )

    def _lineage(self, job: Job) -> dict[str, Any]:
        """Return what the manifest of a trial says of its sweep: what was tried, and what was the best of that."""
        if (trial := self._queue.trial(job)) is None:
            return {}
        options = self._queue.get(trial.sweep_id).spec.sweep
        assert options is not None
        tried = options.model_dump(mode="json", exclude_none=True)
        return {"sweep": {"job": trial.sweep_id, "tried": tried, "trial": trial.number, "best": trial.parameters}}

    def _fail(self, job_id: str, reason: str, code: FailureCode) -> None:
        """End a job that cannot go on; what no job can have caused is tried again, later and so many times."""
        count = self._queue.get(job_id).infrastructure_failures + 1
        if not code.is_of_infrastructure or count >= MAX_INFRASTRUCTURE_FAILURES:
            self._move(job_id, JobStatus.FAILED, reason, error=reason, code=code)
            return
        wait = backoff_seconds(count)
        message = f"back to the queue, to be tried again in {wait:.0f} s: {reason}"
        self._move(job_id, JobStatus.QUEUED, message, kind=EventKind.WAITS, code=code, retry_after=wait)

    def _end_late(self, job: Job) -> None:
        """End a job that has run for too long, and that the ranks have let go between two steps."""
        step = f"at step {job.progress['step']} of {job.progress['steps']}" if job.progress else "before its first step"
        reason = f"its time limit of {duration_text(job.time_limit)} was over {step}"
        self._move(job.id, JobStatus.FAILED, reason, error=reason, code=FailureCode.TIME_LIMIT)

    def _blame(self, suspects: Iterable[str], reason: str, code: FailureCode) -> None:
        """Of those whose rank raised, fail the only one, or requeue several, each to be tried by itself."""
        suspects = list(suspects)
        for job_id in suspects:
            if len(suspects) == 1:
                self._fail(job_id, reason, code)
            else:
                message = f"back to the queue, to be tried by itself: {reason}"
                self._move(job_id, JobStatus.QUEUED, message, code=code, retry_after=0.0, max_colocated=0)

    def _runs_here(self, job_id: str) -> bool:
        """Return whether the job is still ours: asked right before something that others will see is written."""
        holds = self._queue.renew_session(self._session_id, self._fence, self._settings.lease_seconds)
        return holds and any(job.id == job_id for job in self._queue.assigned(self._session_id))

    def _move(
        self, job_id: str, to: JobStatus, message: str, published_from: float | None = None, **columns: Any
    ) -> None:
        moved = self._queue.move(
            job_id, JobStatus.RUNNING, to, message=message, fence=(self._session_id, self._fence), **columns
        )
        log.info("job=%s event=%s moved=%s message=%s", job_id, to.value, moved, message)
        if (known := self._known.pop(job_id, None)) is not None:
            self._left.add((job_id, known.attempt))
        if moved and to in TERMINAL:
            trace_job(self._queue.get(job_id), published_from)
            try:
                for key in self._storage.list(checkpoints_prefix(job_id)):
                    self._storage.delete(key)
            except StorageError:  # the job has ended all the same
                log.warning("job=%s event=checkpoints_left", job_id)


def leave() -> None:
    """End this process, whose main thread waits for Ray Train; all that it has of Ray's goes with it."""
    os._exit(0)
