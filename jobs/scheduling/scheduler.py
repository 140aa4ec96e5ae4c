"""The scheduler: a loop over SQL and Ray that anyone may kill at any moment.

    settle_sweeps() which trials of a sweep go on, once all of them are at a rung (sweeps.py)
    reconcile()     what the rows say against what Ray runs: end sessions that are gone, requeue their jobs
    account()       what each tenant had since the last time, now and then
    plan(...)       pure: which session to launch, which job goes where, which session has to make room (policy.py)
    act(...)        one guarded statement each; a launch is recorded before Ray is asked

Whoever holds the lease row of a cluster runs it; every write carries the lease, so a scheduler that was replaced
while it slept changes nothing. `submit` makes sure that there is one (`ensure_scheduler`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, start_http_server

from cluster.embedded_ray import OwnerLock, has_owner, start_embedded, stop_embedded
from cluster.ray_runtime import cluster_name, on_a_cluster
from cluster.settings import Settings
from cluster.storage.directory import open_storage
from jobs.errors import JobError
from jobs.job import (
    MAX_INFRASTRUCTURE_FAILURES,
    EventKind,
    FailureCode,
    Job,
    JobStatus,
    Lease,
    Session,
    SessionState,
    backoff_seconds,
    lease_name,
)
from jobs.published_adapters import sweep
from jobs.queue_snapshot import QueueSnapshot
from jobs.scheduling.fair_order import Rules, lines_to_write
from jobs.scheduling.launcher import (
    FORGOTTEN,
    Launcher,
    RayUnreachableError,
    SubmissionState,
    end_code,
    scheduler_id,
)
from jobs.scheduling.metrics import QueueCollector
from jobs.scheduling.policy import Action, Assign, Launch, Preempt, Stop, plan
from jobs.scheduling.room import Cluster
from jobs.scheduling.sweeps import settle_sweeps
from jobs.store.jobs import JobQueue

log = logging.getLogger("lora.scheduler")

STEP_SECONDS = 0.5
QUIET_SECONDS = 2.0
"""Between two rounds while no job waits: each asks Ray over HTTP, at twice a second a twentieth of a core."""
MAX_ATTEMPTS = 3  # at starting sessions for a job, or at training it in one that it may have ended
ACCOUNT_SECONDS = 5.0
"""Between two times that what tenants hold is written to what they had."""
FORGOTTEN_HALF_LIVES = 40
STEP_TOKENS = {True: 8192, False: 2048}
"""In the steps of its jobs with which a rank on a GPU, or on CPUs, is busy: the most that it computes at once
(`lora_core/training/memory/predictor.py`).
"""
SWEEP_SECONDS = 6 * 3600.0
"""Between two looks for what is old, which list all versions; the first is when a scheduler begins."""
SLOW_SECONDS = 30.0
"""A session's driver that is not up after this long is told of: on two busy cores it took 24 s."""


