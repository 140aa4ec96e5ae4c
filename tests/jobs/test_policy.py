"""The policy: a table of cases, properties of any plan, and every job ends when the plans are carried out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.settings import Quota
from jobs.job import Session, SessionKey, SessionState
from jobs.queue_snapshot import Line, QueuedJob, QueueSnapshot, RunningJobs
from jobs.scheduling import policy
from jobs.scheduling.fair_order import Rules, held_by_line, line_until, lines_to_write
from jobs.scheduling.policy import Action, Assign, Launch, Preempt, Stop
from jobs.scheduling.room import Cluster
from tests.support.queue_kit import queued_job, running_jobs, session_row

T = TypeVar("T")
WIDTH = {"a": 1, "b": 1, "c": 2, "d": 3, "e": 5}  # a base model stands for its number of workers too
NOW, HOUR = 1e6, 3600.0
RULES = Rules(quotas={}, others=Quota(), aging_seconds=HOUR, half_life_seconds=24 * HOUR)


def key(base_model: str) -> SessionKey:
    return SessionKey(base_model, "auto", WIDTH[base_model])


def waiting(id_: str, base: str, priority: int = 0, at: float = 0.0, **columns: Any) -> QueuedJob:
    return queued_job(id_, key(base), priority=priority, created_at=NOW + at, **columns)


def session(id_: str, base: str, launching: bool = False, leaving: bool = False, at: float = 0.0) -> Session:
    state = SessionState.LAUNCHING if launching else SessionState.RUNNING
    return session_row(id_, key(base), state=state, requested="stop" if leaving else None, created_at=at)


def line(tenant: str, mean: float = 0.0, served_at: float | None = None, priority: int = 0) -> Line:
    return Line(tenant=tenant, priority=priority, mean_workers=mean, at=NOW, served_at=served_at)


def cluster(workers: int, jobs_per_session: int = 1) -> Cluster:
    return Cluster(workers=workers, jobs_per_session=jobs_per_session, step_tokens=100)


def planned(
    queued: Sequence[QueuedJob],
    running: Sequence[RunningJobs],
    sessions: Sequence[Session],
    workers: Cluster,
    rules: Rules = RULES,
    lines: Sequence[Line] = (),
) -> tuple[list[Action], dict[str, str]]:
    snapshot = QueueSnapshot(at=NOW, queued=queued, running=running, sessions=sessions, lines=lines)
    return policy.plan(snapshot, workers, rules)


def plan(*rows: Any, **options: Any) -> list[Action]:
    return planned(*rows, **options)[0]


# ---- where jobs go ----


def test_a_session_takes_jobs_of_the_precision_that_auto_was() -> None:
    resolved = replace(session("s", "c"), resolved_precision="bf16")
    for precision, expected in (("bf16", [Assign("j", "s")]), ("auto", [Assign("j", "s")]), ("fp32", [])):
        job = queued_job("j", replace(key("c"), precision=precision))
        found = plan([job], [], [resolved], cluster(2))
        assert [action for action in found if isinstance(action, Assign)] == expected


def test_jobs_of_two_forward_paths_never_share_a_session() -> None:
    fused = replace(session("s", "c"), forward_path="llama")
    job = queued_job("j", replace(key("c"), forward_path="hooks"))
    assert plan([job], [], [fused], cluster(4)) == [Launch(job.session_key, "j")]


def test_an_idle_session_of_the_same_key_is_reused_before_one_is_launched() -> None:
    sessions = [session("old", "b"), session("same", "a"), session("starting", "a", launching=True)]
    assert plan([waiting("j", "a")], [], sessions, cluster(8)) == [Assign("j", "same")]
    # The second waits for the one that is being launched; the third gets its own.
    three = [waiting("j1", "a", 0, 1), waiting("j2", "a", 0, 2), waiting("j3", "a", 0, 3)]
    assert plan(three, [], sessions, cluster(8)) == [Assign("j1", "same"), Launch(key("a"), "j3")]


def test_an_idle_session_of_another_key_makes_room_only_when_it_must() -> None:
    idle = session("idle", "b")
    assert plan([waiting("j", "a")], [], [idle], cluster(2)) == [Launch(key("a"), "j")]
    assert plan([waiting("j", "a")], [], [idle], cluster(1)) == [Stop("idle", "its workers are needed by j")]
    assert plan([waiting("j", "a")], [], [replace(idle, requested="stop")], cluster(1)) == []
    assert plan([waiting("j", "a")], [running_jobs("idle")], [idle], cluster(1)) == []
    # On a cluster that lost nodes, more must go than the job needs.
    assert len(plan([waiting("j", "a")], [], [idle, session("other", "b", at=1)], cluster(1))) == 2


def test_a_job_trains_beside_others_where_no_worker_is_free() -> None:
    """In the emptiest session of its key; with a worker that nobody needs, on that."""
    sessions = [session("crowded", "a"), session("emptier", "a"), session("other", "b")]
    busy = [running_jobs("crowded", 2), running_jobs("emptier"), running_jobs("other")]
    two = [waiting("j1", "a", 0, 1), waiting("j2", "a", 0, 2)]
    assert plan(two, busy, sessions, cluster(3, 3)) == [Assign("j1", "emptier"), Assign("j2", "crowded")]
    assert plan(two, busy, sessions, cluster(4, 3)) == [Launch(key("a"), "j1"), Assign("j2", "emptier")]
    assert plan(two, busy, sessions, cluster(3, 2)) == [Assign("j1", "emptier")]
    # Nor does it wait for one that is being launched for another.
    sessions = [session("crowded", "a"), session("coming", "a", launching=True)]
    assert plan(two, busy[:1], sessions, cluster(2, 8)) == [Assign("j2", "crowded")]


def test_a_base_that_has_no_session_comes_before_a_second_one_of_another() -> None:
    three = [waiting("a1", "a", 0, 1), waiting("a2", "a", 0, 2), waiting("b1", "b", 0, 3)]
    assert plan(three, [], [], cluster(2, 8)) == [Launch(key("a"), "a1"), Launch(key("b"), "b1")]
    assert len(plan(three, [], [], cluster(3, 8))) == 3


def test_a_session_whose_jobs_keep_its_ranks_busy_has_no_room_but_for_a_higher_priority() -> None:
    busy, job = [running_jobs("s", 2, step_tokens=100)], waiting("j", "a", step_tokens=50)
    assert plan([job], busy, [session("s", "a")], cluster(1, 8)) == []
    assert plan([replace(job, priority=1)], busy, [session("s", "a")], cluster(1, 8)) == [Assign("j", "s")]
    wide = [waiting(f"j{n}", "c", 0, n, step_tokens=99) for n in range(4)]  # two ranks: 200 tokens
    assert len(plan(wide, [], [session("s", "c")], cluster(2, 8))) == 3
    assert len(plan([replace(job, step_tokens=0) for job in wide], [], [session("s", "c")], cluster(2, 8))) == 4


def test_a_job_that_has_to_be_by_itself_is_left_alone() -> None:
    sessions = [session("s", "a")]
    suspect, other = waiting("suspect", "a", 0, 1, max_colocated=0), waiting("other", "a", 0, 2)
    assert plan([suspect, other], [running_jobs("s")], sessions, cluster(1, 8)) == [], "the session is set aside"
    assert plan([suspect, other], [], sessions, cluster(1, 8)) == [Assign("suspect", "s")]
    assert plan([other], [running_jobs("s", max_colocated=0)], sessions, cluster(1, 8)) == []
    some = waiting("some", "a", max_colocated=1)
    assert plan([some], [running_jobs("s", 2)], sessions, cluster(1, 8)) == []
    assert plan([some], [running_jobs("s")], sessions, cluster(1, 8)) == [Assign("some", "s")]


def test_several_jobs_wait_for_one_session_that_is_launching() -> None:
    """And no idle session of another key is stopped for the second."""
    three = [waiting(f"j{n}", "a", 0, n) for n in range(3)]
    sessions = [session("idle", "b"), session("starting", "a", launching=True)]
    assert plan(three, [], sessions, cluster(2, 8)) == []
    assert plan(three, [], sessions[:1], cluster(2, 8)) == [Launch(key("a"), "j0")]


# ---- order ----


def order(queued: Sequence[QueuedJob], rules: Rules = RULES, **rows: Any) -> list[str]:
    """Ids in the order in which jobs get sessions of one worker."""
    snapshot = QueueSnapshot(at=NOW, queued=queued, **rows)
    actions, _ = policy.plan(snapshot, cluster(99), rules)
    return [action.job_id for action in actions if isinstance(action, Launch)]


def test_priority_then_arrival() -> None:
    queued = [waiting("late", "a", 0, 2.0), waiting("early", "a", 0, 1.0), waiting("urgent", "a", 1, 3.0)]
    assert plan(queued, [], [session("s", "a")], cluster(1)) == [Assign("urgent", "s")]
    assert order(queued) == ["urgent", "early", "late"]


def test_tenants_take_turns_by_weight_and_by_what_they_had_and_have() -> None:
    jobs = [waiting(f"{who}{n}", "a", 0, n, tenant=who) for who in ("x", "y") for n in range(6)]
    assert order(jobs)[:6] == ["x0", "y0", "x1", "y1", "x2", "y2"]
    weighted = replace(RULES, quotas={"y": Quota(weight=2.0)})
    assert order(jobs, weighted)[:7] == ["x0", "y0", "y1", "x1", "y2", "y3", "x2"]
    assert order(jobs, lines=[line("x", 1.5), line("x", 0.6, priority=5)])[:4] == ["y0", "y1", "y2", "x0"]
    had = {
        "running": [running_jobs("s", 3, tenant="x"), running_jobs("s", tenant="z")],
        "sessions": [session("s", "d")],
    }
    assert order(jobs, **had)[:4] == ["y0", "y1", "y2", "x0"], "x has 2.25 workers of the session"
    assert order([*jobs, waiting("first", "a", 1, 9, tenant="x")], lines=[line("x", 9.0)])[0] == "first"


def test_a_line_that_is_passed_over_rises_and_one_that_is_served_does_not() -> None:
    old = [waiting(f"old{n}", "a", 0, n - 2.5 * HOUR, tenant="x") for n in range(2)]
    new = [waiting(f"new{n}", "a", 1, tenant="y") for n in range(2)]
    busy = [line("x", 9.0)]
    assert order([*old, *new], lines=busy) == ["old0", "new0", "new1", "old1"], "once: by then the line was served"
    assert order([*old, *new], lines=[line("x", 9.0, NOW - HOUR / 2)]) == ["new0", "new1", "old0", "old1"]
    assert order([*old, *new], replace(RULES, aging_seconds=float("inf")), lines=busy)[:2] == ["new0", "new1"]
    back = [replace(job, waits_since=NOW) for job in old]  # until now they ran
    assert order([*back, *new], lines=busy)[:2] == ["new0", "new1"]
    # Whoever is served behind one that finds no place makes that no younger.
    wide = waiting("wide", "e", 0, -2.6 * HOUR, tenant="x")
    room = [running_jobs("s", 2, priority=9)], [session("s", "a"), session("full", "e")]
    full = running_jobs("full", 4)
    assert plan([wide, *old, *new], [*room[0], full], room[1], cluster(6, 4)) == [
        Assign("old0", "s"),
        Assign("old1", "s"),
    ]


def test_what_a_line_held_is_a_mean_that_halves() -> None:
    written = Line(tenant="t", priority=0, mean_workers=8.0, at=0.0, served_at=5.0)
    idle = line_until(7.0, written, 0.0, half_life=7.0)
    assert (idle.mean_workers, idle.at, idle.served_at) == (4.0, 7.0, 5.0)
    assert line_until(7.0, written, 16.0, half_life=7.0).mean_workers == 12.0
    steps = written
    for at in range(1, 8):
        steps = line_until(float(at), steps, 16.0, half_life=7.0)
    assert steps.mean_workers == pytest.approx(12.0), "however often it is written"
    assert line_until(1e9, written, 16.0, half_life=60.0).mean_workers == pytest.approx(8.0), "a minute of it"
    assert line_until(-5.0, written, 1.0, half_life=7.0) == written, "clocks differ"


def test_what_is_held_is_written_now_and_then() -> None:
    snapshot = QueueSnapshot(
        at=NOW, running=[running_jobs("s", 3), running_jobs("s", tenant="u")], sessions=[session("s", "c")]
    )
    assert held_by_line(snapshot) == {("t", 0): 1.5, ("u", 0): 0.5}
    fresh = lines_to_write(snapshot, 60.0, 5.0)
    assert {(one.tenant, one.mean_workers, one.at) for one in fresh} == {("t", 0.0, NOW), ("u", 0.0, NOW)}
    assert lines_to_write(replace(snapshot, lines=fresh, at=NOW + 4), 60.0, 5.0) == []
    later = lines_to_write(replace(snapshot, lines=fresh, at=NOW + 60), 60.0, 5.0)
    assert [one.mean_workers for one in later] == [0.75, 0.25]
    assert lines_to_write(QueueSnapshot(at=NOW + 9, lines=fresh), 60.0, 5.0) == []


# ---- limits, room that is set aside, preemption ----


def test_a_tenant_has_no_more_than_its_quota() -> None:
    jobs = [waiting(f"j{n}", "a", 0, n) for n in range(3)]
    one = replace(RULES, quotas={"t": Quota(running_jobs=1)})
    assert planned(jobs, [], [session("s", "a")], cluster(9, 8), one) == (
        [Assign("j0", "s")],
        {f"j{n}": "waits: t may have 1 running jobs at a time" for n in (1, 2)},
    )
    assert len(plan([*jobs, waiting("other", "a", tenant="u")], [], [], cluster(9, 8), one)) == 2
    # Nothing is left to what may not start anyway.
    several = [waiting("j0", "a", 0, 0), waiting("j1", "b", 0, 1), waiting("other", "a", 0, 2, tenant="u")]
    assert plan(several, [], [], cluster(2, 8), one) == [Launch(key("a"), "j0"), Launch(key("a"), "other")]
    two = replace(RULES, others=Quota(workers=2))
    actions, why = planned([*jobs, waiting("wide", "c", 0, 9)], [], [], cluster(9, 1), two)
    assert actions == [Launch(key("a"), "j0"), Launch(key("a"), "j1")]
    assert why["wide"] == why["j2"] == "waits: t may have 2 workers at a time"
    shared = [running_jobs("s", tenant="u"), running_jobs("s2", 2)], [session("s", "a"), session("s2", "c")]
    assert len(plan(jobs[:1], *shared, cluster(3, 8), two)) == 0
    assert len(plan(jobs[:1], *shared, cluster(3, 8), replace(two, others=Quota(workers=3)))) == 1


def test_what_a_job_needs_is_set_aside_and_others_take_the_rest() -> None:
    busy = [running_jobs("s1"), running_jobs("s2", 2), running_jobs("s3", 3)]
    sessions = [session("s1", "c"), session("s2", "b"), session("s3", "b")]
    wide = waiting("wide", "d", 0, 1)
    queued = [wide, waiting("small", "b", 0, 2), waiting("same", "c", 0, 3)]
    # Of five workers it takes the free one and those of s1, where "same" would have kept it waiting.
    assert plan(queued, busy, sessions, cluster(5, 8)) == [Assign("small", "s2")]
    assert plan(queued[1:], busy, sessions, cluster(5, 8)) == [Launch(key("b"), "small"), Assign("same", "s1")]
    # All or nothing: where even all are not enough nothing is kept from others, nor is a job that can never fit.
    assert plan([waiting("huge", "e"), *queued[1:]], busy, sessions, cluster(4, 8))[:1] == [Assign("small", "s2")]
    # Sessions that have none left stop together.
    assert plan([wide], [running_jobs("s2")], sessions[:2], cluster(3, 8)) == []
    assert len(plan([wide], [], sessions[:2], cluster(3, 8))) == 2


def test_who_may_join_a_session_one_day_does_not_empty_another_until_it_has_waited_too_long() -> None:
    full = [running_jobs("s", 2), running_jobs("other")]
    sessions = [session("s", "a"), session("other", "b")]
    queued = [waiting("first", "a", 0, -1.0), waiting("second", "b", 0)]
    assert plan(queued, full, sessions, cluster(2, 2)) == [Assign("second", "other")]
    aged = [waiting("first", "a", 0, -1.5 * HOUR), queued[1]]
    assert plan(aged, full, sessions, cluster(2, 2)) == []


def test_sessions_of_lower_priority_give_way_if_that_is_enough() -> None:
    sessions = [session(f"s{n}", "b") for n in range(4)]
    running = [
        running_jobs("s0", priority=3),
        running_jobs("s1", 2),
        running_jobs("s2"),
        running_jobs("s3", priority=-1),
    ]
    urgent = waiting("urgent", "c", 2)
    reason = "its workers are needed by urgent, of priority 2"
    assert plan([urgent], running, sessions, cluster(4)) == [Preempt("s3", reason), Preempt("s2", reason)]
    assert plan([replace(urgent, priority=0)], running, sessions, cluster(4)) == []
    assert plan([waiting("wide", "e", 2)], running, [*sessions, session("s4", "b")], cluster(5)) == []
    leaving = [*sessions[:2], replace(sessions[2], requested="stop"), replace(sessions[3], requested="stop")]
    assert plan([urgent], running, leaving, cluster(4)) == [], "they are on their way"
    idle = running[:2], [*sessions[:2], sessions[3]]
    assert plan([urgent], *idle, cluster(3)) == [
        Stop("s3", "its workers are needed by urgent"),
        Preempt("s1", reason),
    ]
    # What one leaves over is for the next in line, for whom no other stops.
    two, rows = [waiting("d", "d", 0, 1), waiting("c", "c", 0, 2)], [session("wide", "e"), session("b", "b", at=1)]
    assert plan(two, [], [*rows, session("b2", "b", at=2)], cluster(7)) == [Stop("wide", "its workers are needed by d")]
    # Not one that a job of its own key has just been given to.
    queued = [waiting("mine", "b", 2, -1.0), urgent]
    assert Preempt("s2", reason) not in plan(queued, [running_jobs("s2")], [sessions[2]], cluster(1, 2))


# ---- any plan ----


@dataclass(frozen=True)
class Case:
    """A queue, its cluster and rules, and what was planned."""

    snapshot: QueueSnapshot
    cluster: Cluster
    rules: Rules

    @cached_property
    def planned(self) -> tuple[list[Action], dict[str, str]]:
        return policy.plan(self.snapshot, self.cluster, self.rules)

    @property
    def actions(self) -> list[Action]:
        return self.planned[0]

    def of(self, kind: type[T]) -> list[T]:
        return [action for action in self.actions if isinstance(action, kind)]

    @cached_property
    def jobs(self) -> dict[str, QueuedJob]:
        return {job.id: job for job in self.snapshot.queued}

    @cached_property
    def staying(self) -> dict[str, Session]:
        return {session.id: session for session in self.snapshot.sessions if not session.leaving}

    def inside(self, session_id: str) -> list[RunningJobs]:
        return [jobs for jobs in self.snapshot.running if jobs.session_id == session_id]

    @cached_property
    def served(self) -> set[str]:
        """Jobs that go somewhere or wait for a session that is coming."""
        coming = {job for job, why in self.planned[1].items() if why == "waits: its session is being started"}
        return coming | {assign.job_id for assign in self.of(Assign)}

    def without(self, job_id: str) -> Case:
        left = [job for job in self.snapshot.queued if job.id != job_id]
        return replace(self, snapshot=replace(self.snapshot, queued=left))

    def carried_out(self) -> Case:
        """The case once its actions are."""
        jobs, running = dict(self.jobs), list(self.snapshot.running)
        sessions = {one.id: one for one in self.snapshot.sessions}
        lines = {(one.tenant, one.priority): one for one in self.snapshot.lines}
        for action in self.actions:
            match action:
                case Launch(SessionKey(base), job_id):
                    name = f"new-{job_id}"
                    sessions[name] = session(name, base, launching=True, at=NOW + len(sessions))
                case Assign(job_id, session_id):
                    job = jobs.pop(job_id)
                    columns = {"tenant": job.tenant, "priority": job.priority, "max_colocated": job.max_colocated}
                    columns |= {"step_tokens": job.step_tokens, "level": action.level}
                    running.append(running_jobs(session_id, **columns))
                    mine = [one for one in jobs.values() if (one.tenant, one.priority) == (job.tenant, job.priority)]
                    if all(one.created_at >= job.created_at for one in mine):
                        old = lines.get((job.tenant, job.priority), line(job.tenant, priority=job.priority))
                        lines[job.tenant, job.priority] = replace(old, served_at=self.snapshot.at)
                case Stop(session_id) | Preempt(session_id):
                    sessions[session_id] = replace(sessions[session_id], requested="stop")
        rows = {"queued": [*jobs.values()], "running": running, "sessions": [*sessions.values()]}
        return replace(self, snapshot=replace(self.snapshot, lines=[*lines.values()], **rows))


@st.composite
def cases(draw: st.DrawFn, tenants: str = "xyz") -> Case:
    """Any queue on any cluster, also on one that lost nodes since its sessions were launched."""
    bases, limits = st.sampled_from(sorted(WIDTH)), st.sampled_from([None, None, None, 0, 1, 2])
    who, priorities = st.sampled_from(tenants), st.integers(-1, 1)
    tokens, ages = st.sampled_from([0, 40, 100]), st.sampled_from([0.0, -1.0, -2.0, -1.5 * HOUR, -4 * HOUR])
    jobs = draw(st.lists(st.tuples(bases, priorities, ages, limits, tokens, who), max_size=6))
    queued = [
        waiting(f"job-{n}", base, priority, at, max_colocated=limit, step_tokens=step, tenant=tenant)
        for n, (base, priority, at, limit, step, tenant) in enumerate(jobs)
    ]
    states = st.sampled_from(["launching", "idle", "busy", "leaving"])
    inside = st.lists(st.tuples(limits, tokens, who, priorities, st.integers(1, 2)), min_size=1, max_size=3)
    rows = draw(st.lists(st.tuples(bases, states, inside), max_size=5))
    sessions = [
        session(f"s{n}", base, state == "launching", state == "leaving", n) for n, (base, state, _) in enumerate(rows)
    ]
    running = [
        running_jobs(f"s{n}", number, max_colocated=limit, step_tokens=step, tenant=tenant, priority=priority)
        for n, (_, state, jobs_inside) in enumerate(rows)
        if state == "busy"
        for limit, step, tenant, priority, number in jobs_inside
    ]
    lines = [
        line(tenant, mean) for tenant, mean in zip(tenants, draw(st.lists(st.floats(0, 4), max_size=3)), strict=False)
    ]
    quota = draw(st.sampled_from([Quota(), Quota(), Quota(running_jobs=2), Quota(workers=3), Quota(weight=2.0)]))
    snapshot = QueueSnapshot(at=NOW, queued=queued, running=running, sessions=sessions, lines=lines)
    most = cluster(draw(st.integers(0, 8)), draw(st.integers(1, 4)))
    return Case(snapshot, most, replace(RULES, quotas={tenants[0]: quota}))


any_case = settings(max_examples=120, deadline=None, derandomize=True, database=None)


@any_case
@given(cases())
def test_every_plan_keeps_capacity_sessions_and_limits(case: Case) -> None:
    check_each_once(case)
    check_colocated(case)
    check_launches(case)
    check_sessions_that_make_room(case)
    check_reasons(case)
    shuffled = {
        name: random.Random(1).sample(rows, len(rows)) for name, rows in vars(case.snapshot).items() if name != "at"
    }
    assert policy.plan(replace(case.snapshot, **shuffled), case.cluster, case.rules) == case.planned


def check_each_once(case: Case) -> None:
    """A job is served once, by a session of its key that runs and stays; none of those is stopped."""
    given = [action.job_id for action in case.of(Assign) + case.of(Launch)]
    assert len(set(given)) == len(given)
    stopped = [action.session_id for action in case.of(Stop) + case.of(Preempt)]
    assert len(set(stopped)) == len(stopped) and not {a.session_id for a in case.of(Assign)} & set(stopped)
    for assign in case.of(Assign):
        chosen = case.staying[assign.session_id]
        assert chosen.session_key == case.jobs[assign.job_id].session_key and not chosen.launching


def check_colocated(case: Case) -> None:
    """Nobody trains beside more than it may, nor is a tenant given more jobs than its quota."""
    for session_id in {assign.session_id for assign in case.of(Assign)}:
        joined = [case.jobs[assign.job_id] for assign in case.of(Assign) if assign.session_id == session_id]
        number = len(joined) + sum(jobs.number for jobs in case.inside(session_id))
        limits = [one.max_colocated for one in (*joined, *case.inside(session_id))]
        assert number <= case.cluster.jobs_per_session
        assert all(limit is None or number - 1 <= limit for limit in limits)
    for tenant in {case.jobs[assign.job_id].tenant for assign in case.of(Assign)}:
        most = case.rules.quota(tenant).running_jobs
        now = sum(jobs.number for jobs in case.carried_out().snapshot.running if jobs.tenant == tenant)
        assert most is None or now <= most


def check_launches(case: Case) -> None:
    """All ranks of all launches fit beside all sessions, those that leave included."""
    launches = case.of(Launch)
    assert all(launch.session_key == case.jobs[launch.job_id].session_key for launch in launches)
    held = sum(one.num_workers for one in case.snapshot.sessions)
    assert not launches or held + sum(one.session_key.num_workers for one in launches) <= case.cluster.workers


def check_sessions_that_make_room(case: Case) -> None:
    """Sessions stop for jobs that they are enough for, together with what is there; those without jobs, and those whose
    jobs all have a lower priority. For one job none of them stops needlessly.
    """
    making = case.of(Stop) + case.of(Preempt)
    stopped = {one.session_id: one.reason.removeprefix("its workers are needed by ").split(",")[0] for one in making}
    for session_id, job in stopped.items():
        assert job not in case.served
        assert all(jobs.priority < case.jobs[job].priority for jobs in case.inside(session_id))
    assert {stop.session_id for stop in case.of(Stop)} == {name for name in stopped if not case.inside(name)}
    left = sum(one.num_workers for name, one in case.staying.items() if name not in stopped)
    left += sum(launch.session_key.num_workers for launch in case.of(Launch))
    needed = left + sum(case.jobs[job].session_key.num_workers for job in set(stopped.values()))
    assert not stopped or needed <= case.cluster.workers, "all of it, or nothing"
    if len(case.jobs) == 1:
        assert all(needed + case.staying[name].num_workers > case.cluster.workers for name in stopped)


def check_reasons(case: Case) -> None:
    """Whoever still waits is told why."""
    why = case.planned[1]
    assert why.keys() == case.jobs.keys() - {action.job_id for action in case.of(Assign)}
    for job in case.jobs.values():
        too_wide = job.session_key.num_workers > case.cluster.workers
        assert too_wide == ("a lower num_workers" in why.get(job.id, ""))


@any_case
@given(cases())
def test_no_job_is_kept_waiting_by_one_of_a_lower_priority(case: Case) -> None:
    """Without that one, the same jobs of higher priority are served."""
    never_older = replace(case, rules=replace(case.rules, aging_seconds=float("inf")))
    for lower in never_older.served:
        above = {job.id for job in case.snapshot.queued if job.priority > case.jobs[lower].priority}
        assert never_older.served & above == never_older.without(lower).served & above


@any_case
@given(cases())
def test_a_plan_that_is_carried_out_leaves_nothing_to_plan(case: Case) -> None:
    """But for one that is to make up for lost nodes, or for time in which jobs rose."""
    held = sum(one.num_workers for one in case.snapshot.sessions)
    whole = replace(case.cluster, workers=max(held, case.cluster.workers))
    steady = replace(case, cluster=whole, rules=replace(case.rules, aging_seconds=float("inf")))
    assert steady.carried_out().actions == []


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(WIDTH)), st.integers(-1, 1), st.integers(0, 12), st.sampled_from("xyz")),
        min_size=1,
        max_size=8,
    ),
    st.integers(5, 8),
    st.integers(1, 3),
)
def test_every_job_ends_when_the_plans_are_carried_out(
    arrivals: list[tuple[str, int, int, str]], workers: int, most: int
) -> None:
    """A session launches in one round of ten minutes and ends one round after its jobs have; a job takes three rounds
    in all, and every third one has to be by itself. All the while jobs of priority 2 come, two a round.
    """
    snapshot, done, came = QueueSnapshot(at=NOW), set[str](), 0
    inside: dict[str, tuple[QueuedJob, str, int]] = {}  # its session, and its rounds to go
    left: dict[str, int] = {}
    for now in range(300):
        new = [
            waiting(f"job-{n}", base, priority, 600.0 * now, max_colocated=None if n % 3 else 0, tenant=tenant)
            for n, (base, priority, at, tenant) in enumerate(arrivals)
            if at == now
        ]
        new += [waiting(f"urgent-{now}-{n}", "ab"[n], 2, 600.0 * now, tenant="z") for n in range(2)]
        came += len(new)
        running = [
            running_jobs(where, tenant=job.tenant, priority=job.priority, level=level, max_colocated=job.max_colocated)
            for job, where, level in inside.values()
        ]
        at = NOW + 600.0 * now
        snapshot = replace(snapshot, at=at, queued=[*snapshot.queued, *new], running=running)
        case = Case(snapshot, cluster(workers, most), RULES)
        after = case.carried_out().snapshot
        for assign in case.of(Assign):
            inside[assign.job_id] = case.jobs[assign.job_id], assign.session_id, assign.level
        for name in [name for name in inside if left.setdefault(name, 3) == 0]:
            done.add(name)
            del inside[name]
        for preempted in case.of(Preempt):
            back = [name for name, (_, where, _) in inside.items() if where == preempted.session_id]
            after = replace(after, queued=[*after.queued, *(inside.pop(name)[0] for name in back)])
        left |= {name: left[name] - 1 for name in inside}
        held = {where for _, where, _ in inside.values()}
        started = [
            replace(one, state=SessionState.RUNNING) for one in after.sessions if not one.leaving or one.id in held
        ]
        launched = [one for one in after.sessions if one.launching and not one.leaving]
        snapshot = replace(after, sessions=started)
        assert sum(one.num_workers for one in [*started]) <= workers and len(launched) <= workers
        numbers = [where for _, where, _ in inside.values()]
        assert all(numbers.count(where) <= most for where in numbers)
        if {name for name in done if name.startswith("job")} == {f"job-{n}" for n in range(len(arrivals))}:
            return
    raise AssertionError(f"{len(arrivals)} jobs, {sorted(done)[:8]} of {came} have ended")


def test_the_reasons_for_waiting_are_sentences() -> None:
    queued = [waiting("huge", "e"), waiting("first", "c", at=1.0)]
    queued += [waiting(f"{number:02}", "a", at=number) for number in range(2, 15)]
    why = planned(queued, [running_jobs("s")], [session("s", "b")], cluster(2))[1]
    assert why == {
        "huge": "waits: it needs 5 workers, and the cluster has room for 2; add nodes, or cancel it and submit it with"
        " a lower num_workers",
        "first": "waits: others have the workers of which it needs 2; the cluster has 2",
        "02": "waits: 1 job before it in line",
        **{f"{number:02}": f"waits: {number - 1} jobs before it in line" for number in range(3, 12)},
        **{f"{number:02}": "waits: more than 10 jobs before it in line" for number in range(12, 15)},
    }
    assert planned([waiting("one", "a")], [], [], cluster(1))[1] == {"one": "waits: its session is being started"}
