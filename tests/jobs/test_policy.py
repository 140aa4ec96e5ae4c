"""The policy: order, capacity, reuse and room over random queues; and every job ends when the plans are carried out."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.job import Job, JobStatus, Session, SessionKey, SessionState
from jobs.scheduling import policy
from jobs.scheduling.policy import Action, Assign, Cluster, Launch, Stop
from tests.support.queue_kit import job_row, session_row

pytest_plugins = ["tests.support.queue_kit"]

T = TypeVar("T")
WIDTH = {"a": 1, "b": 1, "c": 2, "d": 3, "e": 5}  # a base model stands for its number of workers too


def plan(*rows: Any) -> list[Action]:
    return policy.plan(*rows)[0]


def reasons(*rows: Any) -> dict[str, str]:
    return policy.plan(*rows)[1]


def key(base_model: str) -> SessionKey:
    return SessionKey(base_model, "auto", WIDTH[base_model])


def waiting(id_: str, base: str, priority: int = 0, at: float = 0.0, max_colocated: int | None = None) -> Job:
    return job_row(id_, key(base), priority=priority, created_at=at, max_colocated=max_colocated)


def at_work(id_: str, session_id: str, max_colocated: int | None = None) -> Job:
    return job_row(id_, key("a"), status=JobStatus.RUNNING, session_id=session_id, max_colocated=max_colocated)


def cluster(workers: int, jobs_per_session: int = 1) -> Cluster:
    return Cluster(workers=workers, jobs_per_session=jobs_per_session)


def session(id_: str, base: str, launching: bool = False, leaving: bool = False, at: float = 0.0) -> Session:
    state = SessionState.LAUNCHING if launching else SessionState.RUNNING
    return session_row(id_, key(base), state=state, requested="stop" if leaving else None, created_at=at)


def test_a_session_takes_jobs_of_the_precision_that_auto_was() -> None:
    resolved = replace(session("s", "c"), resolved_precision="bf16")
    for precision, expected in (("bf16", [Assign("j", "s")]), ("auto", [Assign("j", "s")]), ("fp32", [])):
        job = replace(waiting("j", "c"), precision=precision)
        found = plan([job], [], [resolved], cluster(2))
        assert [action for action in found if isinstance(action, Assign)] == expected


def test_jobs_of_two_forward_paths_never_share_a_session() -> None:
    fused = replace(session("s", "c"), forward_path="llama")
    job = replace(waiting("j", "c"), forward_path="hooks")
    assert plan([job], [], [fused], cluster(4)) == [Launch(job.session_key, "j")]


@dataclass(frozen=True)
class Case:
    """A queue, its cluster, and what was planned."""

    queued: list[Job]
    running: list[Job]
    sessions: list[Session]
    cluster: Cluster

    @cached_property
    def actions(self) -> list[Action]:
        return plan(self.queued, self.running, self.sessions, self.cluster)

    def of(self, kind: type[T]) -> list[T]:
        return [action for action in self.actions if isinstance(action, kind)]

    @cached_property
    def in_order(self) -> list[Job]:
        fitting = [job for job in self.queued if job.num_workers <= self.cluster.workers]
        return sorted(fitting, key=lambda job: (-job.priority, job.created_at, job.id))

    @cached_property
    def served(self) -> list[str]:
        return [action.job_id for action in self.of(Assign) + self.of(Launch)]

    @cached_property
    def staying(self) -> dict[str, Session]:
        return {session.id: session for session in self.sessions if not session.leaving}

    def colocated(self, session_id: str) -> list[int | None]:
        """Of the jobs in a session before the plan."""
        return [job.max_colocated for job in self.running if job.session_id == session_id]

    @cached_property
    def idle(self) -> list[Session]:
        """Sessions without a job that stay."""
        return [session for session in self.staying.values() if not self.colocated(session.id)]

    @cached_property
    def unserved(self) -> Job | None:
        """The first job for which there is neither a session nor one to come, however full."""
        to_come = {session.session_key for session in self.staying.values() if session.launching}
        to_come |= {launch.session_key for launch in self.of(Launch)}
        for job in self.in_order:
            if job.id not in self.served and job.session_key not in to_come:
                return job
        return None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any queue on any cluster, also on one that lost nodes since its sessions were launched."""
    bases, limits = st.sampled_from(sorted(WIDTH)), st.sampled_from([None, None, 0, 1, 2])
    jobs = draw(st.lists(st.tuples(bases, st.integers(-1, 1), st.integers(0, 3), limits), max_size=6))
    states = st.sampled_from(["launching", "idle", "busy", "leaving"])
    rows = draw(st.lists(st.tuples(bases, states, st.lists(limits, min_size=1, max_size=3)), max_size=5))
    queued = [waiting(f"job-{number}", *job) for number, job in enumerate(jobs)]
    sessions = [
        session(f"s{n}", base, state == "launching", state == "leaving") for n, (base, state, _) in enumerate(rows)
    ]
    running = [
        at_work(f"run-{n}-{m}", f"s{n}", limit)
        for n, (_, state, inside) in enumerate(rows)
        if state == "busy"
        for m, limit in enumerate(inside)
    ]
    return Case(queued, running, sessions, cluster(draw(st.integers(0, 8)), draw(st.integers(1, 4))))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(cases())
