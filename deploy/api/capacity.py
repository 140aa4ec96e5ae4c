"""`/v1/capacity`: what is loaded where, who trains in which session, and what waits.

Totals are of all tenants; jobs, adapters and bases without an alias are named to their own tenant alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from fastapi import APIRouter, Depends, Request
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from typing_extensions import TypedDict

from deploy.api.keys import caller_of, needs
from deploy.serving.protocol import ReplicaLoad
from deploy.serving.single_flight import SingleFlight
from jobs.job import Job, JobStatus, Session
from jobs.store.api_keys import Scope
from jobs.store.jobs import JobQueue

log = logging.getLogger("ray.serve.lora")

_FRESH_SECONDS = 1.0  # that an answer is given again, however many ask
_ANSWER_SECONDS = 2.0  # in which replicas answer; one that is full of requests may not


class JobCounts(TypedDict):
    running: int
    waiting: int
    paused: int


class Pace(TypedDict):
    """Tokens a second."""

    training: float
    serving: float


class Replica(TypedDict):
    """One that serves a base: `running` and `waiting` are requests, of which it answers `slots` at a time. Free adapter
    slots are of rank 16 on every linear.
    """

    place: str
    precision: str
    base_bytes: int
    running: int
    waiting: int
    slots: int
    adapters: int
    adapter_bytes: int
    adapter_capacity: int
    free_adapter_bytes: int
    free_adapter_slots: int
    tokens_per_second: float


class Base(TypedDict):
    """A base that is served; `replicas` are null where they do not answer now."""

    id: str
    resident: bool
    replicas: list[Replica] | None
    jobs: JobCounts
    tokens_per_second: Pace


class SessionJob(TypedDict):
    id: str
    model: str


class TrainingSession(TypedDict):
    """Who trains together on one base, and on which devices: the caller's jobs, and how many others."""

    id: str
    base: str | None
    state: Literal["launching", "running", "stopping"]
    precision: str
    num_workers: int
    places: list[str]
    jobs: list[SessionJob]
    other_jobs: int
    free_slots: int
    tokens_per_second: float


class CapacityDocument(TypedDict):
    """Jobs are counted of all tenants, and of the caller's own."""

    object: Literal["capacity"]
    bases: list[Base]
    sessions: list[TrainingSession]
    jobs: JobCounts
    own_jobs: JobCounts


@dataclass(frozen=True)
class _Look:
    """What was found at a time; `replicas` are None where they did not answer."""

    at: float
    replicas: Mapping[str, Sequence[ReplicaLoad] | None]
    sessions: Sequence[Session]
    running: Sequence[Job]
    unfinished: Mapping[tuple[str, str, JobStatus], int]


class Capacity:
    """The route. `servers` are handles of `AdapterServer` by the name of the base; a session takes `most_jobs`."""

    def __init__(self, servers: Mapping[str, Any], queue: JobQueue, most_jobs: int) -> None:
        self._servers, self._queue, self._most_jobs = servers, queue, most_jobs
        self._looks = SingleFlight[_Look]()
        self._last: _Look | None = None

    def router(self) -> APIRouter:
        """Return the route, for every key."""
        router = APIRouter(dependencies=[Depends(needs(Scope.INFER, Scope.TRAIN))], tags=["Capacity"])
        router.add_api_route("/v1/capacity", self.capacity)
        return router

    async def capacity(self, request: Request) -> CapacityDocument:
        """Tell what is loaded where, who shares it, what is free, and what waits."""
        if self._last is None or time.monotonic() - self._last.at > _FRESH_SECONDS:
            self._last = await self._looks.do("now", self._look)
        look, tenant = self._last, caller_of(request).tenant
        return {
            "object": "capacity",
            "bases": [self._base(base, look) for base in self._servers],
            "sessions": [self._session(session, look, tenant) for session in look.sessions],
            "jobs": _counts(look.unfinished),
            "own_jobs": _counts({key: n for key, n in look.unfinished.items() if key[0] == tenant}),
        }

    async def _look(self) -> _Look:
        at = time.monotonic()
        asked = asyncio.gather(*map(self._replicas, self._servers))
        replicas, rows = await asyncio.gather(asked, asyncio.to_thread(self._rows))
        return _Look(at, dict(zip(self._servers, replicas, strict=True)), *rows)

    def _rows(self) -> tuple[Sequence[Session], Sequence[Job], Mapping[tuple[str, str, JobStatus], int]]:
        """Return the sessions that are alive, their jobs, and how many there are."""
        now = time.time()
        alive = [one for one in self._queue.sessions() if one.lease_until is None or one.lease_until >= now]
        return alive, self._queue.list(statuses={JobStatus.RUNNING}), self._queue.unfinished()

    async def _replicas(self, base: str) -> Sequence[ReplicaLoad] | None:
        """Ask the replicas that a base has; none is started for it."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                found: list[ReplicaLoad] = await self._servers[base].broadcast("load_report").results_async()
        except (TimeoutError, RayError, RayServeException) as error:
            log.info("event=no_load_report base=%s error=%r", base, error)
            return None
        return found

    def _base(self, base: str, look: _Look) -> Base:
        replicas = look.replicas[base]
        return {
            "id": base,
            "resident": bool(replicas) or any(session.base_model == base for session in look.sessions),
            "replicas": None if replicas is None else [_replica(replica) for replica in replicas],
            "jobs": _counts({key: n for key, n in look.unfinished.items() if key[1] == base}),
            "tokens_per_second": {
                "training": sum(_pace(one, look) for one in look.sessions if one.base_model == base),
                "serving": sum(replica.tokens_per_second for replica in replicas or ()),
            },
        }

    def _session(self, session: Session, look: _Look, tenant: str) -> TrainingSession:
        jobs = [job for job in look.running if job.session_id == session.id]
        own = [job for job in jobs if job.tenant == tenant]
        return {
            "id": session.id,
            "base": session.base_model if own or session.base_model in self._servers else None,
            "state": cast(Literal["launching", "running", "stopping"], session.state.value),
            "precision": session.resolved_precision or session.precision,
            "num_workers": session.num_workers,
            "places": (session.facts or {}).get("places", []),
            "jobs": [{"id": job.id, "model": f"{job.base}:{job.spec.adapter}"} for job in own],
            "other_jobs": len(jobs) - len(own),
            "free_slots": 0 if session.leaving else max(0, self._most_jobs - len(jobs)),
            "tokens_per_second": _pace(session, look),
        }


def _replica(load: ReplicaLoad) -> Replica:
    fields = asdict(load)
    free = max(0, load.adapter_capacity - load.adapter_bytes)
    slots = free // fields.pop("slot_bytes")
    return cast(Replica, {**fields, "free_adapter_bytes": free, "free_adapter_slots": slots})


def _counts(unfinished: Mapping[tuple[str, str, JobStatus], int]) -> JobCounts:
    """Return how many jobs run, wait to run, and are paused."""
    of = {status: sum(n for key, n in unfinished.items() if key[2] is status) for status in JobStatus}
    waiting = of[JobStatus.QUEUED] + of[JobStatus.VALIDATING_FILES]
    return {"running": of[JobStatus.RUNNING], "waiting": waiting, "paused": of[JobStatus.PAUSED]}


def _pace(session: Session, look: _Look) -> float:
    """Return its tokens a second; once its last job has ended, it has none."""
    trains = any(job.session_id == session.id for job in look.running)
    return session.tokens_per_second or 0.0 if trains else 0.0
