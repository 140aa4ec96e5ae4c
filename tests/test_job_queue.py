"""The queue on SQLite and on a real PostgreSQL server: legal moves only, one winner of every race, nothing lost."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import pickle
import random
import sqlite3
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from jobs.database import check_database, jobs, sessions
from jobs.job import (
    SESSION_TRANSITIONS,
    TERMINAL,
    TRANSITIONS,
    DatabaseSettingError,
    DatabaseUnavailableError,
    IllegalTransitionError,
    Job,
    JobNotFoundError,
    JobStatus,
    Lease,
    Session,
    SessionState,
    Wish,
)
from jobs.job_queue import JobQueue
from jobs.policy import Action, Assign, Cluster, Launch, Stop, plan, snapshot
from jobs.spec import JobSpec

pytest_plugins = ["postgres_server"]

QUEUED, RUNNING, PAUSED = JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.PAUSED
SUCCEEDED, FAILED, CANCELLED = JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED
KEY = "base|auto|1"


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
    session = queue.create_session(KEY, "c", 1, lease=lease)
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


def assert_legal_history(queue: JobQueue, job: Job) -> None:
    """The moves in a job's history are legal, follow each other without a gap, and end at its state."""
    moves = [event.data for event in queue.events(job.id) if event.data and "to" in event.data]
    at = moves[0]["from"] if moves else job.status
    for move in moves:
        assert move["from"] == at and JobStatus(move["to"]) in TRANSITIONS[JobStatus(at)]
        at = move["to"]
    assert at == job.status


# ---- submission ----


def test_a_job_is_read_as_it_was_submitted(queue: JobQueue) -> None:
    wanted = spec("triage", num_workers=2, priority=3, precision="fp32", validation="/held.jsonl", lora={"r": 8})
    job, created = queue.submit(
        wanted, cluster="c", base="b", dataset_sha="d1", validation_sha="v1", code_version="2", tenant="t"
    )
    assert created and job == queue.get(job.id) and job.spec == wanted
    assert job.id.startswith("job-") and len(job.id) == 16
    assert (job.tenant, job.cluster, job.status, job.priority, job.base) == ("t", "c", QUEUED, 3, "b")
    assert (job.session_key, job.num_workers, job.code_version) == ("base|fp32|2", 2, "2")
    assert (job.dataset_sha, job.validation_sha, job.attempt) == ("d1", "v1", 0)
    assert job.created_at == job.updated_at > 1000.0
    assert (job.started_at, job.finished_at, job.session_id, job.wish, job.error, job.progress, job.result) == (
        None,
    ) * 7
    [event] = queue.events(job.id)
    assert (event.subject, event.level, event.message) == (job.id, "info", "submitted")


def test_the_same_content_is_the_same_job(queue: JobQueue) -> None:
    job, created = submit(queue)
    assert created
    for status in (QUEUED, RUNNING, SUCCEEDED):
        if status is RUNNING:
            queue.assign(job.id, running_session(queue).id)
        elif status is SUCCEEDED:
            queue.move(job.id, RUNNING, SUCCEEDED, message="done")
        same, created = submit(queue)
        assert (same.id, same.status, created) == (job.id, status, False)
    assert submit(queue, "b")[1], "another adapter is another job"
    for change in ({"cluster": "c2"}, {"tenant": "t2"}, {"dataset_sha": "d2"}):
        known = {"cluster": "c", "base": "base", "dataset_sha": "d1", "code_version": "v1"}
        assert queue.submit(spec(), **known | change)[1], f"{change} is another job"
    assert len(queue.list()) == 5


@pytest.mark.parametrize("ended", [FAILED, CANCELLED])
def test_a_job_that_failed_or_was_cancelled_can_be_sent_again(queue: JobQueue, ended: JobStatus) -> None:
    job, _ = submit(queue)
    queue.move(job.id, QUEUED, ended, message="over")
    second, created = submit(queue)
    assert created and second.id != job.id
    assert submit(queue) == (second, False)
    assert queue.get(job.id).status is ended


def test_again_makes_another_job_which_then_is_the_one_that_is_found(queue: JobQueue) -> None:
    first, _ = submit(queue)
    second, created = submit(queue, again=True)
    third, created_too = submit(queue, again=True)
    assert created and created_too and len({first.id, second.id, third.id}) == 3
    assert submit(queue) == (third, False)
    queue.move(first.id, QUEUED, CANCELLED, message="over")
    queue.move(third.id, QUEUED, FAILED, message="over")
    assert submit(queue) == (second, False)


def test_a_waiting_job_takes_the_priority_of_its_newest_submission(queue: JobQueue) -> None:
    job, _ = submit(queue)
    urgent, created = submit(queue, priority=5)
    assert (urgent.id, urgent.priority, urgent.spec.priority, created) == (job.id, 5, 5, False)
    assert [event.message for event in queue.events(job.id)] == ["submitted", "priority 0 -> 5"]
    queue.assign(job.id, running_session(queue).id)
    assert submit(queue, priority=9)[0].priority == 5