def test_every_plan_keeps_order_capacity_and_sessions(case: Case) -> None:
    check_each_once(case)
    check_colocated(case)
    check_launches(case)
    check_nobody_is_overtaken(case)
    check_stops(case)
    shuffled = [random.Random(1).sample(rows, len(rows)) for rows in (case.queued, case.running, case.sessions)]
    assert plan(*shuffled, case.cluster) == case.actions == plan(case.queued, case.running, case.sessions, case.cluster)


def check_each_once(case: Case) -> None:
    """A job is served once, by a session of its key that runs and stays; none of those is stopped."""
    assert len(set(case.served)) == len(case.served)
    stopped = [stop.session_id for stop in case.of(Stop)]
    given = {assign.session_id for assign in case.of(Assign)}
    assert len(set(stopped)) == len(stopped) and not given & set(stopped)
    keys = {job.id: job.session_key for job in case.in_order}
    for assign in case.of(Assign):
        chosen = case.staying[assign.session_id]
        assert chosen.session_key == keys[assign.job_id] and not chosen.launching
    assert set(stopped) <= {session.id for session in case.idle}


def check_colocated(case: Case) -> None:
    """Nobody trains beside more than it may, nor joins others while a session of its key is idle."""
    limits = {job.id: job.max_colocated for job in case.in_order}
    newcomers: dict[str, list[int | None]] = {}
    for assign in case.of(Assign):
        newcomers.setdefault(assign.session_id, []).append(limits[assign.job_id])
    for session_id, joined in newcomers.items():
        inside = case.colocated(session_id) + joined
        assert len(inside) <= case.cluster.jobs_per_session
        assert all(limit is None or len(inside) - 1 <= limit for limit in inside)
        if len(inside) > 1:
            same = case.staying[session_id].session_key
            assert all(s.id in newcomers or s.launching for s in case.idle if s.session_key == same)


def check_launches(case: Case) -> None:
    """A launch fits beside all sessions, those that leave included, and every idle one of its key has got a job."""
    launches = case.of(Launch)
    jobs = {job.id: job for job in case.in_order}
    assert all(launch.session_key == jobs[launch.job_id].session_key for launch in launches)
    held = sum(session.num_workers for session in case.sessions)
    assert not launches or held + sum(launch.session_key.num_workers for launch in launches) <= case.cluster.workers
    for of in {launch.session_key for launch in launches}:
        mine = [launch.job_id for launch in launches if launch.session_key == of]
        same = [job.id for job in case.in_order if job.session_key == of]
        idle = [session for session in case.idle if session.session_key == of]
        assert same.index(mine[0]) >= len(idle)


def check_nobody_is_overtaken(case: Case) -> None:
    """From the first job on that has no place, nobody is served."""
    if case.unserved is not None:
        behind = case.in_order[case.in_order.index(case.unserved) :]
        assert not {job.id for job in behind} & set(case.served)


