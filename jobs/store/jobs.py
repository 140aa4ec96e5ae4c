"""The queue: jobs and their history.

Rules that hold for all of them:

- A state changes only by `UPDATE ... WHERE id = ? AND status = ?` whose row count is checked, with its event in the
  same transaction: of two racing movers one wins and the other is told. A final state is never overwritten.
- A write may carry the scheduler's `lease` or a session's `fence` (`sessions.py`): an outdated one changes nothing.
- No method tells the time by itself: the clock is given.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from jobs.duration import duration_text
from jobs.errors import DependencyError, IllegalTransitionError, JobNotFoundError, TooManyJobsError
from jobs.halving import Decision
from jobs.job import (
    TERMINAL,
    TRANSITIONS,
    ClientRequest,
    EventKind,
    FailureCode,
    Job,
    JobProgress,
    JobResult,
    JobStatus,
    Lease,
    QueueEvent,
    RequestedAction,
    SessionState,
)
from jobs.spec import JobSpec
from jobs.store import dependencies
from jobs.store.finished import FinishedJobs
from jobs.store.lines import LineTable, mark_served
from jobs.store.pages import NO_TRIAL, JobPages, job_of
from jobs.store.schema import events, jobs
from jobs.store.sessions import Fence, event_of, fence_holds, lease_holds, locked_session
from jobs.store.trials import HELD, TrialTable, add_trials, come_to_rung, place_trials, unfinished_trials
from jobs.store.webhooks import add_deliveries
from jobs.trials import NewTrial

SUBMIT_LOCK = 0x4C6F5242  # any number that no other user of the same PostgreSQL database takes for advisory locks


class JobQueue(JobPages, LineTable, TrialTable, FinishedJobs):
    """The queue in one database. Any number of processes and threads may use it at once; each process opens its own.

    Methods that write raise DatabaseUnavailableError when the outcome is unknown. Where they answer with a bool,
    False means that the row was not as expected, or that the lease or fence was no longer valid: then nothing was
    changed.
    """

    def submit(
        self,
        spec: JobSpec,
        *,
        cluster: str,
        base: str,
        dataset_sha: str,
        code_version: str,
        validation_sha: str | None = None,
        examples_sha: str | None = None,
        init_adapter_sha: str | None = None,
        forward_path: str | None = None,
        step_tokens: int | None = None,
        tenant: str = "default",
        status: JobStatus = JobStatus.QUEUED,
        again: bool = False,
        request: ClientRequest | None = None,
        most_unfinished: int | None = None,
        most_queued: int | None = None,
        trials: Sequence[NewTrial] = (),
    ) -> tuple[Job, bool]:
        """Return a job for `spec`, and whether it is new. The same content gives the same job, however often and from
        however many processes it is sent, unless that job failed or was cancelled, or `again` asks for another one. A
        waiting job takes the priority and time limit of its newest submission. `base` is the short name in
        "<base>:<adapter>". What a client of the API sends is the same job only as its `request` says. A sweep comes
        with its `trials`.

        Raises TooManyJobsError where a new job would be one more unfinished job of the tenant than `most_unfinished`,
        or one more that waits on this cluster than `most_queued`, and DependencyError where it cannot wait for what it
        depends on.
        """
        assert status in (JobStatus.QUEUED, JobStatus.VALIDATING_FILES) and bool(trials) == (spec.sweep is not None)
        now, job_id = self._clock(), f"job-{secrets.token_hex(6)}"
        row = {
            "id": job_id,
            "tenant": tenant,
            "cluster": cluster,
            "status": status,
            "priority": spec.priority,
            "spec_json": spec.canonical_json(),
            "base": base,
            "base_model": spec.base_model,
            "precision": spec.precision,
            "forward_path": forward_path,
            "num_workers": spec.num_workers,
            "step_tokens": step_tokens,
            "time_limit": spec.time_limit,
            "content_key": spec.content_key(dataset_sha, validation_sha, init_adapter_sha),
            "copy": self._copy(job_id, now, again, request),
            "code_version": code_version,
            "dataset_sha": dataset_sha,
            "validation_sha": validation_sha,
            "examples_sha": examples_sha,
            "init_adapter_sha": init_adapter_sha,
            "created_at": now,
            "updated_at": now,
            "attempt": 0,
            "metadata": spec.metadata or None,
            "sweep_id": job_id if trials else None,
        }
        if request is not None:
            row |= {"client_request": request.document, "metadata": request.metadata}
            row |= {"idempotency_key": request.idempotency_key}
        limits = most_unfinished, most_queued
        try:
            return self._insert_or_find(row, spec, again, request, limits, trials)
        except sa.exc.IntegrityError:
            # Another process inserted the same content after our look: now it is there to be seen.
            return self._insert_or_find(row, spec, again, request, limits, trials)

    @staticmethod
    def _copy(job_id: str, now: float, again: bool, request: ClientRequest | None) -> str:
        """Return what keeps jobs of the same content apart."""
        if again or (request is not None and request.idempotency_key is not None):
            return job_id
        # Of one window at most one: whoever comes in it while another inserts finds that.
        return "" if request is None else f"window-{int(now // request.window)}-{request.digest}"

    def dependency_problems(self, tenant: str, ids: Sequence[str]) -> list[str]:
        """Say what keeps a tenant's job from waiting for those of these ids."""
        try:
            with self._db.read() as conn:
                dependencies.unmet(conn, tenant, ids)
        except DependencyError as error:
            return error.problems
        return []

    def get(self, id_or_prefix: str) -> Job:
        """Return the only job whose id starts so, with or without "job-"; a sweep, rather than its trials, whose ids
        start with its own and a "-". Raises JobNotFoundError.
        """
        wanted = f"job-{id_or_prefix.removeprefix('job-')}"
        query = sa.select(jobs).where(jobs.c.id.startswith(wanted, autoescape=True))
        if wanted.count("-") == 1:
            query = query.where(NO_TRIAL)
        with self._db.read() as conn:
            found = [job_of(row) for row in conn.execute(query.order_by(jobs.c.id).limit(6))]
        if found and found[0].id == wanted:
            return found[0]
        if len(found) != 1:
            raise JobNotFoundError(id_or_prefix, [job.id for job in found])
        return found[0]

    def list(self, cluster: str | None = None, statuses: Collection[JobStatus] | None = None) -> Sequence[Job]:
        """List jobs, oldest first."""
        query = sa.select(jobs).order_by(jobs.c.created_at, jobs.c.id)
        if cluster is not None:
            query = query.where(jobs.c.cluster == cluster)
        if statuses is not None:
            query = query.where(jobs.c.status.in_(sorted(statuses)))
        with self._db.read() as conn:
            return [job_of(row) for row in conn.execute(query)]

    def counts(self, cluster: str) -> dict[JobStatus, int]:
        """Return how many jobs of a cluster are in each state, zeros included."""
        query = sa.select(jobs.c.status, sa.func.count()).where(jobs.c.cluster == cluster).group_by(jobs.c.status)
        with self._db.read() as conn:
            found = {JobStatus(status): int(number) for status, number in conn.execute(query)}
        return {status: found.get(status, 0) for status in JobStatus}

    def events(self, subject: str, after: int = 0) -> Sequence[QueueEvent]:
        """Return the history of a job or session from the event `after` on, oldest first. Within a subject ids grow in
        the order in which events become visible, so that a reader who remembers the last one misses none.
        """
        query = sa.select(events).where(events.c.subject == subject, events.c.id > after).order_by(events.c.id)
        with self._db.read() as conn:
            return [event_of(row) for row in conn.execute(query)]

    def log(
        self,
        job_id: str,
        message: str,
        *,
        level: str = "info",
        kind: EventKind = EventKind.NOTE,
        data: dict[str, Any] | None = None,
        lease: Lease | None = None,
    ) -> None:
        """Add a line to a job's history without changing the job."""
        with self._db.write() as conn:
            if lease_holds(conn, lease):
                self._locked_job(conn, job_id)
                self._event(conn, job_id, message, level, kind, data)

    def assign(self, job_id: str, session_id: str, *, level: int | None = None, lease: Lease | None = None) -> bool:
        """Begin a queued job's next attempt in a session that is running and not asked to stop. `level`: see `Job`."""
        with self._db.write() as conn:
            if not lease_holds(conn, lease):
                return False
            session = locked_session(conn, session_id)
            if session is None or session.state is not SessionState.RUNNING or session.requested is not None:
                return False
            values: dict[str, Any] = {"session_id": session_id, "level": level}
            if session.resolved_precision is not None:
                values["precision"] = session.resolved_precision
            of_line = (jobs.c.cluster, jobs.c.tenant, jobs.c.priority, jobs.c.created_at)
            job = conn.execute(sa.select(*of_line).where(jobs.c.id == job_id)).one_or_none()
            message = f"assigned to {session_id}"
            if job is None or not self._move(conn, job_id, JobStatus.QUEUED, JobStatus.RUNNING, message, values):
                return False
            mark_served(conn, tuple(job), self._clock())
            return True

    def preempt_session(self, session_id: str, reason: str, *, lease: Lease | None = None) -> bool:
        """Ask a running session to stop, and its jobs to go back to the queue, once where they are is written; what a
        user asks of them counts more.
        """
        with self._db.write() as conn:
            if not lease_holds(conn, lease):
                return False
            session = locked_session(conn, session_id)
            if session is None or session.state is not SessionState.RUNNING or session.requested is not None:
                return False
            self._change_session(conn, session, reason, {"requested": "stop"}, "asked to give way")
            inside = (jobs.c.session_id == session_id, jobs.c.status == JobStatus.RUNNING, jobs.c.requested.is_(None))
            for job_id in conn.execute(sa.select(jobs.c.id).where(*inside).with_for_update()).scalars().all():
                values = {"requested": RequestedAction.REQUEUE, "updated_at": self._clock()}
                conn.execute(sa.update(jobs).where(jobs.c.id == job_id).values(values))
                self._event(conn, job_id, "asked to give way to a job of a higher priority")
            return True

    def move(
        self,
        job_id: str,
        from_: JobStatus,
        to: JobStatus,
        *,
        message: str,
        fence: Fence | None = None,
        lease: Lease | None = None,
        error: str | None = None,
        code: FailureCode | None = None,
        result: JobResult | None = None,
        progress: JobProgress | None = None,
        max_colocated: int | None = None,
        rung_loss: float | None = None,
        retry_after: float | None = None,
        kind: EventKind = EventKind.NOTE,
        data: dict[str, Any] | None = None,
    ) -> bool:
        """Change a job's state, if it still is `from_`, and record its `error`, `result`, `progress` or `max_colocated`
        with it; of a trial that has come to its rung, the validation loss there.
        With `retry_after` the attempt that ends so has failed, for the reason `code`, and the next one waits for so
        many seconds. `to` is any state but running (see `assign`); a running job that
        is put back to queued or is paused, but is asked to be something else, becomes that. Raises
        IllegalTransitionError."""
        assert to is not JobStatus.RUNNING, "assign() names the session that runs the job"
        with self._db.write() as conn:
            if not lease_holds(conn, lease) or not fence_holds(conn, fence):
                return False
            if from_ is JobStatus.RUNNING and to in (JobStatus.QUEUED, JobStatus.PAUSED):
                job = self._locked_job(conn, job_id)
                if job.requested is not None and job.requested.status is not to:
                    to, message = job.requested.status, f"{message}; {job.requested.status} as requested"
            given = {"error": error, "result": result, "progress": progress, "max_colocated": max_colocated}
            values: dict[str, Any] = {column: value for column, value in given.items() if value is not None}
            if code is not None:
                values |= {"error_code": code} if to is JobStatus.FAILED else {}
                data = {"code": code} | (data or {})
            if retry_after is not None:
                infrastructure = code is not None and code.is_of_infrastructure
                counted = jobs.c.infrastructure_failures if infrastructure else jobs.c.lost_attempts
                values |= {counted.name: counted + 1, "not_before": self._clock() + retry_after}
            moved = self._move(conn, job_id, from_, to, message, values, fence, kind, data)
            if moved and rung_loss is not None:
                come_to_rung(conn, job_id, rung_loss)
            return moved

    def begin_sweep(self, sweep_id: str, *, lease: Lease | None = None) -> bool:
        """Record that the first trial of a sweep that waits has been started."""
        values = {"session_id": sweep_id, "not_before": None}
        with self._db.write() as conn:
            return lease_holds(conn, lease) and self._move(
                conn, sweep_id, JobStatus.QUEUED, JobStatus.RUNNING, "its first trial was started", values
            )

    def settle_rung(self, sweep_id: str, decision: Decision, *, lease: Lease | None = None) -> bool:
        """Let the best trials of a rung go on, and end the others; not where the sweep itself is to pause or end."""
        with self._db.write() as conn:
            if not lease_holds(conn, lease):
                return False
            sweep = self._locked_job(conn, sweep_id)
            if sweep.status is not JobStatus.RUNNING or sweep.requested is not None:
                return False
            place_trials(conn, decision)
            for place, trial in enumerate(decision.trials, 1):
                to = JobStatus.QUEUED if place <= decision.going else JobStatus.CANCELLED
                self._move(conn, trial.job_id, JobStatus.PAUSED, to, decision.message_of(place), {})
            self._event(conn, sweep_id, decision.message())
            return True

    def progress(self, job_id: str, session_id: str, fence: int, progress: JobProgress) -> bool:
        """Replace the figures of a running job."""
        change = (
            sa.update(jobs)
            .where(jobs.c.id == job_id, jobs.c.status == JobStatus.RUNNING, jobs.c.session_id == session_id)
            .values(progress=progress, updated_at=self._clock())
        )
        with self._db.write() as conn:
            return fence_holds(conn, (session_id, fence)) and conn.execute(change).rowcount == 1

    def request(self, job_id: str, action: RequestedAction) -> Job:
        """Cancel or pause a job: at once where it waits, else by its session, which reads the request between two
        steps; a sweep with all of its trials. A request to cancel replaces one to pause, never the other way. Raises
        IllegalTransitionError for a job that has ended."""
        with self._db.write() as conn:
            sweep = self._locked_job(conn, job_id)
            for job in (*unfinished_trials(conn, sweep), sweep):
                if job.status is not JobStatus.RUNNING:
                    if job.status is not action.status:
                        self._move(conn, job.id, job.status, action.status, f"{action.status} on request", {})
                elif job.requested in (None, RequestedAction.REQUEUE) or action is RequestedAction.CANCEL:
                    values = {"requested": action, "updated_at": self._clock()}
                    conn.execute(sa.update(jobs).where(jobs.c.id == job.id).values(values))
                    self._event(conn, job.id, f"asked to {action}")
            return self._locked_job(conn, job_id)

    def resume(self, job_id: str) -> Job:
        """Put a paused job back into the queue, a sweep with its trials; of one that was only asked to pause, take that
        back. Others are left as they are. Raises IllegalTransitionError for a job that has ended."""
        with self._db.write() as conn:
            sweep = self._locked_job(conn, job_id)
            for job in (*unfinished_trials(conn, sweep, at_rungs=False), sweep):
                if job.status is JobStatus.PAUSED or job.status in TERMINAL:
                    held = HELD if job.is_sweep else {}
                    self._move(conn, job.id, job.status, JobStatus.QUEUED, "resumed on request", held)
                elif job.requested is RequestedAction.PAUSE:
                    conn.execute(sa.update(jobs).where(jobs.c.id == job.id).values(requested=None))
                    self._event(conn, job.id, "asked to go on")
            return self._locked_job(conn, job_id)

    def assigned(self, session_id: str) -> Sequence[Job]:
        """Return the jobs that run in a session, in the order of their submission."""
        query = sa.select(jobs).where(jobs.c.session_id == session_id, jobs.c.status == JobStatus.RUNNING)
        with self._db.read() as conn:
            return [job_of(row) for row in conn.execute(query.order_by(jobs.c.created_at, jobs.c.id))]

    def _move(
        self,
        conn: sa.Connection,
        job_id: str,
        from_: JobStatus,
        to: JobStatus,
        message: str,
        values: dict[str, Any],
        fence: Fence | None = None,
        kind: EventKind = EventKind.NOTE,
        data: dict[str, Any] | None = None,
    ) -> bool:
        """Run the one statement that changes a job's status."""
        if to not in TRANSITIONS[from_]:
            raise IllegalTransitionError(job_id, from_, to)
        now = self._clock()
        values = values | {"status": to, "updated_at": now, "requested": None}
        if from_ is JobStatus.RUNNING:
            values |= {"run_seconds": jobs.c.run_seconds + (now - sa.func.coalesce(jobs.c.attempt_at, now))}
        if to is JobStatus.RUNNING:
            values |= {"attempt": jobs.c.attempt + 1, "attempt_at": now}
            values |= {"started_at": sa.func.coalesce(jobs.c.started_at, now)}
        elif to in TERMINAL:
            values |= {"finished_at": now}
        else:
            values |= {"session_id": None}
        change = sa.update(jobs).where(jobs.c.id == job_id, jobs.c.status == from_)
        if fence is not None:
            change = change.where(jobs.c.session_id == fence[0])
        if conn.execute(change.values(values)).rowcount != 1:
            return False
        level = "error" if to is JobStatus.FAILED else "info"
        self._event(conn, job_id, message, level, kind, {"from": from_, "to": to} | (data or {}))
        if to in TERMINAL:
            add_deliveries(conn, job_id, to, now)
            self._tell_dependents(conn, job_id, to, values.get("error"))
        return True

    def _tell_dependents(self, conn: sa.Connection, job_id: str, ended: JobStatus, error: str | None) -> None:
        """Let what waits for a job that has ended go on, or fail with it."""
        if ended is JobStatus.SUCCEEDED:
            for waiting, why in dependencies.release(conn, job_id, self._clock()):
                self._event(conn, waiting, why, kind=EventKind.WAITS)
            return
        how = "was cancelled" if ended is JobStatus.CANCELLED else f"failed{f': {error}' if error else ''}"
        reason = f"it depends on {job_id}, which {how}"
        failed = {"error": reason, "error_code": FailureCode.DEPENDENCY}
        for waiting, status in dependencies.take_dependents(conn, job_id):
            self._move(conn, waiting, status, JobStatus.FAILED, reason, failed, data={"code": FailureCode.DEPENDENCY})

    def _locked_job(self, conn: sa.Connection, job_id: str) -> Job:
        row = conn.execute(sa.select(jobs).where(jobs.c.id == job_id).with_for_update()).one_or_none()
        if row is None:
            raise JobNotFoundError(job_id, [])
        return job_of(row)

    def _insert_or_find(
        self,
        row: dict[str, Any],
        spec: JobSpec,
        again: bool,
        request: ClientRequest | None,
        limits: tuple[int | None, int | None],
        trials: Sequence[NewTrial],
    ) -> tuple[Job, bool]:
        """Return the newest job with the content of `row` that has not failed or been cancelled, else a new one; what
        counts of a client's request is its key, or what it was and when.
        """
        same = [jobs.c[name] == row[name] for name in ("tenant", "cluster", "content_key")]
        same.append(jobs.c.status.not_in([JobStatus.FAILED, JobStatus.CANCELLED]))
        if request is not None and request.idempotency_key is not None:
            same = [jobs.c[name] == row[name] for name in ("tenant", "idempotency_key")]
        elif request is not None:
            same.append(jobs.c.created_at > row["created_at"] - request.window)
            same.append(jobs.c.copy.endswith(f"-{request.digest}"))
        twins = sa.select(jobs).where(*same)
        with self._db.write() as conn:
            if limits != (None, None) and conn.dialect.name == "postgresql":
                # Before the look for a twin: until this transaction ends nobody else adds to what is counted below.
                own = sa.func.pg_advisory_xact_lock(SUBMIT_LOCK, sa.func.hashtext(row["tenant"]))
                conn.execute(sa.select(own))
            twin = conn.execute(twins.order_by(jobs.c.created_at.desc(), jobs.c.id).limit(1).with_for_update()).first()
            if twin is not None and request is not None:
                return job_of(twin), False
            if twin is not None and not again:
                return self._as_last_submitted(conn, job_of(twin), spec), False
            _check_limits(conn, row, max(1, len(trials)), *limits)
            needed = dependencies.unmet(conn, row["tenant"], spec.depends_on)
            held = {"not_before": math.inf if needed else None}
            conn.execute(sa.insert(jobs).values(row | (HELD if trials else held)))
            self._event(conn, row["id"], "submitted", data={"adapter": f"{row['base']}:{spec.adapter}"})
            for job_id in add_trials(conn, row | held, spec, trials):
                self._event(conn, job_id, f"submitted as a trial of {row['id']}")
                dependencies.add(conn, job_id, needed)
            dependencies.add(conn, row["id"], [] if trials else needed)
            if needed:
                self._event(conn, row["id"], dependencies.waits_for(needed), kind=EventKind.WAITS)
            return self._locked_job(conn, row["id"]), True

    def _as_last_submitted(self, conn: sa.Connection, job: Job, spec: JobSpec) -> Job:
        """Give a job that waits the priority and time limit of its newest submission."""
        before, after = (job.priority, job.time_limit), (spec.priority, spec.time_limit)
        if before == after or job.status is JobStatus.RUNNING or job.status in TERMINAL:
            return job
        for one in (*unfinished_trials(conn, job), job):
            given = {"priority": spec.priority, "time_limit": spec.time_limit}
            text = spec.canonical_json() if one is job else one.spec.model_copy(update=given).canonical_json()
            values = given | {"spec_json": text, "updated_at": self._clock()}
            conn.execute(sa.update(jobs).where(jobs.c.id == one.id).values(values))
            if before[0] != after[0]:
                self._event(conn, one.id, f"priority {before[0]} -> {after[0]}")
            if before[1] != after[1]:
                self._event(conn, one.id, f"time limit {duration_text(before[1])} -> {duration_text(after[1])}")
        return self._locked_job(conn, job.id)


def _check_limits(
    conn: sa.Connection, row: Mapping[str, Any], new: int, most_unfinished: int | None, most: int | None
) -> None:
    """See whether a tenant may have the job of `row` too, or its `new` trials, counting no further than its limits.
    Raises TooManyJobsError.
    """
    mine = sa.and_(jobs.c.tenant == row["tenant"], sa.or_(jobs.c.sweep_id.is_(None), jobs.c.sweep_id != jobs.c.id))
    unfinished = mine, jobs.c.status.not_in(sorted(TERMINAL))
    queued = mine, jobs.c.cluster == row["cluster"], jobs.c.status == JobStatus.QUEUED
    for limit, those, what in ((most_unfinished, unfinished, "unfinished"), (most, queued, "waiting")):
        if limit is not None:
            found = sa.select(jobs.c.id).where(*those).limit(limit).subquery()
            if conn.execute(sa.select(sa.func.count()).select_from(found)).scalar_one() + new > limit:
                raise TooManyJobsError(limit, what, new)