def test_racing_submitters_of_the_same_content_get_one_job(url: str) -> None:
    queues = [JobQueue(url) for _ in range(6)]
    with ThreadPoolExecutor(len(queues)) as pool:
        for round_ in range(8):
            ready = threading.Barrier(len(queues))

            def send(queue: JobQueue, ready: threading.Barrier = ready, name: str = f"a{round_}") -> tuple[str, bool]:
                ready.wait()
                job, created = submit(queue, name)
                return job.id, created

            answers = list(pool.map(send, queues))
            assert len({id_ for id_, _ in answers}) == 1
            assert sum(created for _, created in answers) == 1
    for queue in queues:
        queue.close()


# ---- states ----


@pytest.mark.parametrize("from_", list(JobStatus))
def test_only_listed_moves_are_possible_and_final_states_stay(queue: JobQueue, from_: JobStatus) -> None:
    for to in set(JobStatus) - {RUNNING}:
        job = bring_to(queue, from_)
        known = queue.events(job.id)
        if to in TRANSITIONS[from_]:
            assert queue.move(job.id, from_, to, message="go", error="why", data={"n": 1})
            assert (queue.get(job.id).status, queue.get(job.id).error) == (to, "why")
            event = queue.events(job.id)[-1]
            assert (event.message, event.data) == ("go", {"from": from_, "to": to, "n": 1})
            assert event.level == ("error" if to is FAILED else "info")
        else:
            with pytest.raises(IllegalTransitionError, match=f"{job.id} is {from_} and cannot become {to}"):
                queue.move(job.id, from_, to, message="no", error="no")
            assert (queue.get(job.id), queue.events(job.id)) == (job, known)
        assert_legal_history(queue, queue.get(job.id))


@pytest.mark.parametrize("status", list(JobStatus))
def test_a_move_from_a_state_that_is_no_longer_true_changes_nothing(queue: JobQueue, status: JobStatus) -> None:
    job = bring_to(queue, status)
    known, session = queue.events(job.id), running_session(queue)
    for believed in set(JobStatus) - {status}:
        for to in TRANSITIONS[believed] - {RUNNING}:
            assert not queue.move(job.id, believed, to, message="late", error="late", result={"late": 1})
    if status is not QUEUED:
        assert not queue.assign(job.id, session.id)
    assert (queue.get(job.id), queue.events(job.id)) == (job, known)
    assert not queue.move("job-none", QUEUED, FAILED, message="nobody")


def test_of_two_racing_movers_one_wins(url: str) -> None:
    one, two = JobQueue(url), JobQueue(url)
    with ThreadPoolExecutor(2) as pool:
        for round_ in range(20):
            job, _ = submit(one, f"a{round_}")
            ready = threading.Barrier(2)

            def go(queue: JobQueue, to: JobStatus, ready: threading.Barrier = ready, job_id: str = job.id) -> bool:
                ready.wait()
                return queue.move(job_id, QUEUED, to, message=f"to {to}", error=str(to))

            won = list(pool.map(go, [one, two], [FAILED, CANCELLED]))
            assert sorted(won) == [False, True]
            after = one.get(job.id)
            assert after.status is (FAILED if won[0] else CANCELLED) and after.error == after.status
            assert [event.message for event in one.events(job.id)] == ["submitted", f"to {after.status}"]
    one.close()
    two.close()


def test_times_attempts_and_results_follow_the_moves(queue: JobQueue) -> None:
    job, _ = submit(queue)
    session = running_session(queue)
    assert queue.assign(job.id, session.id)
    first = queue.get(job.id)
    assert (first.status, first.session_id, first.attempt) == (RUNNING, session.id, 1)
    assert first.started_at is not None and first.finished_at is None
    assert queue.move(job.id, RUNNING, QUEUED, message="rank lost")
    back = queue.get(job.id)
    assert (back.session_id, back.attempt, back.started_at) == (None, 1, first.started_at)
    assert queue.assign(job.id, session.id) and queue.get(job.id).attempt == 2
    assert queue.move(job.id, RUNNING, SUCCEEDED, message="done", result={"version": "abc"})
    end = queue.get(job.id)
    assert (end.result, end.started_at, end.session_id) == ({"version": "abc"}, first.started_at, session.id)
    assert end.finished_at is not None and end.finished_at > first.started_at