@dataclass
class Scheduler:
    """One cluster's scheduler while it holds the lease."""

    settings: Settings
    queue: JobQueue
    launcher: Launcher
    cluster: str
    lease: Lease
    told: dict[str, str] = field(default_factory=dict)
    """What the waiting jobs' histories say of why they wait: a reason is recorded once."""

    def step(self) -> bool:
        """Make one round; returns whether there is anything to do, now or soon."""
        self.queue.release_due(self.cluster, lease=self.lease)
        sweeps = settle_sweeps(self.queue, self.cluster, self.lease)
        snapshot = self.queue.snapshot(self.cluster)
        if self._reconcile(snapshot.sessions):
            snapshot = self.queue.snapshot(self.cluster)
        self._end_unwanted(snapshot)
        self._account(snapshot)
        why: dict[str, str] = {}
        if snapshot.queued:
            actions, why = plan(snapshot, self._size(), Rules.of(self.settings))
            for action in actions:
                self._act(action)
            slow = {one.session_key: reason for one in snapshot.sessions if (reason := self._slow_start(one))}
            late = [job for job in snapshot.queued if job.id in why and job.session_key in slow]
            why |= {job.id: slow[job.session_key] for job in late}
        self._tell(why)
        return bool(snapshot.queued or snapshot.running or snapshot.sessions or sweeps)

    def tell_of_trouble(self, reason: str) -> None:
        """Let whoever follows a waiting job know what keeps it from being started."""
        self._tell({job.id: f"waits: {reason}" for job in self.queue.snapshot(self.cluster).queued})

    def _size(self) -> Cluster:
        size = self.launcher.size()
        return Cluster(
            workers=max(size.workers, self.settings.max_workers or 0),
            jobs_per_session=self.settings.jobs_per_session,
            step_tokens=STEP_TOKENS[size.on_gpus],
        )

    def _end_unwanted(self, snapshot: QueueSnapshot) -> None:
        """End sessions that are being launched for jobs which do not wait any more: their drivers, which hold no
        workers yet, leave when they find that.
        """
        wanted = {job.session_key for job in snapshot.queued}
        launched = SessionState.LAUNCHING, SessionState.ENDED
        for session in snapshot.sessions:
            if session.launching and session.session_key not in wanted:
                reason = "nobody waits for it any more"
                ended = self.queue.session_move(session.id, *launched, reason=reason, lease=self.lease)
                log.info("session=%s event=not_wanted ended=%s", session.id, ended)

    def _account(self, snapshot: QueueSnapshot) -> None:
        half_life = self.settings.usage_half_life_seconds
        if lines := lines_to_write(snapshot, half_life, ACCOUNT_SECONDS):
            forgotten = snapshot.at - FORGOTTEN_HALF_LIVES * half_life
            self.queue.write_lines(self.cluster, lines, forgotten, lease=self.lease)

    def _tell(self, why: dict[str, str]) -> None:
        if new := {job_id: reason for job_id, reason in why.items() if self.told.get(job_id) != reason}:
            self.queue.tell(new, lease=self.lease)
        self.told.clear()
        self.told.update(why)

    def _slow_start(self, session: Session) -> str | None:
        """Return what Ray says of a session that it should have started by now."""
        if session.state is not SessionState.LAUNCHING or time.time() - session.created_at < SLOW_SECONDS:
            return None
        said = self.launcher.state(session.ray_submission_id).message
        return f"waits: Ray has not started its session for {SLOW_SECONDS:.0f} s{f' ({_brief(said)})' if said else ''}"

    def _reconcile(self, sessions: Sequence[Session]) -> bool:
        """Hold the rows against what Ray runs; returns whether any was changed."""
        changed = False
        for session in sessions:
            run = self.launcher.state(session.ray_submission_id)
            if run.state is SubmissionState.ABSENT and session.state is SessionState.LAUNCHING:
                self._launch(session)  # the row was written, then somebody died before Ray was asked
            elif run.state is SubmissionState.ENDED or (
                run.state is SubmissionState.ABSENT and self._lease_ran_out(session)
            ):
                # Ray's message ends with the driver's log; its last line is the error, the rest stays in Ray's log.
                last = [line for line in run.message.splitlines() if line.strip()][-1:]
                self._mark_ended(session, last[0].strip() if last else FORGOTTEN)
                changed = True
        for job in self.queue.without_session(self.cluster):
            self._requeue(job)
            changed = True
        return changed

    @staticmethod
    def _lease_ran_out(session: Session) -> bool:
        """Return whether a driver's sign of life is old: having outlived a head it may live unknown to Ray."""
        return session.lease_until is None or session.lease_until < time.time()

    def _mark_ended(self, session: Session, reason: str) -> None:
        """End a session that is gone. Jobs that wait for one that never came up count it: the third is the last."""
        log.warning("session=%s event=gone state=%s reason=%s", session.id, session.state, reason)
        ended = self.queue.session_move(session.id, session.state, SessionState.ENDED, reason=reason, lease=self.lease)
        if not ended or session.state is not SessionState.LAUNCHING:
            return
        for job_id, before in self.queue.waiting_for(self.cluster, session.session_key).items():
            if (count := before + 1) < MAX_ATTEMPTS:
                wait = backoff_seconds(count)
                message = f"its session could not start, the next one is tried in {wait:.0f} s: {reason}"
                self.queue.launch_failed(job_id, message, wait, lease=self.lease)
            else:
                message, code = f"its session could not start, {count} times: {reason}", FailureCode.NOT_STARTED
                self.queue.move(
                    job_id, JobStatus.QUEUED, JobStatus.FAILED, message=message, error=message, code=code,
                    lease=self.lease,
                )  # fmt: skip

    def _requeue(self, job: Job) -> None:
        """Put a running job whose session has ended back to the queue, or fail it when that was once too often. The
        last session that it may have ended is its own: of several jobs it would not be known whose fault it was.
        """
        session = self.queue.session(job.session_id) if job.session_id else None
        reason = (session.reason if session else None) or "its session ended"
        code = end_code(reason)
        infrastructure = code.is_of_infrastructure
        count = (job.infrastructure_failures if infrastructure else job.lost_attempts) + 1
        if count >= (MAX_INFRASTRUCTURE_FAILURES if infrastructure else MAX_ATTEMPTS):
            message = f"failed after {count} sessions ended under it; the last one: {reason}"
            moved = self.queue.move(
                job.id, JobStatus.RUNNING, JobStatus.FAILED, message=message, error=message, code=code, lease=self.lease
            )
        else:
            wait = backoff_seconds(count)
            moved = self.queue.move(
                job.id,
                JobStatus.RUNNING,
                JobStatus.QUEUED,
                message=f"back to the queue, to be tried again in {wait:.0f} s: {reason}",
                kind=EventKind.WAITS,
                code=code,
                lease=self.lease,
                retry_after=wait,
                max_colocated=0 if not infrastructure and count == MAX_ATTEMPTS - 1 else None,
            )
        log.warning("job=%s event=requeued code=%s count=%d moved=%s reason=%s", job.id, code, count, moved, reason)

    def _act(self, action: Action) -> None:
        match action:
            case Launch(session_key):
                session = self.queue.create_session(session_key, self.cluster, lease=self.lease)
                if session is not None:
                    self._launch(session)
            case Assign(job_id, session_id, level):
                assigned = self.queue.assign(job_id, session_id, level=level, lease=self.lease)
                log.info("job=%s event=assigned session=%s done=%s", job_id, session_id, assigned)
            case Stop(session_id, reason):
                self.queue.stop_session(session_id, reason, lease=self.lease)
                log.info("session=%s event=asked_to_stop reason=%s", session_id, reason)
            case Preempt(session_id, reason):
                self.queue.preempt_session(session_id, reason, lease=self.lease)
                log.info("session=%s event=asked_to_give_way reason=%s", session_id, reason)

    def _launch(self, session: Session) -> None:
        log.info("session=%s event=launch key=%s", session.id, session.session_key)
        self.launcher.launch_session(session.ray_submission_id, session.id, session.fence)


