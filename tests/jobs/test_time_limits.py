"""A job may run for so long, over all its attempts; then it fails, and its neighbours go on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.settings import Settings
from jobs.duration import duration_text, seconds_of
from jobs.job import FailureCode
from jobs.session.controller import SessionController
from jobs.session.messages import Mailbox
from jobs.store.jobs import JobQueue
from tests.jobs.test_job_report import PROGRESS
from tests.support.queue_kit import FAILED, PAUSED, QUEUED, RUNNING, Clock, running_session, spec, submit

pytest_plugins = ["tests.support.queue_kit"]


@pytest.mark.parametrize(
    ("given", "seconds", "shown"),
    [("90m", 5400.0, "1h30m"), ("1d0.5h", 88_200.0, "1d30m"), ("1h2m3.5s", 3723.5, "1h2m3.5s"), (7200, 7200.0, "2h")],
)
def test_a_duration_is_read_and_written_as_people_do(given: str | int, seconds: float, shown: str) -> None:
    assert spec(time_limit=given).time_limit == seconds and duration_text(seconds) == shown
    assert seconds_of(shown) == seconds


def test_the_running_time_of_all_attempts_counts(queue: JobQueue, clock: Clock) -> None:
    job, _ = submit(queue, time_limit="2h")
    job, new = submit(queue, time_limit="90m", priority=2)
    assert not new and (job.time_limit, job.spec.time_limit, job.spec.priority) == (5400.0, 5400.0, 2)
    assert [event.message for event in queue.events(job.id)][1:] == ["priority 0 -> 2", "time limit 2h -> 1h30m"]
    for waited, ran, left in ((500, 100, QUEUED), (70, 30, PAUSED), (9, 20, None)):
        clock.now += waited
        assert queue.assign(job.id, running_session(queue).id)
        began = queue.get(job.id)
        assert began.seconds_run(began.attempt_at or 0.0) == began.run_seconds
        clock.now += ran
        if left is not None:
            assert queue.move(job.id, RUNNING, left, message="left")
        if left is PAUSED:
            queue.resume(job.id)
    assert queue.get(job.id).seconds_run(clock.now) == pytest.approx(150, abs=20)


class LocalMailbox:
    """A session's mailbox in this process, as an actor's handle."""

    def __init__(self) -> None:
        self.mailbox = Mailbox()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.mailbox, name))


def test_a_job_that_has_run_for_too_long_fails_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its ranks have let it go between two steps."""
    monkeypatch.setattr("jobs.session.controller.start_mailbox", LocalMailbox)
    monkeypatch.setattr("jobs.session.controller.ray", SimpleNamespace(get=lambda answer: answer))
    queue = JobQueue(f"sqlite:///{tmp_path / 'lora.db'}")
    session = running_session(queue)
    late, early, free = (submit(queue, name, time_limit=limit)[0].id for name, limit in
                         (("late", 0.001), ("early", "1h"), ("free", None)))  # fmt: skip
    for job_id in (late, early, free):
        assert queue.assign(job_id, session.id)
    progress: Any = PROGRESS
    assert queue.progress(late, session.id, 1, progress)
    controller = SessionController(Settings(home=tmp_path), queue, session.id, session.fence)
    ranks: Mailbox = controller.mailbox.mailbox
    for active in ((late, early, free), (early, free)):
        ranks.desired(active)
        assert queue.get(late).status is RUNNING
        controller._reconcile(stop=False)
        assert {one.job_id for one in ranks.desired(active).assignments} == {early, free}
    job = queue.get(late)
    step = f"step {PROGRESS['step']} of {PROGRESS['steps']}"
    assert (job.status, job.error_code) == (FAILED, FailureCode.TIME_LIMIT)
    assert job.error == f"its time limit of 0.001s was over at {step}"
    assert {queue.get(job_id).status for job_id in (early, free)} == {RUNNING}
    queue.close()
