"""When a session ends for want of jobs: its controller on a real queue, without Ray and without ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.settings import Settings
from jobs.job import JobStatus, RequestedAction, SessionState
from jobs.session import controller as module
from jobs.session.controller import FIRST_JOB_SECONDS, STOP_SECONDS, SessionController
from jobs.session.driver import run_session
from jobs.session.messages import Mailbox, RanksStarted
from jobs.store.jobs import JobQueue
from tests.support.queue_kit import KEY, running_session, submit


class Driver:
    """A session that is to end as soon as nobody needs it, on a clock of its own; `left`: its process has ended."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch) -> None:
        settings = Settings(home=home, session_idle_seconds=0.0)
        self.queue, self.mailbox, self.now, self.left = JobQueue(settings.database_url), Mailbox(), 0.0, False
        handle = SimpleNamespace(exchange=SimpleNamespace(remote=self.mailbox.exchange))
        patch.setattr(module, "start_mailbox", lambda: handle)
        patch.setattr(module, "ray", SimpleNamespace(get=lambda answer: answer))
        patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now))
        patch.setattr(module, "leave", self._leave)
        self.session_id = running_session(self.queue).id
        self.controller = SessionController(settings, self.queue, self.session_id, 1)

    def _leave(self) -> None:
        self.left = True

    def rounds(self, number: int = 1) -> SessionState:
        """The session's state after so many rounds, of a second each."""
        for _ in range(number):
            self.now += 1.0
            self.controller.round()
        session = self.queue.session(self.session_id)
        assert session is not None
        return session.state


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(tmp_path, monkeypatch)


@pytest.mark.parametrize("action", [RequestedAction.CANCEL, RequestedAction.PAUSE])
def test_a_session_that_is_being_started_leaves_with_its_last_job(driver: Driver, action: RequestedAction) -> None:
    """Its ranks hear of nothing before they are up; and until a first job can have come, it stays."""
    assert driver.rounds(int(FIRST_JOB_SECONDS) - 1) is SessionState.RUNNING
    job, _ = submit(driver.queue)
    assert driver.queue.assign(job.id, driver.session_id)
    assert driver.rounds(10) is SessionState.RUNNING
    driver.queue.request(job.id, action)
    assert not driver.left
    assert driver.rounds() is SessionState.ENDED and driver.left
    assert driver.queue.get(job.id).status is action.status


def test_ranks_that_are_up_are_told_to_stop_once_the_last_job_has_left_them(driver: Driver) -> None:
    job, _ = submit(driver.queue)
    assert driver.queue.assign(job.id, driver.session_id)
    driver.mailbox.report(RanksStarted("fp32", "asked for", "hooks", "bit for bit", ("cpu",)))
    driver.rounds()
    assert [one.job_id for one in driver.mailbox.desired((job.id,)).assignments] == [job.id]
    driver.queue.request(job.id, RequestedAction.CANCEL)
    assert driver.rounds(3) is SessionState.RUNNING
    assert not driver.mailbox.desired(()).stop
    assert driver.rounds(2) is SessionState.STOPPING and not driver.left
    assert driver.mailbox.desired(()).stop
    assert driver.queue.get(job.id).status is JobStatus.CANCELLED
    assert driver.rounds(int(STOP_SECONDS) - 1) is SessionState.STOPPING and not driver.left
    assert driver.rounds() is SessionState.ENDED and driver.left  # ranks that do not come are not waited for


def test_a_session_that_nobody_needs_any_more_is_not_started(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    queue = JobQueue(settings.database_url)
    session = queue.create_session(KEY, "c")
    assert session is not None
    queue.stop_session(session.id, "nobody waits for it any more")
    assert run_session(settings, session.id, 1) == 0
    ended = queue.session(session.id)
    assert ended is not None and (ended.state, ended.reason) == (SessionState.ENDED, session.reason or ended.reason)