def check_stops(case: Case) -> None:
    """Room is made by idle sessions that nobody takes, for a job that no free workers are enough for, and by no session
    more than it takes.
    """
    stopped = [case.staying[stop.session_id].num_workers for stop in case.of(Stop)]
    if not stopped:
        return
    blocked = next(job for job in case.in_order if case.of(Stop)[0].reason.endswith(f" {job.id}"))
    assert blocked.id not in case.served
    launched = sum(launch.session_key.num_workers for launch in case.of(Launch))
    free = case.cluster.workers - sum(session.num_workers for session in case.sessions) - launched
    missing = blocked.num_workers - free - sum(s.num_workers for s in case.sessions if s.leaving)
    assert sum(stopped) >= missing > 0 and all(sum(stopped) - width < missing for width in stopped)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(WIDTH)), st.integers(-1, 1), st.integers(0, 12)), min_size=1, max_size=8),
    st.integers(5, 8),
    st.integers(1, 3),
)
def test_every_job_ends_when_the_plans_are_carried_out(
    arrivals: list[tuple[str, int, int]], workers: int, most: int
) -> None:
    """A session launches in one round and ends one round after it was asked to; a job takes three rounds, and every
    third one has to be by itself.
    """
    alone = {f"job-{n}": None if n % 3 else 0 for n in range(len(arrivals))}
    jobs = [waiting(f"job-{n}", *arrival, alone[f"job-{n}"]) for n, arrival in enumerate(arrivals)]
    pending, done = list(jobs), 0
    left: dict[str, int] = {}  # job -> rounds to go
    place: dict[str, str] = {}  # job -> session
    sessions: dict[str, Session] = {}
    for now in range(400):
        here = [job for job in pending if job.created_at <= now]
        running = [at_work(job, place[job], alone[job]) for job in left]
        actions: list[Action] = plan(here, running, list(sessions.values()), cluster(workers, most))
        sessions = {id_: replace(s, state=SessionState.RUNNING) for id_, s in sessions.items() if not s.leaving}
        for job in [job for job in left if left[job] == 1]:
            del left[job]
            done += 1
        left = {job: rounds - 1 for job, rounds in left.items()}
        for action in actions:
            match action:
                case Launch(SessionKey(base), _):
                    number = f"s{now}-{len(sessions)}"
                    sessions[number] = session(number, base, launching=True, at=now)
                case Assign(job_id, session_id):
                    pending = [job for job in pending if job.id != job_id]
                    left[job_id], place[job_id] = 3, session_id
                case Stop(session_id, _):
                    sessions[session_id] = replace(sessions[session_id], requested="stop")
        assert sum(s.num_workers for s in sessions.values()) <= workers
        inside = Counter(place[job] for job in left)
        assert all(count <= most for count in inside.values())
        assert all(inside[place[job]] == 1 for job in left if alone[job] == 0)
        if done == len(jobs):
            return
    raise AssertionError(f"{len(jobs) - done} jobs still wait")


def test_priority_then_arrival() -> None:
    queued = [waiting("late", "a", 0, 2.0), waiting("early", "a", 0, 1.0), waiting("urgent", "a", 1, 3.0)]
    assert plan(queued, [], [session("s", "a")], cluster(1)) == [
        Assign("urgent", "s"),
    ]
    assert plan(queued, [], [], cluster(2)) == [Launch(key("a"), "urgent"), Launch(key("a"), "early")]


def test_an_idle_session_of_the_same_key_is_reused_before_one_is_launched() -> None:
    sessions = [session("old", "b"), session("same", "a"), session("starting", "a", launching=True)]
    assert plan([waiting("j", "a")], [], sessions, cluster(8)) == [Assign("j", "same")]
    # The second waits for the one that is being launched; the third gets its own.
    three = [waiting("j1", "a", 0, 1), waiting("j2", "a", 0, 2), waiting("j3", "a", 0, 3)]
    assert plan(three, [], sessions, cluster(8)) == [Assign("j1", "same"), Launch(key("a"), "j3")]


def test_an_idle_session_of_another_key_makes_room_only_when_it_must() -> None:
    idle = session("idle", "b")
    assert plan([waiting("j", "a")], [], [idle], cluster(2)) == [Launch(key("a"), "j")]
    [stop] = plan([waiting("j", "a")], [], [idle], cluster(1))
    assert stop == Stop("idle", "its workers are needed by j")
    assert plan([waiting("j", "a")], [], [replace(idle, requested="stop")], cluster(1)) == []
    busy = [at_work("r", "idle")]
    assert plan([waiting("j", "a")], busy, [idle], cluster(1)) == []


