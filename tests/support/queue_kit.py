"""Queues to test on, SQLite's and a real PostgreSQL server's, and rows in any state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from jobs.job import TRANSITIONS, Job, JobStatus, Lease, Session, SessionKey, SessionState
from jobs.queue_snapshot import QueuedJob, RunningJobs
from jobs.spec import JobSpec
from jobs.store.jobs import JobQueue

pytest_plugins = ["tests.support.postgres_server"]

QUEUED, RUNNING, PAUSED = JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.PAUSED
SUCCEEDED, FAILED, CANCELLED = JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED
KEY = SessionKey("base", "auto", 1)


class Clock:
    """A clock that goes on by one second a look, so that no two rows are of the same time, and by more when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/new/folder/lora.db"
    made: str = request.getfixturevalue("postgres_schema")
    return made


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(url: str, clock: Clock) -> Iterator[JobQueue]:
    queue = JobQueue(url, clock)
    yield queue
    queue.close()


def spec(adapter: str = "a", **options: Any) -> JobSpec:
    return JobSpec.model_validate({"base_model": "base", "dataset": "/rows.jsonl", "adapter": adapter} | options)


def submit(queue: JobQueue, adapter: str = "a", *, again: bool = False, **options: Any) -> tuple[Job, bool]:
    return queue.submit(
        spec(adapter, **options), cluster="c", base="base", dataset_sha="d1", code_version="v1", again=again
    )


def running_session(queue: JobQueue, lease: Lease | None = None) -> Session:
    session = queue.create_session(KEY, "c", lease=lease)
    assert session is not None
    assert queue.session_move(session.id, SessionState.LAUNCHING, SessionState.RUNNING, reason="up", fence=1)
    return session


def bring_to(queue: JobQueue, status: JobStatus, adapter: str = "a") -> Job:
    """A new job in this state."""
    first = JobStatus.VALIDATING_FILES if status is JobStatus.VALIDATING_FILES else QUEUED
    job, _ = queue.submit(
        spec(adapter), cluster="c", base="base", dataset_sha="d1", code_version="v1", status=first, again=True
    )
    if status in (RUNNING, SUCCEEDED):
        assert queue.assign(job.id, running_session(queue).id)
    if status in (PAUSED, FAILED, CANCELLED):
        assert queue.move(job.id, QUEUED, status, message="there")
    if status is SUCCEEDED:
        assert queue.move(job.id, RUNNING, SUCCEEDED, message="there")
    return queue.get(job.id)


def queued_job(id_: str, key: SessionKey, **columns: Any) -> QueuedJob:
    """A job that waits, as a plan sees it."""
    row: dict[str, Any] = {"tenant": "t", "priority": 0, "max_colocated": None, "step_tokens": 0, "created_at": 0.0}
    waits_since = columns.get("created_at", 0.0)
    return QueuedJob(**{"id": id_, "session_key": key, "waits_since": waits_since} | row | columns)


def running_jobs(session_id: str, number: int = 1, **columns: Any) -> RunningJobs:
    """Jobs of one tenant and priority in a session, as a plan sees them."""
    row: dict[str, Any] = {"tenant": "t", "priority": 0, "max_colocated": None, "step_tokens": 0}
    row |= {"level": columns.get("priority", 0)}
    return RunningJobs(**{"session_id": session_id, "number": number} | row | columns)


def session_row(id_: str, key: SessionKey, **columns: Any) -> Session:
    """A session as a row of the queue holds it; it runs, unless `columns` say otherwise."""
    row: dict[str, Any] = dict.fromkeys(field.name for field in fields(Session))
    return Session(**row | {"id": id_, "state": SessionState.RUNNING, "created_at": 0.0} | asdict(key) | columns)


def assert_legal_history(queue: JobQueue, job: Job) -> None:
    """The moves in a job's history are legal, follow each other without a gap, and end at its state."""
    moves = [event.data for event in queue.events(job.id) if event.data and "to" in event.data]
    at = moves[0]["from"] if moves else job.status
    for move in moves:
        assert move["from"] == at and JobStatus(move["to"]) in TRANSITIONS[JobStatus(at)]
        at = move["to"]
    assert at == job.status
