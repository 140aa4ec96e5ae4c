"""Metrics of steps: gathered in a rank, kept in the queue as a bounded curve, and one history with a job's events."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

from jobs.job import JobSteps, StepMetrics
from jobs.session.messages import StepsDone
from jobs.session.step_reporter import SEND_SECONDS, StepReporter
from jobs.store.jobs import JobQueue
from jobs.store.step_metrics import KEPT, SLACK
from tests.support.queue_kit import CANCELLED, QUEUED, RUNNING, running_session, submit

pytest_plugins = ["tests.support.queue_kit"]


def batch(job_id: str, steps: range, validated: int = 100, loss: float = 1.0) -> JobSteps:
    """Metrics of these steps, every `validated`-th of which is validated."""
    figures = {True: {"train_loss": loss, "valid_loss": loss}, False: {"train_loss": loss}}
    metrics = tuple(StepMetrics(step, float(step), figures[step % validated == 0]) for step in steps)
    progress: Any = {"step": steps[-1]}
    return JobSteps(job_id, progress, metrics)


def test_a_long_curve_is_thinned_and_what_was_trained_twice_is_told_once(queue: JobQueue) -> None:
    job, session = submit(queue)[0], running_session(queue)
    assert queue.assign(job.id, session.id)
    newest = 20_000
    for first in range(1, newest, 250):
        assert queue.record_steps(session.id, session.fence, [batch(job.id, range(first, first + 250))])
    curve = queue.step_metrics(job.id)
    steps = [one.step for one in curve]
    validated = [one.step for one in curve if "valid_loss" in one.figures]
    assert validated == [*range(100, newest + 1, 100)], "a validation is never left out"
    assert len(steps) <= 2 * KEPT + SLACK + len(validated)
    assert steps[0] == 1 and steps[-KEPT:] == [*range(newest - KEPT + 1, newest + 1)]
    early = [step for step in steps if step <= newest - KEPT - SLACK]
    assert max(later - step for step, later in itertools.pairwise(early)) <= 2 * newest / KEPT
    assert [one.step for one in queue.step_metrics(job.id, after=newest - 2)] == [newest - 1, newest]
    known = queue.get(job.id)
    assert known.progress == {"step": newest}
    # A job that is continued from an earlier checkpoint: what came after that is told anew.
    again = batch(job.id, range(19_001, 19_003), loss=2.0)
    assert queue.record_steps(session.id, session.fence, [again], 123.5)
    tail = queue.step_metrics(job.id, after=18_990)
    assert [one.step for one in tail][-3:] == [19_000, 19_001, 19_002] and tail[-1].figures["train_loss"] == 2.0
    found = queue.session(session.id)
    assert found is not None and found.tokens_per_second == 123.5


def test_only_the_session_that_has_a_job_tells_of_its_steps(queue: JobQueue) -> None:
    job, session, other = submit(queue)[0], running_session(queue), running_session(queue)
    assert queue.assign(job.id, session.id)
    assert not queue.record_steps(session.id, session.fence + 1, [batch(job.id, range(1, 2))], 1.0)
    assert queue.record_steps(other.id, other.fence, [batch(job.id, range(1, 2))])
    assert queue.step_metrics(job.id) == [] and queue.get(job.id).progress is None
    assert queue.move(job.id, RUNNING, CANCELLED, message="cancelled")
    assert queue.record_steps(session.id, session.fence, [batch(job.id, range(1, 3))]), "they were on their way"
    assert len(queue.step_metrics(job.id)) == 2 and queue.get(job.id).progress is None


def test_steps_and_events_are_one_history_in_pages(queue: JobQueue) -> None:
    job, session = submit(queue)[0], running_session(queue)
    assert queue.assign(job.id, session.id)
    queue.record_steps(session.id, session.fence, [batch(job.id, range(1, 4))])
    queue.log(job.id, "between")
    queue.record_steps(session.id, session.fence, [batch(job.id, range(4, 6))])
    assert queue.move(job.id, RUNNING, QUEUED, message="back")
    events, steps = queue.events(job.id), queue.step_metrics(job.id)
    history = [*events[:2], *steps[:3], events[2], *steps[3:], events[3]][::-1]
    for limit in (1, 2, 3, 20):
        found: list[Any] = []
        more = True
        while more:
            page, more = queue.history_page(job.id, limit, found[-1].place if found else None)
            found += page
            assert len(page) == limit or not more
        assert found == history


class Taker:
    """A mailbox that does not answer the first time."""

    def __init__(self) -> None:
        self.taken: list[StepsDone] = []
        self.calls = 0
        self.arrived = threading.Event()

    def deliver(self, report: StepsDone) -> None:
        self.calls += 1
        if self.calls == 1:
            raise ConnectionError("away")
        self.taken.append(report)
        self.arrived.set()


def test_steps_are_told_within_a_moment_and_training_does_not_wait_for_that() -> None:
    taker = Taker()
    reporter = StepReporter(taker)  # type: ignore[arg-type]
    reporter.start()
    progress: Any = [{"step": step} for step in range(3)]
    reporter.stepped("a", progress[0], StepMetrics(0, 0.0, {"train_loss": 1.0}))
    deadline = time.monotonic() + 30
    while not taker.calls:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for step in (1, 2):
        reporter.stepped("a", progress[step], StepMetrics(step, 0.0, {"train_loss": 1.0}))
    reporter.computed(300, 2.0)
    assert taker.arrived.wait(4 * SEND_SECONDS + 10)
    reporter.stop()
    reporter.flush()
    (report,) = taker.taken
    assert report.tokens_per_second == 150.0
    ((job_id, told, steps),) = [(job.job_id, job.progress, job.steps) for job in report.jobs]
    assert (job_id, told, [one.step for one in steps]) == ("a", {"step": 2}, [1, 2])
    assert all(one.figures["memory_bytes"] > 0 for one in steps)
