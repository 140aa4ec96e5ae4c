"""The scheduler against a Ray that answers as a test says, on a real queue; on a real Ray in test_service.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.settings import Settings
from jobs.job import (
    MAX_INFRASTRUCTURE_FAILURES,
    EventKind,
    FailureCode,
    JobStatus,
    RequestedAction,
    Session,
    SessionState,
    backoff_seconds,
)
from jobs.scheduling import scheduler
from jobs.scheduling.launcher import ClusterSize, Launcher, RayUnreachableError, SubmissionState, SubmissionStatus
from jobs.scheduling.scheduler import MAX_ATTEMPTS, SLOW_SECONDS, Scheduler, run_step
from jobs.spec import JobSpec
from jobs.store.jobs import JobQueue

GONE = "failed: Job entrypoint command failed\nTraceback (most recent call last):\n  ...\nOSError: no disk\n\n"


class AnsweringRay(Launcher):
    """Answers `run` for every submission, and remembers what was launched."""

    def __init__(self) -> None:
        self.run = SubmissionStatus(SubmissionState.RUNNING)
        self.launched: list[str] = []
        self.away: Exception | None = None

    def launch_session(self, submission_id: str, session_id: str, fence: int) -> None:
        self.launched.append(submission_id)

    def state(self, submission_id: str) -> SubmissionStatus:
        return self.run

    def size(self) -> ClusterSize:
        if self.away is not None:
            raise self.away
        return ClusterSize(workers=2, nodes=1)


class World:
    """A queue with one job in it, its scheduler, and the clock of both."""

    def __init__(self, home: Path) -> None:
        self.now = 1000.0
        self.queue = JobQueue(f"sqlite:///{home / 'lora.db'}", lambda: self.now)
        self.ray = AnsweringRay()
        lease = self.queue.acquire_lease("scheduler:c", "me", 1e9)
        assert lease is not None
        self.scheduler = Scheduler(Settings(home=home), self.queue, self.ray, "c", lease)
        spec = JobSpec(base_model="base", dataset="/rows.jsonl", adapter="a")
        job, _ = self.queue.submit(spec, cluster="c", base="base", dataset_sha="d", code_version="v")
        self.job_id = job.id

    @property
    def status(self) -> JobStatus:
        return self.queue.get(self.job_id).status

    @property
    def session(self) -> Session:
        (session,) = self.queue.sessions("c")
        return session

    @property
    def waits(self) -> list[str]:
        """Why it waits, as its history has it."""
        messages = [event.message for event in self.queue.events(self.job_id) if event.kind is EventKind.WAITS]
        return [message.removeprefix("waits: ") for message in messages]

    def come_up(self) -> None:
        """The session's driver starts, and the job goes to it."""
        assert self.queue.session_move(
            self.session.id, SessionState.LAUNCHING, SessionState.RUNNING, reason="up", fence=self.session.fence
        )
        self.scheduler.step()
        assert self.status is JobStatus.RUNNING


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.scheduler.step()
    yield world
    world.queue.close()


def test_a_job_gets_a_session_and_then_goes_to_it(world: World) -> None:
    assert world.ray.launched == [f"{world.session.id}-a1"]
    assert world.status is JobStatus.QUEUED
    world.come_up()
    assert len(world.ray.launched) == 1


def test_a_launch_that_ray_never_heard_of_is_made_again(world: World) -> None:
    world.ray.run = SubmissionStatus(SubmissionState.ABSENT)
    world.scheduler.step()
    assert world.ray.launched == [f"{world.session.id}-a1"] * 2


@pytest.mark.parametrize("state", [SubmissionState.UNKNOWN, SubmissionState.STARTING, SubmissionState.RUNNING])
def test_what_ray_does_not_call_ended_is_left_alone(world: World, state: SubmissionState) -> None:
    world.come_up()
    before = world.session
    world.ray.run = SubmissionStatus(state)
    for _ in range(5):
        world.scheduler.step()
    assert world.session == before
    assert world.status is JobStatus.RUNNING