@dataclass
class Broken:
    """A database whose events cannot be written for a while."""

    url: str

    def __enter__(self) -> None:
        self._rename("events", "gone")

    def __exit__(self, *_: object) -> None:
        self._rename("gone", "events")

    def _rename(self, old: str, new: str) -> None:
        engine = sa.create_engine(self.url.replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as connection:
            connection.execute(sa.text(f"ALTER TABLE {old} RENAME TO {new}"))
        engine.dispose()


def test_a_change_and_its_event_are_one_transaction(queue: JobQueue, url: str) -> None:
    waiting, at_work = bring_to(queue, QUEUED), bring_to(queue, RUNNING, "b")
    session, launching = running_session(queue), queue.create_session(KEY, "c", 1)
    assert launching is not None
    changes: list[Callable[[], object]] = [
        lambda: submit(queue, "new"),
        lambda: submit(queue, priority=3),
        lambda: queue.assign(waiting.id, session.id),
        lambda: queue.move(waiting.id, QUEUED, FAILED, message="m", error="e"),
        lambda: queue.wish(waiting.id, Wish.CANCEL),
        lambda: queue.wish(at_work.id, Wish.CANCEL),
        lambda: queue.create_session(KEY, "c", 1),
        lambda: queue.session_move(launching.id, SessionState.LAUNCHING, SessionState.ENDED, reason="r"),
        lambda: queue.stop_session(session.id, "r"),
    ]
    before = queue.list(), queue.sessions("c")
    with Broken(url):
        for change in changes:
            with pytest.raises((DatabaseUnavailableError, sa.exc.ProgrammingError), match="events"):
                change()
    assert (queue.list(), queue.sessions("c")) == before
    for change in changes[3:4] + changes[5:]:
        assert change(), "the same change is possible when events can be written"
    assert queue.list() != before[0] and queue.sessions("c") != before[1]


def test_the_state_tables_say_what_users_were_promised() -> None:
    assert {SUCCEEDED, FAILED, CANCELLED} == TERMINAL
    for status in set(JobStatus) - TERMINAL:
        assert TRANSITIONS[status] >= {FAILED, CANCELLED}, "whatever has not ended can fail and be cancelled"
    into = {to: {from_ for from_, moves in TRANSITIONS.items() if to in moves} for to in JobStatus}
    assert into[RUNNING] == {QUEUED}, "a job runs only after it waited in the queue"
    assert into[SUCCEEDED] == {RUNNING}, "and succeeds only after it ran"
    assert into[QUEUED] == {JobStatus.VALIDATING_FILES, RUNNING, PAUSED}
    assert into[PAUSED] == {QUEUED, RUNNING}
    assert into[JobStatus.VALIDATING_FILES] == set()
    for state in set(SessionState) - {SessionState.ENDED}:
        assert SessionState.ENDED in SESSION_TRANSITIONS[state]
    assert SESSION_TRANSITIONS[SessionState.ENDED] == set()
    assert SESSION_TRANSITIONS[SessionState.STOPPING] == {SessionState.ENDED}, "who leaves does not come back"


def test_the_database_refuses_states_that_do_not_exist(queue: JobQueue) -> None:
    job, session = bring_to(queue, QUEUED), running_session(queue)
    for statement in (
        sa.update(jobs).values(status="done"),
        sa.update(jobs).values(status="running", session_id=None),
        sa.update(sessions).values(state="gone"),
    ):
        with pytest.raises(sa.exc.IntegrityError), queue._db.write() as connection:
            connection.execute(statement)
    assert queue.get(job.id) == job and queue.sessions("c")[-1].id == session.id


# ---- wishes ----


@pytest.mark.parametrize("status", [JobStatus.VALIDATING_FILES, QUEUED, PAUSED])
def test_a_waiting_job_is_cancelled_at_once(queue: JobQueue, status: JobStatus) -> None:
    job = bring_to(queue, status)
    after = queue.wish(job.id, Wish.CANCEL)
    assert (after.status, after.wish) == (CANCELLED, None) and after.finished_at is not None
    assert queue.events(job.id)[-1].message == "cancelled on request"


def test_a_running_job_keeps_running_with_the_wish_until_its_session_acts(queue: JobQueue) -> None:
    job = bring_to(queue, RUNNING)
    assert queue.wish(job.id, Wish.PAUSE).wish is Wish.PAUSE
    assert queue.wish(job.id, Wish.CANCEL).wish is Wish.CANCEL
    after = queue.wish(job.id, Wish.PAUSE)
    assert (after.status, after.wish) == (RUNNING, Wish.CANCEL), "cancel is not taken back by pause"
    assert [job.id for job in queue.assigned(str(after.session_id))] == [job.id]
    assert queue.move(job.id, RUNNING, CANCELLED, message="left", fence=(str(after.session_id), 1))
    assert queue.get(job.id).wish is None
    assert [event.message for event in queue.events(job.id)][2:] == ["asked to pause", "asked to cancel", "left"]


@pytest.mark.parametrize(("wish", "status"), [(Wish.CANCEL, CANCELLED), (Wish.PAUSE, PAUSED)])
def test_a_wish_outlives_the_session_it_was_meant_for(queue: JobQueue, wish: Wish, status: JobStatus) -> None:
    job = bring_to(queue, RUNNING)
    queue.wish(job.id, wish)
    assert queue.move(job.id, RUNNING, QUEUED, message="session lost")
    after = queue.get(job.id)
    assert (after.status, after.wish, after.session_id is None) == (status, None, status is PAUSED)
    assert queue.events(job.id)[-1].message == f"session lost; {status} as wished"


def test_a_paused_job_waits_and_an_ended_one_is_left_alone(queue: JobQueue) -> None:
    job = bring_to(queue, QUEUED)
    assert queue.wish(job.id, Wish.PAUSE).status is PAUSED
    assert queue.wish(job.id, Wish.PAUSE).status is PAUSED
    assert queue.move(job.id, PAUSED, QUEUED, message="go on")
    for status in TERMINAL - {CANCELLED}:
        ended = bring_to(queue, status)
        with pytest.raises(IllegalTransitionError, match=f"is {status} and cannot become cancelled"):
            queue.wish(ended.id, Wish.CANCEL)
        assert queue.get(ended.id) == ended
    with pytest.raises(JobNotFoundError, match="there is no job 'job-none'"):
        queue.wish("job-none", Wish.CANCEL)


# ---- sessions and fences ----


def test_a_session_is_launching_before_anything_is_started(queue: JobQueue) -> None:
    session = queue.create_session(KEY, "c", 2)
    assert session is not None and session == queue.session(session.id)
    assert (session.state, session.num_workers, session.session_key) == (SessionState.LAUNCHING, 2, KEY)
    assert session.ray_submission_id == f"{session.id}-a1"
    assert queue.sessions("c") == [session] and queue.sessions("other") == [] and queue.session("none") is None


@pytest.mark.parametrize("from_", list(SessionState))
def test_only_listed_session_moves_are_possible(queue: JobQueue, from_: SessionState) -> None:
    for to in SessionState:
        session = queue.create_session(KEY, "c", 1)
        assert session is not None
        if from_ is not SessionState.LAUNCHING:
            assert queue.session_move(session.id, SessionState.LAUNCHING, from_, reason="there")
        before = queue.session(session.id)
        if to in SESSION_TRANSITIONS[from_]:
            assert queue.session_move(session.id, from_, to, reason="go")
            after = queue.session(session.id)
            assert after is not None and (after.state, after.reason) == (to, "go")
            assert not queue.session_move(session.id, from_, to, reason="twice")
        else:
            with pytest.raises(IllegalTransitionError):
                queue.session_move(session.id, from_, to, reason="no")
            assert queue.session(session.id) == before


def test_jobs_go_only_to_a_running_session_that_stays(queue: JobQueue) -> None:
    job, _ = submit(queue)
    launching, leaving, ended = queue.create_session(KEY, "c", 1), running_session(queue), running_session(queue)
    assert launching is not None
    assert queue.stop_session(leaving.id, "room") and queue.stop_session(leaving.id, "room")
    assert queue.session_move(ended.id, SessionState.RUNNING, SessionState.ENDED, reason="over")
    assert not queue.stop_session(ended.id, "room")
    for session_id in (launching.id, leaving.id, ended.id, "session-none"):
        assert not queue.assign(job.id, session_id)
    assert queue.get(job.id).status is QUEUED
    asked = queue.session(leaving.id)
    assert asked is not None and (asked.wish, asked.reason, asked.state) == ("stop", "room", SessionState.RUNNING)


def test_a_stale_fence_can_neither_move_nor_progress_nor_renew(queue: JobQueue) -> None:
    job = bring_to(queue, RUNNING)
    session_id = str(job.session_id)
    assert queue.progress(job.id, session_id, 1, {"step": 1, "loss": 2.5})
    assert queue.renew_session(session_id, 1, 15)
    other = running_session(queue)

    def refused(fence: int) -> None:
        before = queue.get(job.id), queue.session(session_id), queue.events(job.id)
        assert not queue.progress(job.id, session_id, fence, {"step": 99})
        assert not queue.renew_session(session_id, fence, 15)
        assert not queue.session_move(session_id, SessionState.RUNNING, SessionState.STOPPING, reason="r", fence=fence)
        for to in TRANSITIONS[RUNNING]:
            assert not queue.move(job.id, RUNNING, to, message="stale", fence=(session_id, fence), error="stale")
        assert (queue.get(job.id), queue.session(session_id), queue.events(job.id)) == before

    refused(0)
    refused(2)
    assert not queue.move(job.id, RUNNING, FAILED, message="not ours", fence=(other.id, 1))
    assert not queue.progress(job.id, other.id, 1, {"step": 99})
    # Given up on, though it may live: from now on its own fence is stale.
    assert queue.session_move(session_id, SessionState.RUNNING, SessionState.ENDED, reason="lost")
    refused(1)
    assert queue.get(job.id).progress == {"step": 1, "loss": 2.5}


def test_a_driver_that_is_replaced_while_its_write_waits_writes_nothing(queue: JobQueue, url: str) -> None:
    job = bring_to(queue, RUNNING)
    session_id, stale = str(job.session_id), JobQueue(url)
    with ThreadPoolExecutor(1) as pool:
        with queue._db.write() as connection:
            connection.execute(sa.update(sessions).where(sessions.c.id == session_id).values(fence=2))
            connection.execute(sa.update(jobs).where(jobs.c.id == job.id).values(attempt=2))
            moved = pool.submit(
                stale.move, job.id, RUNNING, SUCCEEDED, message="stale", fence=(session_id, 1), result={"stale": 1}
            )
            time.sleep(0.3)
            assert not moved.done(), "it waits for the transaction that replaces it"
        assert not moved.result(30)
    stale.close()
    assert (queue.get(job.id).status, queue.get(job.id).result) == (RUNNING, None)


def test_a_session_that_leaves_for_want_of_work_does_not_cross_an_assignment(queue: JobQueue, url: str) -> None:
    other = JobQueue(url)
    job, session = submit(queue)[0], running_session(queue)
    running, stopping = SessionState.RUNNING, SessionState.STOPPING

    def leave() -> bool:
        return other.session_move(session.id, running, stopping, reason="idle", fence=1, only_idle=True)

    with ThreadPoolExecutor(1) as pool:
        with queue._db.write() as connection:
            # What assign() does, before its commit.
            connection.execute(sa.select(sessions.c.id).where(sessions.c.id == session.id).with_for_update())
            values = {"status": RUNNING, "session_id": session.id}
            connection.execute(sa.update(jobs).where(jobs.c.id == job.id).values(values))
            left = pool.submit(leave)
            time.sleep(0.3)
            assert not left.done()
        assert not left.result(30)
        assert queue.move(job.id, RUNNING, QUEUED, message="back")
        with queue._db.write() as connection:
            connection.execute(sa.update(sessions).where(sessions.c.id == session.id).values(state=stopping))
            assigned = pool.submit(other.assign, job.id, session.id)
            time.sleep(0.3)
            assert not assigned.done()
        assert not assigned.result(30)
    assert queue.get(job.id).status is QUEUED
    free = running_session(queue)
    assert queue.session_move(free.id, running, stopping, reason="idle", fence=1, only_idle=True)
    other.close()


def test_a_driver_renews_its_lease_by_the_given_clock(queue: JobQueue, clock: Clock) -> None:
    session = running_session(queue)
    assert session.lease_until is None
    assert queue.renew_session(session.id, 1, 15.0)
    renewed = queue.session(session.id)
    assert renewed is not None and renewed.lease_until is not None
    assert clock.now < renewed.lease_until <= clock.now + 15


# ---- leases ----


def test_a_lease_has_one_holder_and_its_token_grows(queue: JobQueue, clock: Clock) -> None:
    assert queue.lease("s") is None
    first = queue.acquire_lease("s", "one", 100)
    assert first == Lease("s", "one", 1)
    assert queue.acquire_lease("s", "two", 100) is None
    assert queue.acquire_lease("other", "two", 100) == Lease("other", "two", 1)
    clock.now += 80
    assert queue.acquire_lease("s", "one", 100) == first, "its holder prolongs it, with the same token"
    clock.now += 80
    assert queue.acquire_lease("s", "two", 100) is None
    held = queue.lease("s")
    assert held is not None and (held.holder, held.token, held.valid) == ("one", 1, True)
    clock.now += 200
    held = queue.lease("s")
    assert held is not None and not held.valid
    assert queue.acquire_lease("s", "two", 100) == Lease("s", "two", 2)
    assert queue.acquire_lease("s", "one", 100) is None
    clock.now += 200
    assert queue.acquire_lease("s", "two", 100) == Lease("s", "two", 3), "who was late is a new holder"


def test_what_an_old_holder_writes_changes_nothing(queue: JobQueue, clock: Clock) -> None:
    old = queue.acquire_lease("s", "one", 10)
    assert old is not None
    session = running_session(queue, old)
    idle, waiting, at_work = running_session(queue), bring_to(queue, QUEUED), bring_to(queue, RUNNING)
    clock.now += 1000
    assert queue.move(at_work.id, RUNNING, QUEUED, message="nobody took over yet", lease=old)
    assert queue.assign(at_work.id, session.id, lease=old)
    new = queue.acquire_lease("s", "two", 10_000)
    before = queue.list(), queue.sessions("c"), queue.events(waiting.id)
    for lease in (old, Lease("s", "two", 1), Lease("none", "one", 1)):
        assert queue.create_session(KEY, "c", 1, lease=lease) is None
        assert not queue.assign(waiting.id, session.id, lease=lease)
        assert not queue.move(waiting.id, QUEUED, FAILED, message="old", lease=lease)
        assert not queue.session_move(idle.id, SessionState.RUNNING, SessionState.ENDED, reason="old", lease=lease)
        assert not queue.stop_session(session.id, "old", lease=lease)
    assert (queue.list(), queue.sessions("c"), queue.events(waiting.id)) == before
    assert queue.assign(waiting.id, session.id, lease=new)


def test_a_lease_that_is_given_back_is_free_at_once(queue: JobQueue) -> None:
    first = queue.acquire_lease("s", "one", 1000)
    assert first is not None
    queue.release_lease(first)
    held = queue.lease("s")
    assert held is not None and not held.valid
    assert queue.create_session(KEY, "c", 1, lease=first) is None
    second = queue.acquire_lease("s", "two", 1000)
    assert second is not None and second.token > first.token
    queue.release_lease(first)
    assert queue.acquire_lease("s", "one", 1000) is None, "giving back what one no longer has takes it from nobody"


def test_racing_holders_get_one_lease(url: str) -> None:
    now = [0.0]
    queues = [JobQueue(url, lambda: now[0]) for _ in range(6)]
    with ThreadPoolExecutor(len(queues)) as pool:
        for round_ in range(8):
            ready = threading.Barrier(len(queues))

            def take(number: int, ready: threading.Barrier = ready, round_: int = round_) -> Lease | None:
                ready.wait()
                # A new lease in every even round, which runs out before the next one takes it over.
                return queues[number].acquire_lease(f"s{round_ // 2}", f"{round_}-{number}", 60.0)

            [got] = [lease for lease in pool.map(take, range(len(queues))) if lease is not None]
            assert got.token == 1 + round_ % 2
            now[0] += 100.0
    for queue in queues:
        queue.close()


# ---- reading ----


def test_a_job_is_found_by_the_start_of_its_id(queue: JobQueue) -> None:
    ids = [submit(queue, f"a{n}")[0].id for n in range(20)]
    for id_ in ids:
        assert queue.get(id_).id == queue.get(id_.removeprefix("job-")).id == queue.get(id_[:-1]).id == id_
    with pytest.raises(JobNotFoundError, match=r"could be job-\w+, .*: give more of the id") as caught:
        queue.get("job-")
    assert len(caught.value.matches) == 6
    for nothing in ("job-x", "%", "_", "job-____________"):
        with pytest.raises(JobNotFoundError, match="there is no job"):
            queue.get(nothing)


def test_jobs_are_listed_and_counted_by_cluster_and_state(queue: JobQueue) -> None:
    first, second = bring_to(queue, QUEUED, "a"), bring_to(queue, FAILED, "b")
    queue.submit(spec("a"), cluster="c2", base="base", dataset_sha="d1", code_version="v1")
    third = bring_to(queue, QUEUED, "c")
    assert [job.id for job in queue.list("c")] == [first.id, second.id, third.id]
    assert [job.id for job in queue.list("c", {QUEUED, RUNNING})] == [first.id, third.id]
    assert len(queue.list()) == 4 and queue.list("c", set()) == []
    assert queue.counts("c") == dict.fromkeys(JobStatus, 0) | {QUEUED: 2, FAILED: 1}


def test_history_can_be_followed_from_the_last_line_seen(queue: JobQueue) -> None:
    job, _ = submit(queue)
    queue.log(job.id, "checkpoint", level="warning", data={"step": 3})
    first, second = queue.events(job.id)
    assert (second.message, second.level, second.data) == ("checkpoint", "warning", {"step": 3})
    assert second.at > first.at and second.id > first.id
    assert queue.events(job.id, after=first.id) == [second] and queue.events(job.id, after=second.id) == []
    with pytest.raises(JobNotFoundError):
        queue.log("job-none", "nobody")


def test_text_and_figures_that_a_database_may_refuse_are_kept(queue: JobQueue) -> None:
    job = bring_to(queue, RUNNING)
    assert queue.progress(job.id, str(job.session_id), 1, {"loss": float("nan"), "best": float("inf")})
    progress = queue.get(job.id).progress
    assert progress is not None and progress["loss"] != progress["loss"] and progress["best"] == float("inf")
    assert queue.move(job.id, RUNNING, FAILED, message="bad \x00 byte", error="rank 0: \x00 and \ud800, ä")
    assert queue.get(job.id).error == "rank 0: � and ?, ä"


def test_a_random_life_leaves_a_legal_history(queue: JobQueue) -> None:
    """Whatever is called in whatever order: states change by listed moves only, and final ones never."""
    dice = random.Random(0)
    ids = [bring_to(queue, status).id for status in [QUEUED, RUNNING, PAUSED] * 2]
    session_ids = [running_session(queue).id for _ in range(2)]
    final: dict[str, Job] = {}
    for _ in range(250):
        id_, session_id = dice.choice(ids), dice.choice(session_ids)
        from_, to = dice.choice([queue.get(id_).status] * 7 + [*JobStatus]), dice.choice(list(JobStatus))
        fence = dice.choice([None, (session_id, 1), (session_id, 2)])
        try:
            match dice.randrange(4):
                case 0:
                    queue.assign(id_, session_id)
                case 1 if to is not RUNNING and dice.random() < (0.3 if to in TERMINAL else 1):
                    queue.move(id_, from_, to, message="random", fence=fence)
                case 2:
                    queue.progress(id_, session_id, 1, {"step": 1})
                case 3 if dice.random() < 0.05:
                    queue.wish(id_, dice.choice(list(Wish)))
        except IllegalTransitionError:
            pass
        job = queue.get(id_)
        assert final.setdefault(id_, job) == job if job.status in TERMINAL else id_ not in final
        assert (job.session_id is not None) >= (job.status is RUNNING)
        assert_legal_history(queue, job)
    assert {job.status for job in final.values()} >= {FAILED, CANCELLED}, "lives of several kinds ended"


def test_the_policy_plans_from_rows(queue: JobQueue) -> None:
    def planned(workers: int) -> list[Action]:
        rows = queue.list("c", {QUEUED}), queue.list("c", {RUNNING}), queue.sessions("c")
        return plan(*snapshot(*rows), Cluster(workers=workers))

    job, _ = submit(queue, priority=1)
    later, _ = submit(queue, "b", priority=2, num_workers=2)
    assert planned(3) == [Launch("base|auto|2", 2, later.id), Launch(KEY, 1, job.id)]
    session = queue.create_session(KEY, "c", 1)
    assert session is not None
    assert planned(3) == [Launch("base|auto|2", 2, later.id)]
    queue.session_move(session.id, SessionState.LAUNCHING, SessionState.RUNNING, reason="up")
    assert planned(2) == [Stop(session.id, f"its workers are needed by {later.id}")]
    assert planned(1) == [Assign(job.id, session.id)]
    queue.assign(job.id, session.id)
    assert planned(2) == []
    queue.move(job.id, RUNNING, QUEUED, message="back")
    other = running_session(queue)
    assert planned(1) == [Assign(job.id, session.id)]
    queue.stop_session(session.id, "room")
    assert planned(1) == [Assign(job.id, other.id)], "one that was asked to stop gets no job"
    queue.session_move(other.id, SessionState.RUNNING, SessionState.STOPPING, reason="nothing to do")
    assert planned(1) == [], "nor does one that stops by itself"
    for id_, state in ((session.id, SessionState.RUNNING), (other.id, SessionState.STOPPING)):
        assert planned(2) == [], "workers are held until the end"
        queue.session_move(id_, state, SessionState.ENDED, reason="over")
    assert planned(2) == [Launch("base|auto|2", 2, later.id)]
    ended = queue.sessions("c", list(SessionState))
    assert len(ended) == 2 and snapshot([], [], ended) == ([], [], [])


# ---- processes ----

PROCESSES, OWN, SHARED = 8, 12, 5


def live(url: str, number: int, ready: Any, answers: Any) -> None:
    """One process: open the new database together with all others, submit, and claim and finish whatever it can."""
    waits: list[float] = []

    def timed(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        answer = call(*args, **options)
        waits.append(time.perf_counter() - begun)
        return answer

    try:
        ready.wait(60)
        queue = JobQueue(url)
        created: list[str] = []
        for n in range(OWN):
            names = [f"own-{number}-{n}"] + ([f"shared-{n}"] if n < SHARED else [])
            for job, new in [timed(submit, queue, name) for name in names]:
                created += [job.id] if new else []
        session = running_session(queue)
        ready.wait(60)
        claimed: list[str] = []
        jobs = list(queue.list("c", {QUEUED}))
        random.Random(number).shuffle(jobs)
        for job in jobs:
            if timed(queue.assign, job.id, session.id):
                claimed.append(job.id)
                assert timed(queue.progress, job.id, session.id, 1, {"step": 1})
                assert timed(queue.move, job.id, RUNNING, SUCCEEDED, message="done", fence=(session.id, 1))
        queue.close()
        answers.put((created, claimed, max(waits), None))
    except BaseException:
        ready.abort()
        answers.put(([], [], 0.0, traceback.format_exc()))


def test_processes_that_share_a_new_database_lose_nothing(url: str) -> None:
    context = multiprocessing.get_context("forkserver")  # its server is a fresh process, without this one's threads
    context.set_forkserver_preload(["pytest", "jobs.job_queue", "psycopg", "sqlalchemy.dialects.postgresql"])
    ready, answers = context.Barrier(PROCESSES), context.Queue()
    workers = [context.Process(target=live, args=(url, n, ready, answers), daemon=True) for n in range(PROCESSES)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(30)
    failures = [error for *_, error in found if error]
    assert not failures, failures[0]
    created = [id_ for ids, *_ in found for id_ in ids]
    claimed = [id_ for _, ids, *_ in found for id_ in ids]
    queue = JobQueue(url)
    jobs = queue.list()
    assert len(jobs) == PROCESSES * OWN + SHARED
    assert sorted(created) == sorted(claimed) == sorted(job.id for job in jobs), "each made once and claimed once"
    assert queue.counts("c")[SUCCEEDED] == len(jobs)
    for job in jobs:
        assert_legal_history(queue, job)
        assert len(queue.events(job.id)) == 3 and job.progress == {"step": 1} and job.attempt == 1
    queue.close()
    # Seen: 0.05 s on an idle machine. Without the file lock eight SQLite writers made one wait for 2.4 s in 800 writes.
    assert max(longest for _, _, longest, _ in found) < 2.0


# ---- databases ----


def test_sqlite_readers_do_not_wait_for_a_writer_and_writers_take_turns(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/lora.db"
    one, two = JobQueue(url), JobQueue(url)
    job, _ = submit(one)
    with ThreadPoolExecutor(1) as pool:
        with one._db.write() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            connection.execute(sa.update(jobs).values(priority=77))
            assert two.get(job.id).priority == 0, "what is not committed is not seen, and not waited for"
            second = pool.submit(two.move, job.id, QUEUED, CANCELLED, message="second")
            time.sleep(0.3)
            assert not second.done()
        assert second.result(30)
    assert (one.get(job.id).priority, one.get(job.id).status) == (77, CANCELLED)
    one.close()
    two.close()


def test_sqlite_writers_queue_at_the_file_lock_and_keep_out_who_does_not_know_it(tmp_path: Path) -> None:
    queue = JobQueue(f"sqlite:///{tmp_path}/lora.db")
    job, _ = submit(queue)
    with ThreadPoolExecutor(1) as pool:
        with (tmp_path / "lora.db.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            moved = pool.submit(queue.move, job.id, QUEUED, CANCELLED, message="waits")
            time.sleep(0.3)
            assert not moved.done() and queue.get(job.id).status is QUEUED
        assert moved.result(30)
    with contextlib.closing(sqlite3.connect(tmp_path / "lora.db", timeout=0)) as stranger:
        # From its first statement on, before it changed anything: what it has read stays true until it writes.
        with queue._db.write(), pytest.raises(sqlite3.OperationalError, match="locked"):
            stranger.execute("BEGIN IMMEDIATE")
        stranger.execute("BEGIN IMMEDIATE")
    queue.close()


def test_sqlite_is_refused_for_a_cluster_of_several_nodes() -> None:
    check_database("sqlite:////data/lora.db", 1)
    check_database("postgresql+psycopg://u@h/d", 3)
    with pytest.raises(DatabaseSettingError) as caught:
        check_database("sqlite:////data/lora.db", 3)
    assert str(caught.value) == (
        "this cluster has 3 nodes, and only the processes of one node can share the SQLite file in LORA_DATABASE_URL: "
        "set LORA_DATABASE_URL=postgresql+psycopg://user:password@host/database"
    )


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("lora.db", "LORA_DATABASE_URL is not a database URL: set "),
        ("", "LORA_DATABASE_URL is not a database URL: set "),
        ("mysql://u:secret@h/d", "LORA_DATABASE_URL starts with 'mysql': set sqlite:////absolute/path/lora.db or "),
        ("postgresql+asyncpg://u:secret@h/d", "LORA_DATABASE_URL starts with 'postgresql+asyncpg': set "),
        ("sqlite://", "LORA_DATABASE_URL names no file: set "),
        ("sqlite:///:memory:", "LORA_DATABASE_URL names no file: set "),
        ("postgresql://u:secret@h:port/d", "LORA_DATABASE_URL is not a database URL: set "),
        ("sqlite:////proc/lora/lora.db", "cannot open the SQLite file /proc/lora/lora.db ("),
    ],
)
def test_a_setting_that_cannot_work_says_what_to_set(setting: str, sentence: str) -> None:
    with pytest.raises(DatabaseSettingError) as caught:
        JobQueue(setting)
    assert str(caught.value).startswith(sentence) and "secret" not in str(caught.value)


def test_a_server_that_does_not_answer_is_an_outage_and_its_password_stays_secret() -> None:
    with pytest.raises(DatabaseUnavailableError) as caught:
        JobQueue("postgres://lora:secret@127.0.0.1:1/lora")
    message = str(caught.value)
    assert message.startswith("the database postgresql+psycopg://lora:***@127.0.0.1:1/lora does not answer: ")
    assert "secret" not in message and "\n" not in message


def test_errors_survive_the_way_between_processes() -> None:
    for error in (
        JobNotFoundError("job-1", ["job-11", "job-12"]),
        IllegalTransitionError("job-1", SUCCEEDED, CANCELLED),
        DatabaseSettingError("set it"),
        DatabaseUnavailableError("away"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and str(copy) == str(error) and copy.args == error.args
