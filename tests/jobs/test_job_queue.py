"""Jobs in the queue, on SQLite and PostgreSQL: legal moves only, one winner of every race, nothing lost."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import sqlalchemy as sa

from cluster.settings import Settings
from jobs.errors import DatabaseUnavailableError, IllegalTransitionError, JobNotFoundError, TooManyJobsError
from jobs.job import (
    SESSION_TRANSITIONS,
    TERMINAL,
    TRANSITIONS,
    ClientRequest,
    Job,
    JobStatus,
    JobSteps,
    RequestedAction,
    SessionKey,
    SessionState,
    StepMetrics,
)
from jobs.queue_snapshot import Line
from jobs.scheduling.fair_order import Rules
from jobs.scheduling.policy import Action, Assign, Launch, Preempt, Stop, plan
from jobs.scheduling.room import Cluster
from jobs.store.jobs import JobQueue
from jobs.store.lines import HEADS
from jobs.store.schema import jobs, sessions
from tests.support.queue_kit import (
    CANCELLED,
    FAILED,
    KEY,
    PAUSED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    Clock,
    assert_legal_history,
    bring_to,
    queued_job,
    running_jobs,
    running_session,
    spec,
    submit,
)

pytest_plugins = ["tests.support.queue_kit"]


# ---- submission ----


def test_a_job_is_read_as_it_was_submitted(queue: JobQueue) -> None:
    wanted = spec(
        "triage",
        num_workers=2,
        priority=3,
        precision="fp32",
        validation="/held.jsonl",
        lora={"r": 8, "rank_pattern": {"q_proj": 4, ".*_proj": 2}},
        init_adapter="b:first",
    )
    shas = {"dataset_sha": "d1", "validation_sha": "v1", "examples_sha": "e1", "init_adapter_sha": "a1"}
    job, created = queue.submit(wanted, cluster="c", base="b", code_version="2", tenant="t", **shas)
    assert created and job == queue.get(job.id) and job.spec == wanted
    assert job.id.startswith("job-") and len(job.id) == 16
    assert (job.tenant, job.cluster, job.status, job.priority, job.base) == ("t", "c", QUEUED, 3, "b")
    assert (job.session_key, job.code_version) == (SessionKey("base", "fp32", 2), "2")
    assert {name: getattr(job, name) for name in shas} == shas and job.attempt == 0
    assert list(job.spec.lora.rank_pattern) == ["q_proj", ".*_proj"]
    assert job.created_at == job.updated_at > 1000.0
    assert (job.started_at, job.finished_at, job.session_id, job.requested, job.error, job.progress, job.result) == (
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


def test_racing_submitters_of_a_tenant_share_its_limit(url: str) -> None:
    queues = [JobQueue(url) for _ in range(6)]
    with ThreadPoolExecutor(len(queues)) as pool:
        for tenant in map(str, range(6)):
            ready = threading.Barrier(len(queues))

            def send(number: int, tenant: str = tenant, ready: threading.Barrier | None = ready) -> Job | None:
                if ready is not None:
                    ready.wait()
                one = {"cluster": "c", "base": "base", "dataset_sha": "d", "code_version": "v", "tenant": tenant}
                try:
                    return queues[number].submit(spec(f"a{number}"), **one, most_unfinished=2)[0]
                except TooManyJobsError:
                    return None

            sent = {number: job for number, job in enumerate(pool.map(send, range(len(queues)))) if job is not None}
            assert len(sent) == 2
            assert all(send(number, ready=None) == job for number, job in sent.items()), "the same content is no more"
    assert queues[0].move(sent.popitem()[1].id, QUEUED, CANCELLED, message="gone")
    assert sum(send(number, ready=None) is not None for number in range(6)) == 2
    for queue in queues:
        queue.close()


def test_what_has_ended_is_forgotten_with_its_history(queue: JobQueue) -> None:
    all_of_them = [bring_to(queue, status, status) for status in JobStatus]
    ended = [job for job in all_of_them if job.status in TERMINAL]
    assert queue.ended_before(ended[1].finished_at or 0.0, 9) == [ended[0].id]
    assert queue.ended_before(2000.0, 2) == [job.id for job in ended[:2]]
    running = next(job for job in all_of_them if job.status is RUNNING)
    steps = (StepMetrics(1, 1.0, {"train_loss": 1.0}),)
    for job in (running, ended[0]):
        progress: Any = {"step": 1}
        assert queue.record_steps(str(job.session_id), 1, [JobSteps(job.id, progress, steps)])
    queue.forget([job.id for job in all_of_them])
    assert [job.id for job in queue.list()] == [job.id for job in all_of_them if job not in ended]
    for job in all_of_them:
        assert bool(queue.events(job.id)) == (job not in ended)
        assert bool(queue.step_metrics(job.id)) == (job is running)


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
    session, launching = running_session(queue), queue.create_session(KEY, "c")
    assert launching is not None
    changes: list[Callable[[], object]] = [
        lambda: submit(queue, "new"),
        lambda: submit(queue, priority=3),
        lambda: queue.assign(waiting.id, session.id),
        lambda: queue.move(waiting.id, QUEUED, FAILED, message="m", error="e"),
        lambda: queue.request(waiting.id, RequestedAction.CANCEL),
        lambda: queue.request(at_work.id, RequestedAction.CANCEL),
        lambda: queue.create_session(KEY, "c"),
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


# ---- requests ----


@pytest.mark.parametrize("status", [JobStatus.VALIDATING_FILES, QUEUED, PAUSED])
def test_a_waiting_job_is_cancelled_at_once(queue: JobQueue, status: JobStatus) -> None:
    job = bring_to(queue, status)
    after = queue.request(job.id, RequestedAction.CANCEL)
    assert (after.status, after.requested) == (CANCELLED, None) and after.finished_at is not None
    assert queue.events(job.id)[-1].message == "cancelled on request"


def test_a_running_job_runs_on_until_its_session_does_what_is_requested(queue: JobQueue) -> None:
    job = bring_to(queue, RUNNING)
    assert queue.request(job.id, RequestedAction.PAUSE).requested is RequestedAction.PAUSE
    assert queue.request(job.id, RequestedAction.CANCEL).requested is RequestedAction.CANCEL
    after = queue.request(job.id, RequestedAction.PAUSE)
    assert (after.status, after.requested) == (RUNNING, RequestedAction.CANCEL), "cancel is not taken back by pause"
    assert [job.id for job in queue.assigned(str(after.session_id))] == [job.id]
    assert queue.move(job.id, RUNNING, CANCELLED, message="left", fence=(str(after.session_id), 1))
    assert queue.get(job.id).requested is None
    assert [event.message for event in queue.events(job.id)][2:] == ["asked to pause", "asked to cancel", "left"]


@pytest.mark.parametrize(("action", "status"), [(RequestedAction.CANCEL, CANCELLED), (RequestedAction.PAUSE, PAUSED)])
def test_a_request_outlives_the_session_that_was_to_read_it(
    queue: JobQueue, action: RequestedAction, status: JobStatus
) -> None:
    job = bring_to(queue, RUNNING)
    queue.request(job.id, action)
    assert queue.move(job.id, RUNNING, QUEUED, message="session lost")
    after = queue.get(job.id)
    assert (after.status, after.requested, after.session_id is None) == (status, None, status is PAUSED)
    assert queue.events(job.id)[-1].message == f"session lost; {status} as requested"


def test_a_paused_job_waits_and_an_ended_one_is_left_alone(queue: JobQueue) -> None:
    job = bring_to(queue, QUEUED)
    assert queue.request(job.id, RequestedAction.PAUSE).status is PAUSED
    assert queue.request(job.id, RequestedAction.PAUSE).status is PAUSED
    assert queue.move(job.id, PAUSED, QUEUED, message="go on")
    for status in TERMINAL - {CANCELLED}:
        ended = bring_to(queue, status)
        with pytest.raises(IllegalTransitionError, match=f"is {status} and cannot become cancelled"):
            queue.request(ended.id, RequestedAction.CANCEL)
        assert queue.get(ended.id) == ended
    with pytest.raises(JobNotFoundError, match="there is no job 'job-none'"):
        queue.request("job-none", RequestedAction.CANCEL)


# ---- reading ----


def test_a_paused_job_goes_on_and_a_request_is_taken_back(queue: JobQueue) -> None:
    """An ended job stays as it is, and of two requests the one to cancel is followed."""
    job = bring_to(queue, PAUSED)
    assert queue.resume(job.id).status is QUEUED and queue.events(job.id)[-1].message == "resumed on request"
    assert queue.resume(job.id).status is QUEUED
    running = bring_to(queue, RUNNING, "b")
    queue.request(running.id, RequestedAction.PAUSE)
    assert queue.resume(running.id).requested is None
    queue.request(running.id, RequestedAction.PAUSE)
    queue.request(running.id, RequestedAction.CANCEL)
    assert queue.resume(running.id).requested is RequestedAction.CANCEL
    assert queue.move(running.id, RUNNING, PAUSED, message="its checkpoint is written")
    assert queue.get(running.id).status is CANCELLED, "not what the session took for requested"
    with pytest.raises(IllegalTransitionError, match="is cancelled and cannot become queued"):
        queue.resume(running.id)


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


def test_a_tenants_jobs_come_in_pages_by_what_was_sent_with_them(queue: JobQueue) -> None:
    """The same request is the same job in a window, and with a key for ever."""

    def made(name: str, key: str | None = None, metadata: dict[str, str] | None = None, tenant: str = "t") -> Job:
        digest = f"{name}{len(metadata or ())}"
        request = ClientRequest(document={"n": 1}, digest=digest, metadata=metadata, idempotency_key=key, window=100.0)
        options = {"cluster": "c", "base": "b", "dataset_sha": "d", "code_version": "v", "tenant": tenant}
        return queue.submit(spec(name), **options, request=request)[0]  # type: ignore[arg-type]

    first, second = made("a", metadata={'k"\\].$ö': "ü", "x": "1"}), made("b", metadata={"x": "2"})
    third, other = made("a", key="key"), made("a", tenant="other")
    assert (
        made("a", metadata=first.metadata).id == first.id
        and made("b", key="key").id == third.id == queue.find_by_key("t", "key").id
    )  # type: ignore[union-attr]
    assert (queue.get(first.id).metadata, queue.get(first.id).client_request) == ({'k"\\].$ö': "ü", "x": "1"}, {"n": 1})
    pages = [queue.page("t", 2), queue.page("t", 2, after=second.id), queue.page("t", 9, metadata={'k"\\].$ö': "ü"})]
    assert [([job.id for job in page], more) for page, more in pages] == [
        ([third.id, second.id], True), ([first.id], False), ([first.id], False)
    ]  # fmt: skip
    assert [job.id for job in queue.page("t", 9, metadata={})[0]] == [third.id]
    with pytest.raises(JobNotFoundError):
        queue.find("t", other.id)
    queue.log(first.id, "line")
    clock = queue._clock
    assert isinstance(clock, Clock)
    clock.now += 100.0
    later = made("a", metadata=first.metadata)
    assert later.id not in (first.id, third.id) and made("a", metadata={"x": "3"}).id != later.id


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
                    queue.request(id_, dice.choice(list(RequestedAction)))
        except IllegalTransitionError:
            pass
        job = queue.get(id_)
        assert final.setdefault(id_, job) == job if job.status in TERMINAL else id_ not in final
        assert (job.session_id is not None) >= (job.status is RUNNING)
        assert_legal_history(queue, job)
    assert {job.status for job in final.values()} >= {FAILED, CANCELLED}, "lives of several kinds ended"


def test_a_plan_is_made_from_the_oldest_jobs_of_each_line(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(name: str, tenant: str = "t", **options: int) -> Job:
        known = {"cluster": "c", "base": "base", "dataset_sha": "d", "code_version": "v", "tenant": tenant}
        return queue.submit(spec(name, **options), **known, step_tokens=7)[0]  # type: ignore[arg-type]

    jobs_of = [made(f"a{n}") for n in range(HEADS + 2)]
    urgent, other = made("b", priority=1), made("c", "u")
    queue.submit(spec("d"), cluster="c2", base="base", dataset_sha="d", code_version="v")
    session = running_session(queue)
    assert queue.assign(jobs_of[1].id, session.id), "one that is not the oldest"
    assert queue.snapshot("c").lines == []
    assert queue.assign(jobs_of[0].id, session.id, level=4) and queue.assign(other.id, session.id)
    found = queue.snapshot("c")
    assert {job.id for job in found.queued} == {urgent.id} | {job.id for job in jobs_of[2:]}
    assert [job for job in found.queued if job.id == urgent.id] == [
        queued_job(urgent.id, KEY, priority=1, step_tokens=7, created_at=urgent.created_at)
    ]
    assert sorted(found.running, key=lambda one: one.tenant) == [
        running_jobs(session.id, 2, level=4, step_tokens=14),
        running_jobs(session.id, tenant="u", step_tokens=7),
    ]
    assert found.sessions == queue.sessions("c")
    assert {(line.tenant, line.priority, line.mean_workers) for line in found.lines} == {("t", 0, 0.0), ("u", 0, 0.0)}
    held = [replace(line, mean_workers=2.0, at=found.at) for line in found.lines]
    assert queue.write_lines(
        "c", [held[0], Line(tenant="v", priority=3, mean_workers=1.0, at=0.0, served_at=None)], -1.0
    )
    assert {line.mean_workers for line in queue.snapshot("c").lines} == {2.0, 0.0, 1.0}
    assert queue.write_lines("c", held, 1.0) and len(queue.snapshot("c").lines) == 2
    assert queue.oldest_queued("c") == jobs_of[2].updated_at and queue.oldest_queued("none") is None
    assert queue.has_jobs("c", QUEUED, FAILED) and not queue.has_jobs("c", FAILED)
    assert list(queue.waiting_for("c", KEY))[:2] == [jobs_of[2].id, jobs_of[3].id]
    assert queue.waiting_for("c", replace(KEY, forward_path="llama")) == {}
    assert queue.without_session("c") == []
    queue.session_move(session.id, SessionState.RUNNING, SessionState.ENDED, reason="gone")
    assert {job.id for job in queue.without_session("c")} == {jobs_of[0].id, jobs_of[1].id, other.id}


def test_a_session_that_gives_way_puts_its_jobs_back_into_the_queue(queue: JobQueue) -> None:
    """What a user asks of one counts more, and no attempt of theirs is lost."""
    first, second, third = (submit(queue, name)[0] for name in ("a", "b", "c"))
    session = running_session(queue)
    for job in (first, second, third):
        assert queue.assign(job.id, session.id)
    queue.request(first.id, RequestedAction.CANCEL)
    assert queue.preempt_session(session.id, "room") and not queue.preempt_session(session.id, "room")
    assert queue.snapshot("c").sessions[0].leaving
    requested = [queue.get(job.id).requested for job in (first, second, third)]
    assert requested == [RequestedAction.CANCEL, RequestedAction.REQUEUE, RequestedAction.REQUEUE]
    assert queue.request(second.id, RequestedAction.PAUSE).requested is RequestedAction.PAUSE
    assert queue.resume(third.id).requested is RequestedAction.REQUEUE
    for job in (first, second, third):
        assert queue.move(job.id, RUNNING, QUEUED, message="left", fence=(session.id, 1))
    after = [queue.get(job.id) for job in (first, second, third)]
    assert [job.status for job in after] == [CANCELLED, PAUSED, QUEUED]
    assert {job.lost_attempts for job in after} == {0} and after[2].requested is None
    assert queue.snapshot("c").queued[0].waits_since == after[2].updated_at
    assert queue.events(third.id)[2].message == "asked to give way to a job of a higher priority"


def test_a_tenant_may_have_so_many_jobs_that_wait(queue: JobQueue) -> None:
    known = {"cluster": "c", "base": "base", "dataset_sha": "d", "code_version": "v"}
    jobs_of = [queue.submit(spec(name), **known, most_queued=2)[0] for name in "ab"]
    with pytest.raises(TooManyJobsError, match="there may be 2 waiting jobs; wait for one"):
        queue.submit(spec("c"), **known, most_queued=2)
    assert queue.submit(spec("a"), **known, most_queued=2) == (jobs_of[0], False)
    assert queue.submit(spec("c"), **known, tenant="u", most_queued=2)[1]
    queue.assign(jobs_of[0].id, running_session(queue).id)
    assert queue.submit(spec("c"), **known, most_queued=2)[1]


WIDE = SessionKey("base", "auto", 2)


def test_the_policy_plans_from_rows(queue: JobQueue) -> None:
    def planned(workers: int) -> list[Action]:
        cluster = Cluster(workers=workers, jobs_per_session=1, step_tokens=1)
        return plan(queue.snapshot("c"), cluster, Rules.of(Settings()))[0]

    job, _ = submit(queue, priority=1)
    later, _ = submit(queue, "b", priority=2, num_workers=2)
    assert planned(3) == [Launch(WIDE, later.id), Launch(KEY, job.id)]
    session = queue.create_session(KEY, "c")
    assert session is not None
    assert planned(3) == [Launch(WIDE, later.id)]
    queue.session_move(session.id, SessionState.LAUNCHING, SessionState.RUNNING, reason="up")
    assert planned(2) == [Stop(session.id, f"its workers are needed by {later.id}")]
    assert planned(1) == [Assign(job.id, session.id)]
    queue.assign(job.id, session.id)
    assert planned(2) == [Preempt(session.id, f"its workers are needed by {later.id}, of priority 2")]
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
    assert planned(2) == [Launch(WIDE, later.id)]