def test_a_driver_that_ray_forgot_lives_as_long_as_its_lease(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.come_up()
    assert world.queue.renew_session(world.session.id, world.session.fence, 15.0)
    world.ray.run = SubmissionStatus(SubmissionState.ABSENT)
    monkeypatch.setattr("jobs.scheduling.scheduler.time.time", lambda: world.now)
    world.scheduler.step()
    assert world.status is JobStatus.RUNNING
    world.now += 16.0
    world.scheduler.step()
    assert world.status is JobStatus.QUEUED


@pytest.mark.parametrize(
    ("said", "code", "most"),
    [
        (GONE, FailureCode.UNKNOWN, MAX_ATTEMPTS),
        ("rank 1: torch.OutOfMemoryError: CUDA out of memory.", FailureCode.OUT_OF_MEMORY, MAX_ATTEMPTS),
        ("The actor died because its node has died.", FailureCode.LOST_NODE, MAX_INFRASTRUCTURE_FAILURES),
    ],
)
def test_a_job_is_tried_again_later_and_later_and_fails_when_it_has_lost_enough_sessions(
    world: World, said: str, code: FailureCode, most: int
) -> None:
    for attempt in range(1, most + 1):
        world.come_up()
        assert world.queue.get(world.job_id).attempt == attempt
        world.ray.run = SubmissionStatus(SubmissionState.ENDED, said)
        world.scheduler.step()
        world.ray.run = SubmissionStatus(SubmissionState.RUNNING)
        job = world.queue.get(world.job_id)
        alone = code is not FailureCode.LOST_NODE and attempt >= MAX_ATTEMPTS - 1
        assert job.max_colocated == (0 if alone else None)  # the last one is by itself
        assert (world.queue.events(job.id)[-1].data or {})["code"] == code
        if attempt < most:
            wait = backoff_seconds(attempt)
            assert wait == min(300.0, 2.0**attempt)
            assert world.waits[-1].startswith(f"back to the queue, to be tried again in {wait:.0f} s: ")
            world.now += wait - 0.1
            world.scheduler.step()
            assert world.queue.sessions("c") == [] and world.status is JobStatus.QUEUED
            world.now += 0.1
            world.scheduler.step()
    counts = job.lost_attempts, job.infrastructure_failures
    assert counts == ((0, most - 1) if code is FailureCode.LOST_NODE else (most - 1, 0))
    assert job.status is JobStatus.FAILED and job.error_code is code
    assert job.error is not None
    if said is not GONE:
        return
    assert job.error.endswith("OSError: no disk")
    assert "Traceback" not in job.error


def test_a_job_that_waited_for_room_has_its_three_sessions_all_the_same(world: World) -> None:
    for _ in range(MAX_ATTEMPTS):
        world.come_up() if world.session.state is SessionState.LAUNCHING else world.scheduler.step()
        fence = world.session.id, world.session.fence
        assert world.queue.move(
            world.job_id, JobStatus.RUNNING, JobStatus.QUEUED, message="waits: no room", fence=fence, max_colocated=3
        )
    assert world.queue.get(world.job_id).max_colocated == 3
    world.scheduler.step()
    world.ray.run = SubmissionStatus(SubmissionState.ENDED, GONE)
    world.scheduler.step()
    assert world.status is JobStatus.QUEUED


def test_sessions_that_never_come_up_fail_the_job_that_waits_for_them(world: World) -> None:
    world.ray.run = SubmissionStatus(SubmissionState.ENDED, GONE)
    for death in range(1, MAX_ATTEMPTS + 1):
        assert world.status is JobStatus.QUEUED
        world.scheduler.step()
        if death < MAX_ATTEMPTS:
            world.scheduler.step()
            assert len(world.ray.launched) == death
            world.now += backoff_seconds(death)
            world.ray.run = SubmissionStatus(SubmissionState.RUNNING)
            world.scheduler.step()
            world.ray.run = SubmissionStatus(SubmissionState.ENDED, GONE)
        messages = [event.message for event in world.queue.events(world.job_id)]
        failures = [message for message in messages if message.startswith("its session could not start")]
        assert len(failures) == death
        assert all(message.endswith(": OSError: no disk") for message in failures)
    job = world.queue.get(world.job_id)
    assert (job.status, job.error_code) == (JobStatus.FAILED, FailureCode.NOT_STARTED)
    assert len(world.ray.launched) == MAX_ATTEMPTS


def test_a_scheduler_that_was_replaced_changes_nothing(world: World) -> None:
    world.queue.release_lease(world.scheduler.lease)
    before = world.session
    world.ray.run = SubmissionStatus(SubmissionState.ENDED, GONE)
    world.scheduler.step()
    assert world.session == before
    assert world.status is JobStatus.QUEUED
    assert len(world.ray.launched) == 1


def test_a_session_gives_way_to_a_job_of_higher_priority_and_what_tenants_hold_is_kept(world: World) -> None:
    world.come_up()
    assert [(line.tenant, line.served_at) for line in world.queue.snapshot("c").lines] == [("default", world.now)]
    world.now += 60.0
    world.scheduler.step()
    (line,) = world.queue.snapshot("c").lines
    assert line.at == world.now and line.mean_workers == pytest.approx(1 - 2 ** (-60 / 86_400))
    urgent = JobSpec(base_model="base", dataset="/rows.jsonl", adapter="urgent", num_workers=2, priority=1)
    world.queue.submit(urgent, cluster="c", base="base", dataset_sha="d", code_version="v")
    world.scheduler.step()
    assert world.session.requested == "stop"
    assert world.queue.get(world.job_id).requested is RequestedAction.REQUEUE


def test_a_session_for_which_nobody_waits_any_more_is_not_started(world: World) -> None:
    world.scheduler.step()
    first = world.session
    world.queue.request(world.job_id, RequestedAction.PAUSE)
    world.scheduler.step()
    assert world.queue.sessions("c") == []
    up = SessionState.LAUNCHING, SessionState.RUNNING
    assert not world.queue.session_move(first.id, *up, reason="up", fence=first.fence)
    world.queue.resume(world.job_id)
    world.scheduler.step()
    assert len(world.ray.launched) == 2


def test_why_a_job_waits_is_in_its_history_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a scheduler alone knows, for those who follow the job elsewhere."""
    monkeypatch.setattr("jobs.scheduling.scheduler.time.time", lambda: world.now)
    started = "its session is being started"
    for _ in range(2):
        assert run_step(world.scheduler)
    assert world.waits == [started]
    world.now += SLOW_SECONDS
    world.ray.run = SubmissionStatus(
        SubmissionState.STARTING, "Job has not started yet.\n  It may wait\tfor resources."
    )
    world.scheduler.step()
    slow = "Ray has not started its session for 30 s (Job has not started yet. It may wait for resources.)"
    assert world.waits == [started, slow]
    world.come_up()
    assert world.waits == [started, slow]
    world.ray.run = SubmissionStatus(SubmissionState.ENDED, GONE)
    world.scheduler.step()
    again = "back to the queue, to be tried again in 2 s: OSError: no disk"
    assert world.waits == [started, slow, again]
    world.now += 2.0
    world.scheduler.step()  # for it another session
    assert world.waits == [started, slow, again, started]


@pytest.mark.parametrize(
    ("away", "told"),
    [
        (
            RayUnreachableError("Ray's API does not answer: at\nhttp://10.0.0.9"),
            "Ray's API does not answer: at http://10",
        ),
        (RuntimeError("No available agent"), "the scheduler cannot go on: No available agent"),
    ],
)
def test_a_ray_that_cannot_be_reached_is_told_to_those_who_wait(
    world: World, monkeypatch: pytest.MonkeyPatch, away: Exception, told: str
) -> None:
    monkeypatch.setattr("jobs.scheduling.scheduler.time.time", lambda: world.now)
    world.ray.away = away
    for _ in range(3):
        assert run_step(world.scheduler)
    assert len(world.waits) == 2
    assert world.waits[-1].startswith(told)
    world.ray.away = None
    run_step(world.scheduler)
    assert world.waits[-1] == "its session is being started"
    world.queue.release_lease(world.scheduler.lease)
    world.ray.away = away
    run_step(world.scheduler)
    assert len(world.waits) == 3  # another one schedules now


class Rounds(threading.Event):
    """Waits on a clock of its own, and is set after ten seconds; `then` happens after five."""

    def __init__(self, then: Callable[[], object]) -> None:
        super().__init__()
        self.now, self._then = 0.0, then

    def wait(self, timeout: float | None = None) -> bool:
        self.now += timeout or 0.0
        if self.now == 5.0:
            self._then()
        return self.now > 10.0


def test_ray_is_asked_less_often_while_no_job_waits(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its answers take a twentieth of a core that trains. A new job is seen at once all the same."""
    world.scheduler.step()
    world.come_up()
    asked: list[float] = []

    def state(submission_id: str) -> SubmissionStatus:
        asked.append(rounds.now)
        return world.ray.run

    def submit() -> None:
        spec = JobSpec(base_model="base", dataset="/rows.jsonl", adapter="another")
        world.queue.submit(spec, cluster="c", base="base", dataset_sha="d", code_version="v")

    rounds = Rounds(submit)
    monkeypatch.setattr(world.ray, "state", state)
    monkeypatch.setattr(world.ray, "size", lambda: ClusterSize(workers=1, nodes=1))
    monkeypatch.setattr(scheduler, "Launcher", lambda _: world.ray)
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: rounds.now, time=time.time))
    scheduler._schedule(Settings(home=tmp_path, lease_seconds=9.0), "c", None, rounds)
    assert asked == [0.5, 2.5, 4.5, 5.0, 7.0, 9.0]
    assert {job.status for job in world.queue.list()} == {JobStatus.RUNNING}
