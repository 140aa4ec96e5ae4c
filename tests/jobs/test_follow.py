"""Following a job: whoever does is told within seconds why it waits, and may interrupt it at any moment."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.storage.base import StorageUnavailable
from jobs.__main__ import main
from jobs.follow import PATIENCE_SECONDS, WATCH_SECONDS, follow
from jobs.job import JobStatus, RequestedAction, lease_name
from jobs.scheduling.launcher import RayUnreachableError
from jobs.spec import SpecError
from jobs.store.jobs import JobQueue
from tests.support.queue_kit import submit


class Follower:
    """Follows a waiting job on a clock of its own, which goes on by half a second a look."""

    def __init__(self, queue: JobQueue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.queue, self.now, self._capsys = queue, 0.0, capsys
        self.job_id = submit(queue)[0].id
        monkeypatch.setattr("jobs.follow.time.monotonic", lambda: self.now)
        monkeypatch.setattr("jobs.follow.time.sleep", self._sleep)
        self.at: dict[float, object] = {}

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        action = self.at.pop(self.now, None)
        if callable(action):
            action()

    def end(self) -> None:
        self.queue.move(self.job_id, JobStatus.QUEUED, JobStatus.CANCELLED, message="ended")

    def lines(self, watch: object = None) -> list[str]:
        """What it printed, without the times and the job's own history."""
        assert watch is None or callable(watch)
        assert follow(self.queue, self.job_id, watch) == 1
        return [text for line in self._capsys.readouterr().out.splitlines() if (text := line[9:]).startswith("waits")]


@pytest.fixture
def follower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Follower]:
    queue = JobQueue(f"sqlite:///{tmp_path / 'lora.db'}")
    yield Follower(queue, monkeypatch, capsys)
    queue.close()


def test_ray_comes_up_while_a_job_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as many workers as there are CPUs that this process may use."""
    order: list[str] = []

    def refuse(spec: object, settings: object, workers: int, known: list[str]) -> None:
        order.append(f"checked for {workers}")
        raise SpecError(["no such row"])

    monkeypatch.setenv("LORA_HOME", str(tmp_path))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 4, 5})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("jobs.scheduling.scheduler.ensure_scheduler", lambda *_: order.append("started"))
    monkeypatch.setattr("jobs.admission.admit", refuse)
    assert main(["submit", "jobs/examples/triage.yaml"]) == 2
    assert order == ["started", "checked for 3"]


def test_a_job_that_may_be_in_the_queue_is_scheduled_though_storage_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    def away(*_: object, **__: object) -> None:
        order.append("queued")
        raise StorageUnavailable("503")

    monkeypatch.setenv("LORA_HOME", str(tmp_path))
    monkeypatch.setattr("jobs.scheduling.scheduler.ensure_scheduler", lambda *_: order.append("started"))
    monkeypatch.setattr("jobs.admission.admit", lambda *_: SimpleNamespace(summary=[]))
    monkeypatch.setattr("jobs.__main__.enqueue", away)
    assert main(["submit", "jobs/examples/triage.yaml"]) == 2
    assert order == ["started", "queued", "started"]


def test_without_a_scheduler_that_is_said_once(follower: Follower) -> None:
    follower.at = {PATIENCE_SECONDS + 20: follower.end}
    assert follower.lines() == [
        "waits: no scheduler is at work on c: `python -m jobs submit` with the same job starts one"
    ]
    assert follower.queue.get(follower.job_id).status is JobStatus.CANCELLED


def test_a_scheduler_that_is_started_says_where_it_writes_if_it_cannot(follower: Follower) -> None:
    calls: list[float] = []
    follower.at = {2 * WATCH_SECONDS + 3: follower.end}
    (line,) = follower.lines(lambda: calls.append(follower.now))
    assert line.endswith("one is being started (if it does not come up, see logs/scheduler.log below LORA_HOME)")
    assert len(calls) == 2


def test_a_scheduler_at_work_needs_no_word_and_one_that_dies_does(follower: Follower) -> None:
    lease = follower.queue.acquire_lease(lease_name("c"), "somebody", 1e9)
    assert lease is not None
    follower.at = {20.0: lambda: follower.queue.release_lease(lease), 30.0: follower.end}
    assert len(follower.lines()) == 1


def test_what_keeps_a_scheduler_from_being_started_is_said(follower: Follower) -> None:
    def away() -> None:
        raise RayUnreachableError("Ray's API does not answer: no route")

    follower.at = {WATCH_SECONDS + 1: follower.end}
    assert follower.lines(away)[-1] == "waits: Ray's API does not answer: no route"


def test_a_follower_in_the_background_ignores_ctrl_c_and_waits_while_ray_is_away(
    follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def watch() -> None:
        asked.append(signal.getsignal(signal.SIGINT))
        if len(asked) == 1:
            raise RayUnreachableError("Ray's API does not answer")
        follower.queue.request(follower.job_id, RequestedAction.CANCEL)

    clock = itertools.count(0.0, 11.0)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr("time.sleep", lambda _: None)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert follow(follower.queue, follower.job_id, watch) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked == [signal.SIG_IGN] * 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_is_heard_while_python_collects_garbage(follower: Follower, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised in a finalizer, as a collection calls it, is printed and dropped: libraries of ours have some."""

    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)  # not kill: another thread may take that, a little later

    monkeypatch.setattr(JobQueue, "events", lambda *_, **__: [Finalized()][:0])
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("went on after Ctrl-C"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            follow(follower.queue, follower.job_id)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