def test_nothing_overtakes_the_first_job_that_does_not_fit() -> None:
    busy = [at_work("r", "s1")]
    sessions = [session("s1", "c"), session("s2", "a")]
    queued = [waiting("wide", "e", 0, 1), waiting("small", "a", 0, 2)]
    assert plan(queued, busy, sessions, cluster(5)) == []
    # One that can never fit is no reason to wait.
    assert plan(queued, busy, sessions, cluster(4)) == [Assign("small", "s2")]


def test_a_job_trains_beside_others_where_no_worker_is_free() -> None:
    """In the emptiest session of its key; with a worker to be had, on that."""
    sessions = [session("crowded", "a"), session("emptier", "a"), session("other", "b")]
    busy = [at_work("r1", "crowded"), at_work("r2", "crowded"), at_work("r3", "emptier"), at_work("r4", "other")]
    two = [waiting("j1", "a", 0, 1), waiting("j2", "a", 0, 2)]
    assert plan(two, busy, sessions, cluster(3, 3)) == [Assign("j1", "emptier"), Assign("j2", "crowded")]
    assert plan(two, busy, sessions, cluster(4, 3)) == [Launch(key("a"), "j1"), Assign("j2", "emptier")]
    assert plan(two, busy, sessions, cluster(3, 2)) == [Assign("j1", "emptier")]
    # Nor does it wait for one that is being launched for another.
    sessions = [session("crowded", "a"), session("coming", "a", launching=True)]
    assert plan(two, busy[:2], sessions, cluster(2, 8)) == [Assign("j2", "crowded")]


def test_a_job_that_has_to_be_by_itself_is_left_alone() -> None:
    sessions = [session("s", "a")]
    suspect, other = waiting("suspect", "a", 0, 1, max_colocated=0), waiting("other", "a", 0, 2)
    assert plan([suspect, other], [at_work("r", "s")], sessions, cluster(1, 8)) == []
    assert plan([suspect, other], [], sessions, cluster(1, 8)) == [Assign("suspect", "s")]
    assert plan([other], [at_work("suspect", "s", max_colocated=0)], sessions, cluster(1, 8)) == []
    some = waiting("some", "a", max_colocated=1)
    assert plan([some], [at_work("r1", "s"), at_work("r2", "s")], sessions, cluster(1, 8)) == []
    assert plan([some], [at_work("r1", "s")], sessions, cluster(1, 8)) == [Assign("some", "s")]


def test_several_jobs_wait_for_one_session_that_is_launching() -> None:
    """And no idle session of another key is stopped for the second."""
    three = [waiting(f"j{n}", "a", 0, n) for n in range(3)]
    sessions = [session("idle", "b"), session("starting", "a", launching=True)]
    assert plan(three, [], sessions, cluster(2, 8)) == []
    assert plan(three, [], sessions[:1], cluster(2, 8)) == [Launch(key("a"), "j0")]


@settings(max_examples=50, deadline=None)
@given(cases())
def test_whoever_still_waits_is_told_why(case: Case) -> None:
    why = reasons(case.queued, case.running, case.sessions, case.cluster)
    assert why.keys() == {job.id for job in case.queued} - {action.job_id for action in case.of(Assign)}
    for job in case.queued:
        assert (job.num_workers > case.cluster.workers) == ("a lower num_workers" in why.get(job.id, ""))


def test_the_reasons_for_waiting_are_sentences() -> None:
    queued = [waiting("huge", "e"), waiting("first", "c", at=1.0)]
    queued += [waiting(f"{number:02}", "a", at=number) for number in range(2, 15)]
    why = reasons(queued, [at_work("x", "s")], [session("s", "b")], cluster(2))
    assert why == {
        "huge": "waits: it needs 5 workers, and the cluster has room for 2; add nodes, or cancel it and submit it with"
        " a lower num_workers",
        "first": "waits: others have the workers of which it needs 2; the cluster has 2",
        "02": "waits: 1 job before it in line",
        **{f"{number:02}": f"waits: {number - 1} jobs before it in line" for number in range(3, 12)},
        **{f"{number:02}": "waits: more than 10 jobs before it in line" for number in range(12, 15)},
    }
    assert reasons([waiting("one", "a")], [], [], cluster(1)) == {"one": "waits: its session is being started"}
