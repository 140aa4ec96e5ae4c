"""`/v1/fine_tuning/jobs`: OpenAI's fine-tuning on this service's queue.

A job is checked by the same code as on the command line and goes into the same table; who follows it reads that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cluster.ray_runtime import LOCAL_CLUSTER, use_own_ray
from cluster.settings import Settings
from cluster.storage.base import StorageError
from cluster.storage.directory import open_storage
from deploy.api.admission_server import Admission
from deploy.api.bodies import JobBody, body_of
from deploy.api.errors import ApiError
from deploy.api.file_store import FileStore
from deploy.api.job_objects import (
    CHECKPOINT,
    RESULT,
    FineTuningJob,
    JobCheckpoint,
    JobEstimate,
    JobEvent,
    JobLogLine,
    JobLogList,
    ResultFile,
    checkpoint_object,
    event_object,
    event_place,
    job_object,
    result_csv,
)
from deploy.api.job_requests import WINDOW_SECONDS, JobRequest, parse_job_request
from deploy.api.keys import Caller, caller_of, needs
from deploy.api.pages import Page, page
from deploy.api.schemas import read_document
from jobs.errors import (
    DatabaseUnavailableError,
    DependencyError,
    IllegalTransitionError,
    JobNotFoundError,
    TooManyJobsError,
)
from jobs.estimate import Estimate, estimate
from jobs.job import ClientRequest, Job, RequestedAction
from jobs.job_log import JobLog
from jobs.spec import JobSpec
from jobs.store.api_keys import Scope
from jobs.store.jobs import JobQueue
from jobs.submission import enqueue

log = logging.getLogger("ray.serve.lora")

Limit = Annotated[int, Query(ge=1, le=100)]

_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "the same key is the same job, for as long as that is kept",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}
_METADATA = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "description": "jobs that have all of these pairs; `metadata=null`: those that have none",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}
_CSV: dict[int | str, dict[str, Any]] = {200: {"content": {"text/csv": {}}}}


class FineTuning:
    """The routes of jobs, whose rows may be in `files`. `admission` is a handle of `AdmissionServer`."""

    def __init__(self, settings: Settings, queue: JobQueue, files: FileStore, admission: Any) -> None:
        self._settings, self._queue, self._files, self._admission = settings, queue, files, admission
        self._storage = open_storage(settings.storage_url)
        self._starting: set[asyncio.Task[None]] = set()
        if settings.cluster is None:
            use_own_ray()

    def router(self) -> APIRouter:
        """Return the routes, for callers that may train."""
        router = APIRouter(dependencies=[Depends(needs(Scope.TRAIN))], tags=["Fine-tuning"])
        jobs, job = "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/{job_id}"
        router.add_api_route(
            jobs,
            self.create,
            methods=["POST"],
            response_model=FineTuningJob | JobEstimate,
            openapi_extra=body_of(JobBody) | {"parameters": [_KEY]},
        )
        router.add_api_route(jobs, self.list, openapi_extra={"parameters": [_METADATA]})
        router.add_api_route(job, self.retrieve)
        router.add_api_route(f"{job}/cancel", self.cancel, methods=["POST"])
        router.add_api_route(f"{job}/pause", self.pause, methods=["POST"])
        router.add_api_route(f"{job}/resume", self.resume, methods=["POST"])
        router.add_api_route(f"{job}/events", self.events)
        router.add_api_route(f"{job}/metrics", self.metrics)
        router.add_api_route(f"{job}/logs", self.logs)
        router.add_api_route(f"{job}/checkpoints", self.checkpoints)
        result = f"/v1/files/{RESULT}{{job_id}}"
        router.add_api_route(result, self.result_file)
        router.add_api_route(f"{result}/content", self.result_content, response_class=Response, responses=_CSV)
        return router

    async def create(self, request: Request) -> FineTuningJob | JobEstimate:
        """Check a job and queue it. The same request with the same rows within ten minutes is the same job; with
        `dry_run` there is none, and the answer is what it would come to.
        """
        caller, key = caller_of(request), request.headers.get("idempotency-key")
        document = await asyncio.to_thread(read_document, await request.body())
        locate = await self._locating(caller, document)
        wanted = await asyncio.to_thread(parse_job_request, document, self._settings.base_models, locate)
        if not wanted.dry_run and (known := await self._known(caller, key, wanted)) is not None:
            return await self._object(known)
        if wanted.spec.priority > 0 and Scope.ADMIN not in caller.scopes:
            message = "a priority above 0 goes before other tenants' jobs, for keys of the scope admin: leave it out"
            raise ApiError(403, message, "missing_scope", "priority")
        found = await self._checked(wanted, caller)
        if wanted.dry_run:
            return await self._estimate(wanted.spec, caller, found)
        assert found.admitted is not None
        sent = ClientRequest(
            document=wanted.document,
            digest=wanted.digest,
            metadata=wanted.metadata,
            idempotency_key=key,
            window=WINDOW_SECONDS,
        )
        try:
            job, new = await asyncio.to_thread(
                enqueue,
                self._queue,
                self._settings,
                wanted.spec,
                found.admitted,
                cluster=found.cluster,
                tenant=caller.tenant,
                request=sent,
                most_unfinished=caller.running_jobs,
            )
        except TooManyJobsError as error:
            raise ApiError(429, f"with this key {error}", "too_many_jobs") from error
        except DependencyError as error:  # it was well when the job was checked
            raise ApiError(400, str(error), "invalid_job", "depends_on") from error
        except (StorageError, DatabaseUnavailableError):
            self._start_scheduler(found.cluster)  # the job may be in the queue all the same
            raise
        if new or job.status == "queued":  # an error after it was written may have kept it from being scheduled
            self._start_scheduler(job.cluster)
        return await self._object(_same(job, wanted))

    async def list(self, request: Request, after: str | None = None, limit: Limit = 20) -> Page[FineTuningJob]:
        """List jobs, the newest first; the trials of a sweep are in its own object."""
        asked = caller_of(request).tenant, limit, after, _metadata_of(request)
        jobs, more = await self._read(self._queue.page, *asked)
        trials = await self._read(self._queue.trials, [job.id for job in jobs if job.is_sweep])
        return page([job_object(job, trials.get(job.id, ())) for job in jobs], more)

    async def retrieve(self, request: Request, job_id: str) -> FineTuningJob:
        """Describe a job, with how far it is."""
        return await self._object(await self._find(request, job_id))

    async def cancel(self, request: Request, job_id: str) -> FineTuningJob:
        """Cancel a job; one that runs, after its current step."""
        return await self._requested(request, job_id, RequestedAction.CANCEL)

    async def pause(self, request: Request, job_id: str) -> FineTuningJob:
        """Pause a job; one that runs, after its current step, with a checkpoint."""
        return await self._requested(request, job_id, RequestedAction.PAUSE)

    async def resume(self, request: Request, job_id: str) -> FineTuningJob:
        """Let a paused job go on from where it was."""
        job = await self._moved(request, job_id, self._queue.resume)
        self._start_scheduler(job.cluster)
        return await self._object(job)

    async def events(
        self, request: Request, job_id: str, after: str | None = None, limit: Limit = 20
    ) -> Page[JobEvent]:
        """List what has happened to a job, the newest first; the metrics of its steps have the type `metrics`."""
        job = await self._find(request, job_id)
        before = None if after is None else event_place(after)
        if after is not None and before is None:
            raise ApiError(400, f"after must be the id of an event, not {after[:60]!r}", "invalid_value", "after")
        events, more = await self._read(self._queue.history_page, job.id, limit, before)
        return page([event_object(event) for event in events], more)

    async def metrics(
        self, request: Request, job_id: str, after_step: Annotated[int, Query(ge=0, lt=2**31)] = 0
    ) -> Page[JobEvent]:
        """List the metrics of a job's steps after that one, the oldest first: of the newest steps all, and of those
        before them as many as make a curve of the whole.
        """
        job = await self._find(request, job_id)
        return page(
            [event_object(one) for one in await self._read(self._queue.step_metrics, job.id, after_step)], False
        )

    async def logs(self, request: Request, job_id: str) -> JobLogList:
        """Read a job's whole log, the oldest line first: its history, and the traceback of an error of its own."""
        job = await self._find(request, job_id)
        log = JobLog(self._queue, job.id, self._storage)
        lines = await asyncio.to_thread(log.read, whole=True)
        data: list[JobLogLine] = [{"created_at": one.at, "level": one.level, "message": one.message} for one in lines]
        return {"object": "list", "data": data}

    async def checkpoints(
        self, request: Request, job_id: str, after: str | None = None, limit: Limit = 10
    ) -> Page[JobCheckpoint]:
        """List the models of what a job's adapter was after some of its epochs, the newest first."""
        job = await self._find(request, job_id)
        before = None if after is None else after.removeprefix(CHECKPOINT)
        if before is not None and not (before.isdecimal() and len(before) < 16):
            raise ApiError(400, f"after must be the id of a checkpoint, not {after!r:.60}", "invalid_value", "after")
        found, more = await self._read(self._queue.checkpoints_page, job.id, limit, before and int(before))
        return page([checkpoint_object(event) for event in found], more)

    async def result_file(self, request: Request, job_id: str) -> ResultFile:
        """Describe the file of a job's figures."""
        job, content = await self._result(request, job_id)
        return {
            "id": f"{RESULT}{job.id}",
            "object": "file",
            "bytes": len(content),
            "created_at": int(job.finished_at or job.updated_at),
            "filename": f"{job.id}.csv",
            "purpose": "fine-tune-results",
            "status": "processed",
        }

    async def result_content(self, request: Request, job_id: str) -> Response:
        """Read a job's figures: the metrics of its steps, as many as make a curve, and all validations."""
        _, content = await self._result(request, job_id)
        return Response(content, media_type="text/csv")

    async def _result(self, request: Request, job_id: str) -> tuple[Job, bytes]:
        job = await self._find(request, job_id)
        if not job_object(job)["result_files"]:
            raise ApiError(404, f"{job_id} has no result file: it has not ended, or never trained", "file_not_found")
        return job, result_csv(await self._read(self._queue.step_metrics, job.id))

    async def _locating(self, caller: Caller, document: dict[str, Any]) -> Callable[[str, object], str]:
        """Return what finds the rows of a parameter, having looked for the uploaded files that a request names."""
        found = dict[tuple[str, str], str | ApiError]()
        for parameter in ("training_file", "validation_file"):
            if isinstance(file := document.get(parameter), str) and file.startswith("file-"):
                try:
                    found[parameter, file] = await self._files.dataset_of(caller.tenant, file, parameter)
                except ApiError as error:
                    found[parameter, file] = error

        def locate(parameter: str, value: object) -> str:
            location = found.get((parameter, str(value)))
            if isinstance(location, ApiError):
                raise ValueError(location.message)
            if location is not None:
                return location
            if not isinstance(value, str) or ("://" not in value and not value.startswith("/")):
                raise ValueError("give the id of an uploaded file, an absolute path on the server, or an s3:// URL")
            # For those alone who may read all that this service can.
            if Scope.ADMIN not in caller.scopes:
                raise ValueError("a path or URL is for keys of the scope admin; upload a file, and give its id")
            return value

        return locate

    async def _known(self, caller: Caller, key: str | None, wanted: JobRequest) -> Job | None:
        """Return the job that was made with this key, before it is checked once more."""
        if key is None:
            return None
        if not 0 < len(key) <= 255:
            message = "Idempotency-Key must have 1 to 255 characters"
            raise ApiError(400, message, "invalid_value", "Idempotency-Key")
        known = await self._read(self._queue.find_by_key, caller.tenant, key)
        return None if known is None else _same(known, wanted)

    async def _checked(self, wanted: JobRequest, caller: Caller) -> Admission:
        """Return what checking the job has found. Raises ApiError with everything that is wrong."""
        known: list[str] = await self._read(self._queue.dependency_problems, caller.tenant, wanted.spec.depends_on)
        try:
            found: Admission = await self._admission.admit.remote(wanted.spec, caller.tenant, wanted.dry_run)
        except BackPressureError as error:
            message = "too many jobs are being checked; try again soon"
            raise ApiError(429, message, "overloaded", retry=True) from error
        except (DeploymentUnavailableError, RayActorError) as error:
            raise ApiError(
                503, "jobs cannot be checked just now; try again soon", "server_restarting", retry=True
            ) from error
        if known or found.problems:
            problems = wanted.problems([*known, *found.problems])
            message = "; ".join(sentence for _, _, sentence in problems)
            raise ApiError(400, message, "invalid_job", problems[0][0])
        return found

    async def _estimate(self, spec: JobSpec, caller: Caller, found: Admission) -> JobEstimate:
        """Return what the job would come to."""
        assert found.admitted is not None and found.memory is not None
        asked = self._queue, found.cluster, spec, found.admitted, found.memory
        wanted: Estimate = await self._read(estimate, *asked)
        rows, sweep = wanted.rows, wanted.sweep
        return {
            "object": "fine_tuning.job.estimate",
            "model": spec.base_model,
            "examples": rows.examples,
            "tokens": wanted.tokens,
            "supervised_tokens": wanted.supervised_tokens,
            "tokens_per_epoch": rows.tokens,
            "supervised_tokens_per_epoch": rows.supervised_tokens,
            "steps": rows.steps,
            "memory": {"device": found.memory.device, "bytes": found.memory.roomy, "least_bytes": found.memory.least},
            "seconds": wanted.seconds,
            "tokens_per_second": wanted.tokens_per_second,
            "queue": {"before": wanted.before},
            "sweep": None
            if sweep is None
            else {"trials": sweep.trials, "left": [*sweep.left], "grid_tokens": sweep.grid_tokens},
            "summary": found.admitted.summary,
        }

    async def _find(self, request: Request, job_id: str) -> Job:
        found: Job = await self._read(self._queue.find, caller_of(request).tenant, job_id)
        return found

    async def _requested(self, request: Request, job_id: str, action: RequestedAction) -> FineTuningJob:
        return await self._object(await self._moved(request, job_id, lambda found: self._queue.request(found, action)))

    async def _object(self, job: Job) -> FineTuningJob:
        """Return what a client reads of a job, of a sweep with its trials."""
        trials = await self._read(self._queue.trials, [job.id]) if job.is_sweep else {}
        return job_object(job, trials.get(job.id, ()))

    async def _moved(self, request: Request, job_id: str, move: Callable[[str], Job]) -> Job:
        """Return the job as it is then. Raises ApiError: there is none (404), or it has ended (409)."""
        job = await self._find(request, job_id)
        try:
            moved: Job = await self._read(move, job.id)
        except IllegalTransitionError as error:
            raise ApiError(409, str(error), "invalid_job_state") from error
        return moved

    async def _read(self, ask: Callable[..., Any], *arguments: Any) -> Any:
        """Ask the database beside the event loop. Raises ApiError where there is no such job."""
        try:
            return await asyncio.to_thread(ask, *arguments)
        except JobNotFoundError as error:
            message = f"there is no fine-tuning job {error.wanted!r}; see /v1/fine_tuning/jobs"
            raise ApiError(404, message, "fine_tune_not_found", "fine_tuning_job_id") from error

    def _start_scheduler(self, cluster: str) -> None:
        """See to it that somebody schedules, where jobs run on this service's own Ray: a laptop's has a scheduler."""
        if self._settings.cluster is None and cluster != LOCAL_CLUSTER:
            task = asyncio.get_running_loop().create_task(asyncio.to_thread(self._ensure_scheduler))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    def _ensure_scheduler(self) -> None:
        from jobs.scheduling.scheduler import ensure_scheduler

        try:
            ensure_scheduler(self._settings, self._queue)
        except Exception as error:  # whatever it is, the job is safe in the queue
            log.error("event=scheduler_not_started error=%r", error)


def _same(job: Job, wanted: JobRequest) -> Job:
    """Return the job that a key was used for. Raises ApiError where it was another request."""
    if job.idempotency_key is not None and (job.client_request or {}).get("digest") != wanted.digest:
        message = f"this Idempotency-Key was sent with another request, which made {job.id}; use another key"
        raise ApiError(409, message, "idempotency_key_reused", "Idempotency-Key")
    return job


def _metadata_of(request: Request) -> dict[str, str] | None:
    """Return what jobs are asked for by: `metadata[key]=value`; `metadata=null` asks for those that have none."""
    if request.query_params.get("metadata") == "null":
        return {}
    pairs = request.query_params.multi_items()
    return {name[9:-1]: value for name, value in pairs if name.startswith("metadata[") and name.endswith("]")} or None