def run_scheduler(settings: Settings) -> None:
    """Schedule until there has been nothing to do for a while (`scheduler_idle_seconds`), or until told to stop.

    Off a cluster this process starts the embedded Ray and owns it: both end together.
    """
    stopped = threading.Event()
    owner = None if on_a_cluster() else OwnerLock(settings)
    if owner is not None:
        if not owner.acquire():
            log.info("event=not_needed reason=another process owns the embedded Ray of %s", settings.home)
            return
        stop_embedded(settings)  # what a killed owner left behind
    name = cluster_name(settings)
    if owner is not None:
        start_embedded(settings)
    # After ray.init(), which sets handlers of its own.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    log.info("event=started cluster=%s", name)
    try:
        _schedule(settings, name, owner, stopped)
    finally:
        if owner is not None:
            import ray

            ray.shutdown()
        log.info("event=ended cluster=%s", name)


def _schedule(settings: Settings, cluster: str, owner: OwnerLock | None, stopped: threading.Event) -> None:
    queue, launcher = JobQueue(settings.database_url), Launcher(settings.driver_labels)
    holder = f"{os.uname().nodename}:{os.getpid()}:{secrets.token_hex(4)}"
    if settings.metrics_port:
        registry = CollectorRegistry()
        registry.register(QueueCollector(queue, cluster))
        start_http_server(settings.metrics_port, registry=registry)
    busy, told, looked, swept = time.monotonic(), dict[str, str](), -math.inf, -math.inf
    quiet = min(QUIET_SECONDS, settings.lease_seconds / 3)
    while not stopped.wait(STEP_SECONDS):
        try:
            if time.monotonic() - looked < quiet and not queue.has_jobs(cluster, JobStatus.QUEUED):
                continue
            looked = time.monotonic()
            lease = queue.acquire_lease(lease_name(cluster), holder, settings.lease_seconds)
            if lease is None:  # somebody else schedules; stay as the one that takes over
                continue
            if time.monotonic() - swept > SWEEP_SECONDS:
                swept = time.monotonic()
                # Beside the rounds: a bucket may take longer to list than a lease lasts.
                threading.Thread(target=_sweep, args=(settings, queue), name="sweep", daemon=True).start()
            scheduler = Scheduler(settings, queue, launcher, cluster, lease, told)
            if run_step(scheduler) or (owner is not None and launcher.others_running()):
                busy = time.monotonic()
            if time.monotonic() - busy > settings.scheduler_idle_seconds:
                # First let go, then look once more: a submit in between sees that nobody schedules and starts a
                # scheduler.
                queue.release_lease(lease)
                if owner is not None:
                    owner.release()
                unfinished = queue.has_jobs(cluster, JobStatus.QUEUED, JobStatus.RUNNING)
                if not unfinished or (owner and not owner.acquire()):
                    return
                busy = time.monotonic()
        except RayUnreachableError as error:
            log.warning("event=ray_unreachable reason=%s", error)
        except Exception:
            log.exception("event=round_failed")  # the database, most likely; the rows are as they were


