"""The policy: order, capacity, reuse and room over random queues; and every job ends when the plans are carried out."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.policy import Action, Assign, Cluster, Launch, LiveSession, RunningJob, Stop, WaitingJob, plan

T = TypeVar("T")
WIDTH = {"a": 1, "b": 1, "c": 2, "d": 3, "e": 5}  # a session key stands for its number of workers too


def waiting(id_: str, key: str, priority: int = 0, at: float = 0.0) -> WaitingJob:
    return WaitingJob(id=id_, session_key=key, num_workers=WIDTH[key], priority=priority, created_at=at)


def session(id_: str, key: str, launching: bool = False, leaving: bool = False, at: float = 0.0) -> LiveSession:
    return LiveSession(
        id=id_, session_key=key, num_workers=WIDTH[key], launching=launching, leaving=leaving, created_at=at
    )


@dataclass(frozen=True)
class Case:
    """A queue, its cluster, and what was planned."""

    queued: list[WaitingJob]
    running: list[RunningJob]
    sessions: list[LiveSession]
    cluster: Cluster

    @cached_property
    def actions(self) -> list[Action]:
        return plan(self.queued, self.running, self.sessions, self.cluster)

    def of(self, kind: type[T]) -> list[T]:
        return [action for action in self.actions if isinstance(action, kind)]

    @cached_property
    def in_order(self) -> list[WaitingJob]:
        fitting = [job for job in self.queued if job.num_workers <= self.cluster.workers]
        return sorted(fitting, key=lambda job: (-job.priority, job.created_at, job.id))

    @cached_property
    def served(self) -> list[str]:
        return [action.job_id for action in self.of(Assign) + self.of(Launch)]

    @cached_property
    def usable(self) -> list[LiveSession]:
        """Sessions that a job could have: idle or launching, and staying."""
        busy = {job.session_id for job in self.running}
        return [session for session in self.sessions if session.id not in busy and not session.leaving]

    @cached_property
    def unserved(self) -> tuple[WaitingJob | None, Counter[str]]:
        """The first job that is neither served nor has a launching session to wait for; launching ones left over."""
        launching = Counter(session.session_key for session in self.usable if session.launching)
        for job in self.in_order:
            if job.id not in self.served:
                if not launching[job.session_key]:
                    return job, launching
                launching[job.session_key] -= 1
        return None, launching


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any queue on any cluster, also on one that lost nodes since its sessions were launched."""
    keys = st.sampled_from(sorted(WIDTH))
    jobs = draw(st.lists(st.tuples(keys, st.integers(-1, 1), st.integers(0, 3)), max_size=6))
    rows = draw(st.lists(st.tuples(keys, st.sampled_from(["launching", "idle", "busy", "leaving"])), max_size=5))
    queued = [waiting(f"job-{number}", *job) for number, job in enumerate(jobs)]
    sessions = [session(f"s{n}", key, state == "launching", state == "leaving") for n, (key, state) in enumerate(rows)]
    running = [RunningJob(id=f"run-{n}", session_id=f"s{n}") for n, (_, state) in enumerate(rows) if state == "busy"]
    return Case(queued, running, sessions, Cluster(workers=draw(st.integers(0, 8))))


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(cases())
def test_every_plan_keeps_order_capacity_and_sessions(case: Case) -> None:
    check_each_once(case)
    check_launches(case)
    check_nobody_is_overtaken(case)
    check_stops(case)
    shuffled = [random.Random(1).sample(rows, len(rows)) for rows in (case.queued, case.running, case.sessions)]
    assert plan(*shuffled, case.cluster) == case.actions == plan(case.queued, case.running, case.sessions, case.cluster)


def check_each_once(case: Case) -> None:
    """A job is served once; a session gets one job, of its key, while it runs, is idle and stays."""
    assert len(set(case.served)) == len(case.served)
    touched = [action.session_id for action in case.of(Assign) + case.of(Stop)]
    assert len(set(touched)) == len(touched)
    usable = {session.id: session for session in case.usable}
    keys = {job.id: job.session_key for job in case.in_order}
    for assign in case.of(Assign):
        chosen = usable[assign.session_id]
        assert chosen.session_key == keys[assign.job_id] and not chosen.launching
    assert all(stop.session_id in usable for stop in case.of(Stop))


def check_launches(case: Case) -> None:
    """A launch fits beside all sessions, those that leave included, and none of its key was to be had."""
    launches = case.of(Launch)
    jobs = {job.id: job for job in case.in_order}
    assert all((a.session_key, a.num_workers) == (jobs[a.job_id].session_key, WIDTH[a.session_key]) for a in launches)
    held = sum(session.num_workers for session in case.sessions)
    assert not launches or held + sum(launch.num_workers for launch in launches) <= case.cluster.workers
    for key in {launch.session_key for launch in launches}:
        mine = [launch.job_id for launch in launches if launch.session_key == key]
        same = [job.id for job in case.in_order if job.session_key == key]
        others = [session for session in case.usable if session.session_key == key]
        assert same.index(mine[-1]) + 1 == len(others) + len(mine)


def check_nobody_is_overtaken(case: Case) -> None:
    """From the first job on that is not served, nobody is."""
    blocked, _ = case.unserved
    if blocked is not None:
        behind = case.in_order[case.in_order.index(blocked) :]
        assert not {job.id for job in behind} & set(case.served)


