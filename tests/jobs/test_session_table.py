"""Sessions, fences and leases, on SQLite and PostgreSQL: whoever was replaced can write nothing."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import sqlalchemy as sa

from jobs.errors import IllegalTransitionError
from jobs.job import SESSION_TRANSITIONS, TRANSITIONS, Lease, SessionKey, SessionState
from jobs.store.jobs import JobQueue
from jobs.store.schema import jobs, sessions
from tests.support.queue_kit import FAILED, KEY, QUEUED, RUNNING, SUCCEEDED, Clock, bring_to, running_session, submit

pytest_plugins = ["tests.support.queue_kit"]


# ---- sessions and fences ----


def test_a_session_is_launching_before_anything_is_started(queue: JobQueue) -> None:
    session = queue.create_session(replace(KEY, num_workers=2), "c")
    assert session is not None and session == queue.session(session.id)
    assert (session.state, session.session_key) == (SessionState.LAUNCHING, SessionKey("base", "auto", 2))
    assert session.ray_submission_id == f"{session.id}-a1"
    assert queue.sessions("c") == [session] and queue.sessions("other") == [] and queue.session("none") is None


def test_a_jobs_precision_is_fixed_once_its_session_knows_it(queue: JobQueue) -> None:
    """Those that run there and those that come later go on in it, also elsewhere; a driver that was replaced says
    nothing."""
    facts = {"precision": "fp32", "why": "the faster one here", "exactness": "not exact on this CPU: it is random"}
    facts |= {"forward_path": "llama"}
    session = running_session(queue)
    assert session.session_keys == (KEY,)
    first, later, waiting = (submit(queue, name)[0] for name in ("a", "b", "c"))
    assert queue.assign(first.id, session.id)
    assert not queue.resolve_session(session.id, session.fence + 1, facts)
    assert queue.resolve_session(session.id, session.fence, facts)
    assert queue.assign(later.id, session.id)
    keys = [queue.get(job.id).session_key for job in (first, later, waiting)]
    resolved = SessionKey("base", "fp32", 1)
    assert keys == [resolved, resolved, KEY]
    known = queue.session(session.id)
    assert known is not None and known.session_keys == (KEY, resolved)
    assert known.facts == facts
    (told,) = [event for event in queue.events(first.id) if "computes in fp32" in event.message]
    assert "the faster one here" in told.message and "not exact" in told.message and told.level == "warning"


@pytest.mark.parametrize("from_", list(SessionState))
def test_only_listed_session_moves_are_possible(queue: JobQueue, from_: SessionState) -> None:
    for to in SessionState:
        session = queue.create_session(KEY, "c")
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
    launching, leaving, ended = queue.create_session(KEY, "c"), running_session(queue), running_session(queue)
    assert launching is not None
    assert queue.stop_session(leaving.id, "room") and queue.stop_session(leaving.id, "room")
    assert queue.session_move(ended.id, SessionState.RUNNING, SessionState.ENDED, reason="over")
    assert not queue.stop_session(ended.id, "room")
    for session_id in (launching.id, leaving.id, ended.id, "session-none"):
        assert not queue.assign(job.id, session_id)
    assert queue.get(job.id).status is QUEUED
    asked = queue.session(leaving.id)
    assert asked is not None and (asked.requested, asked.reason, asked.state) == ("stop", "room", SessionState.RUNNING)


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
        assert queue.create_session(KEY, "c", lease=lease) is None
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
    assert queue.create_session(KEY, "c", lease=first) is None
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