def _sweep(settings: Settings, queue: JobQueue) -> None:
    try:
        sweep(settings, queue, open_storage(settings.storage_url))
    except Exception:
        log.exception("event=sweep_failed")  # storage or database, most likely; the next one looks again


def run_step(scheduler: Scheduler) -> bool:
    """Run `Scheduler.step`, and tell its failure to those who wait. Where Ray does not answer, rows stay."""
    try:
        return scheduler.step()
    except RayUnreachableError as error:
        log.warning("event=ray_unreachable reason=%s", error)
        reason = str(error)
    except Exception as error:
        log.exception("event=step_failed")
        reason = f"the scheduler cannot go on: {error}"
    with contextlib.suppress(JobError):  # the database may be what has failed
        scheduler.tell_of_trouble(_brief(reason))
    return True


def _brief(text: str) -> str:
    """Return the beginning of what somebody else said, on one line."""
    return " ".join(text.split())[:300]


def ensure_scheduler(settings: Settings, queue: JobQueue) -> None:
    """Make sure that somebody schedules this cluster: a Ray job on a cluster, a detached process with its own Ray on a
    laptop.

    Two callers at once start one: on a cluster by the submission id, on a laptop by the owner's lock.
    """
    if on_a_cluster():
        lease = queue.lease(lease_name(cluster_name(settings)))
        if lease is None or not lease.valid:
            launcher, number = Launcher(settings.driver_labels), lease.token + 1 if lease else 1
            # One that has ended died before it took the lease.
            while launcher.state(scheduler_id(number)).state is SubmissionState.ENDED:
                number += 1
            launcher.launch_scheduler(scheduler_id(number))
        return
    if has_owner(settings):
        return
    logs = settings.home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # What is relative to this directory, as paths of bases may be, must mean the same there.
    environment = {**os.environ, "LORA_BASE_MODELS": json.dumps(settings.base_models)}
    with (logs / "scheduler.log").open("ab") as output:
        subprocess.Popen(
            [sys.executable, "-m", "jobs", "scheduler"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C in the shell that submits is not meant for it
        )