def check_stops(case: Case) -> None:
    """Room is made for the first job that is not served, if it can be made, and by no session more than it takes."""
    blocked, not_waited_for = case.unserved
    stopped = {stop.session_id for stop in case.of(Stop)}
    if blocked is None:
        assert not stopped
        return
    launched = sum(launch.num_workers for launch in case.of(Launch))
    free = case.cluster.workers - sum(session.num_workers for session in case.sessions) - launched
    assert free < blocked.num_workers
    missing = blocked.num_workers - free - sum(s.num_workers for s in case.sessions if s.leaving)
    taken = {assign.session_id for assign in case.of(Assign)}
    spare = [s for s in case.usable if s.id not in taken and not s.launching]
    spare_workers = sum(s.num_workers for s in spare) + sum(WIDTH[key] * n for key, n in not_waited_for.items())
    widths = [session.num_workers for session in case.usable if session.id in stopped]
    if missing <= 0 or spare_workers < missing:
        assert not stopped
    else:
        assert sum(widths) >= missing and all(sum(widths) - width < missing for width in widths)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(WIDTH)), st.integers(-1, 1), st.integers(0, 12)), min_size=1, max_size=8),
    st.integers(5, 8),
)
def test_every_job_ends_when_the_plans_are_carried_out(arrivals: list[tuple[str, int, int]], workers: int) -> None:
    """A session launches in one round and ends one round after it was asked to; a job takes three rounds."""
    jobs = [waiting(f"job-{n}", key, priority, at) for n, (key, priority, at) in enumerate(arrivals)]
    pending, done = list(jobs), 0
    left: dict[str, int] = {}  # job -> rounds to go
    place: dict[str, str] = {}  # job -> session
    sessions: dict[str, LiveSession] = {}
    for now in range(400):
        here = [job for job in pending if job.created_at <= now]
        running = [RunningJob(id=job, session_id=place[job]) for job in left]
        actions: list[Action] = plan(here, running, list(sessions.values()), Cluster(workers=workers))
        sessions = {id_: replace(s, launching=False) for id_, s in sessions.items() if not s.leaving}
        for job in [job for job in left if left[job] == 1]:
            del left[job]
            done += 1
        left = {job: rounds - 1 for job, rounds in left.items()}
        for action in actions:
            match action:
                case Launch(key, _, _):
                    number = f"s{now}-{len(sessions)}"
                    sessions[number] = session(number, key, launching=True, at=now)
                case Assign(job_id, session_id):
                    pending = [job for job in pending if job.id != job_id]
                    left[job_id], place[job_id] = 3, session_id
                case Stop(session_id, _):
                    sessions[session_id] = replace(sessions[session_id], leaving=True)
        assert sum(s.num_workers for s in sessions.values()) <= workers
        assert len({place[job] for job in left}) == len(left), "two jobs in one session"
        if done == len(jobs):
            return
    raise AssertionError(f"{len(jobs) - done} jobs still wait")


def test_priority_then_arrival() -> None:
    queued = [waiting("late", "a", 0, 2.0), waiting("early", "a", 0, 1.0), waiting("urgent", "a", 1, 3.0)]
    assert plan(queued, [], [session("s", "a")], Cluster(workers=1)) == [
        Assign("urgent", "s"),
    ]
    assert plan(queued, [], [], Cluster(workers=2)) == [Launch("a", 1, "urgent"), Launch("a", 1, "early")]


def test_an_idle_session_of_the_same_key_is_reused_before_one_is_launched() -> None:
    sessions = [session("old", "b"), session("same", "a"), session("starting", "a", launching=True)]
    assert plan([waiting("j", "a")], [], sessions, Cluster(workers=8)) == [Assign("j", "same")]
    # The second waits for the one that is being launched; the third gets its own.
    three = [waiting("j1", "a", 0, 1), waiting("j2", "a", 0, 2), waiting("j3", "a", 0, 3)]
    assert plan(three, [], sessions, Cluster(workers=8)) == [Assign("j1", "same"), Launch("a", 1, "j3")]


def test_an_idle_session_of_another_key_makes_room_only_when_it_must() -> None:
    idle = session("idle", "b")
    assert plan([waiting("j", "a")], [], [idle], Cluster(workers=2)) == [Launch("a", 1, "j")]
    [stop] = plan([waiting("j", "a")], [], [idle], Cluster(workers=1))
    assert stop == Stop("idle", "its workers are needed by j")
    assert plan([waiting("j", "a")], [], [replace(idle, leaving=True)], Cluster(workers=1)) == []
    at_work = [RunningJob(id="r", session_id="idle")]
    assert plan([waiting("j", "a")], at_work, [idle], Cluster(workers=1)) == []


def test_nothing_overtakes_the_first_job_that_does_not_fit() -> None:
    at_work = [RunningJob(id="r", session_id="s1")]
    sessions = [session("s1", "c"), session("s2", "a")]
    queued = [waiting("wide", "e", 0, 1), waiting("small", "a", 0, 2)]
    assert plan(queued, at_work, sessions, Cluster(workers=5)) == []
    # One that can never fit is no reason to wait.
    assert plan(queued, at_work, sessions, Cluster(workers=4)) == [Assign("small", "s2")]
