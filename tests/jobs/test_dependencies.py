"""Jobs that wait for others, on SQLite and PostgreSQL: they start after them, or fail with them, whoever races."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from jobs.errors import DependencyError
from jobs.job import EventKind, FailureCode, Job, JobStatus, RequestedAction
from jobs.store.dependencies import waits_for
from jobs.store.jobs import JobQueue
from tests.support.queue_kit import (
    CANCELLED,
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    assert_legal_history,
    bring_to,
    running_session,
    submit,
)

pytest_plugins = ["tests.support.queue_kit"]


def after(queue: JobQueue, name: str, *needed: Job) -> Job:
    job, new = submit(queue, name, depends_on=[one.id for one in needed])
    assert new
    return job


def in_line(queue: JobQueue) -> set[str]:
    """What a plan reads."""
    return {job.id for job in queue.snapshot("c").queued}


def why(queue: JobQueue, job: Job) -> str:
    return [event.message for event in queue.events(job.id) if event.kind is EventKind.WAITS][-1]


def succeed(queue: JobQueue, job: Job) -> None:
    assert queue.assign(job.id, running_session(queue).id)
    assert queue.move(job.id, RUNNING, SUCCEEDED, message="done")


def test_a_job_waits_until_all_that_it_depends_on_have_succeeded(queue: JobQueue) -> None:
    first, second = bring_to(queue, QUEUED, "1"), bring_to(queue, PAUSED, "2")
    both, paused = after(queue, "both", first, second), after(queue, "paused", first)
    assert queue.request(paused.id, RequestedAction.PAUSE).status is PAUSED
    assert in_line(queue) == {first.id} and both.status is QUEUED
    assert why(queue, both) == f"waits: for {first.id} and {second.id} to succeed"
    succeed(queue, first)
    assert in_line(queue) == set() and not queue.has_jobs("c", QUEUED), "nothing is there to be scheduled"
    assert why(queue, both) == f"waits: for {second.id} to succeed"
    queue.resume(paused.id)
    assert in_line(queue) == {paused.id}
    queue.resume(second.id)
    succeed(queue, second)
    assert in_line(queue) == {paused.id, both.id} and why(queue, both) == f"waits: {second.id} has succeeded"
    assert queue.get(both.id).not_before is None and queue.get(both.id).updated_at > both.updated_at
    assert after(queue, "later", first).id in in_line(queue), "what has succeeded is not waited for"
    assert waits_for(list("abcde")) == "waits: for a, b, c and 2 more to succeed"


@pytest.mark.parametrize(("ended", "how"), [(FAILED, "failed: no memory"), (CANCELLED, "was cancelled")])
def test_what_waits_for_a_job_fails_with_it(queue: JobQueue, ended: JobStatus, how: str) -> None:
    root, other = bring_to(queue, QUEUED, "root"), bring_to(queue, QUEUED, "other")
    child = after(queue, "child", root, other)
    below = [after(queue, "below", child), after(queue, "beside", child, root), after(queue, "free", other)]
    queue.request(below[0].id, RequestedAction.PAUSE)
    error = "no memory" if ended is FAILED else None
    assert queue.move(root.id, QUEUED, ended, message="over", error=error)
    for job in (child, *below[:2]):
        lost = queue.get(job.id)
        assert (lost.status, lost.error_code) == (FAILED, FailureCode.DEPENDENCY)
        assert lost.error == queue.events(job.id)[-1].message == f"it depends on {root.id}, which {how}"
        assert_legal_history(queue, lost)
    succeed(queue, other)
    assert in_line(queue) == {below[2].id} and queue.get(child.id).status is FAILED


def test_what_cannot_be_waited_for_is_refused(queue: JobQueue) -> None:
    done, over = bring_to(queue, SUCCEEDED, "done"), bring_to(queue, CANCELLED, "over")
    theirs, _ = queue.submit(
        done.spec, cluster="c", base="base", dataset_sha="d", code_version="v", tenant="another"
    )  # fmt: skip
    known, wanted = queue.list(), [done.id, over.id, theirs.id, "job-0"]
    with pytest.raises(DependencyError) as refused:
        submit(queue, depends_on=wanted)
    assert queue.list() == known and queue.dependency_problems("default", wanted) == refused.value.problems
    assert refused.value.problems == [
        f"depends_on: {over.id} was cancelled, so that it never succeeds; give another job, or leave it out",
        *(f"depends_on: there is no job '{one}'; give the whole id of a job of yours" for one in (theirs.id, "job-0")),
    ]
    waiting = bring_to(queue, QUEUED, "waiting")
    job, _ = submit(queue, depends_on=[done.id, waiting.id])
    assert submit(queue, depends_on=[waiting.id, done.id]) == (job, False)
    assert submit(queue, depends_on=[waiting.id])[1] and submit(queue)[1], "after others it is another job"


@dataclass
class Race:
    """Two jobs that end, the second one so, and a third that is told to wait for them: all at once."""

    queues: list[JobQueue]
    pair: list[Job]
    second: JobStatus
    ready: threading.Barrier = field(default_factory=lambda: threading.Barrier(3))

    def end(self, number: int) -> None:
        self.ready.wait()
        to = self.second if number else SUCCEEDED
        assert self.queues[number].move(self.pair[number].id, RUNNING, to, message="over")

    def join(self, name: str) -> Job | None:
        self.ready.wait()
        try:
            return after(self.queues[2], name, *self.pair)
        except DependencyError:
            return None


def test_no_end_is_missed_in_a_race(url: str) -> None:
    """Of two that a job waits for, that end at once; and of one that ends while another is told to wait for it."""
    queues = [JobQueue(url) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for number in range(12):
            pair = [bring_to(queues[0], QUEUED, f"{number}-{n}") for n in range(2)]
            for job in pair:
                assert queues[0].assign(job.id, running_session(queues[0]).id)
            race = Race(queues, pair, SUCCEEDED if number % 2 else FAILED)
            both = after(queues[0], f"both-{number}", *pair)
            late = pool.submit(race.join, f"late-{number}")
            list(pool.map(race.end, range(2)))
            for job in [both, *filter(None, [late.result()])]:
                found = queues[0].get(job.id)
                assert (found.status, found.not_before) == ((QUEUED, None) if number % 2 else (FAILED, math.inf))
    for queue in queues:
        queue.close()
