"""What a sweep is, which of its trials go on, and its life in the queue, on SQLite and PostgreSQL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from jobs.errors import JobNotFoundError, TooManyJobsError
from jobs.halving import decide
from jobs.job import FailureCode, Job, JobResult, JobStatus, RequestedAction
from jobs.scheduling.sweeps import settle_sweeps
from jobs.spec import JobSpec, SpecError, check_spec
from jobs.store.jobs import JobQueue
from jobs.sweep import Sweep
from jobs.trials import NewTrial, Trial, place_text
from tests.support.queue_kit import (
    CANCELLED,
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    assert_legal_history,
    running_session,
    submit,
)

pytest_plugins = ["tests.support.queue_kit"]

BASE = {"base_model": "base", "dataset": "/rows.jsonl", "adapter": "a", "validation": 0.1}


def sweep_spec(**options: Any) -> JobSpec:
    return check_spec(BASE | {"sweep": {"learning_rate": [1e-4, 2e-4, 4e-4], "r": [4, 8, 16]}} | options)


# ---- what it is ----


def test_a_sweep_is_a_job_for_each_combination() -> None:
    """Or for some, which are drawn from all by the job's seed."""
    trials = sweep_spec(lora={"r": 2, "lora_alpha": 64.0}, priority=3).trials()
    assert [chosen for chosen, _ in trials] == [
        {"r": r, "learning_rate": rate} for r in (4, 8, 16) for rate in (1e-4, 2e-4, 4e-4)
    ]
    for chosen, spec in trials:
        assert (spec.lora.r, spec.train.learning_rate, spec.lora.lora_alpha) == (*chosen.values(), 64.0)
        assert spec.sweep is None and spec.priority == 3 and spec == JobSpec.model_validate_json(spec.canonical_json())
    values = {"learning_rate": [n / 1000 for n in range(1, 101)], "seed": [*range(100)], "num_samples": 20}
    drawn = [[chosen for chosen, _ in sweep_spec(sweep=values, train={"seed": seed}).trials()] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len({str(chosen) for chosen in drawn[0]}) == 20
    assert len({one["learning_rate"] for one in drawn[0]}) > 10 < len({one["seed"] for one in drawn[0]})
    assert sweep_spec().content_key("d") != sweep_spec(sweep=values).content_key("d")
    assert sweep_spec(sweep=None).content_key("d") == check_spec(BASE).content_key("d")


def test_everything_wrong_with_a_sweep_is_said_at_once() -> None:
    values = {
        "r": [4, 4, 0], "learning_rate": [1e-4, -1], "lr_scheduler": ["cosinus"], "epochs": 3, "lora_dropout": [1e-9],
        "beta": [0.1], "rungz": 2, "reduction_factor": 1, "target_modules": [],
    }  # fmt: skip
    with pytest.raises(SpecError) as refused:
        check_spec(BASE | {"sweep": values})
    assert sorted(refused.value.problems) == sorted([
        "sweep.r[1] is there twice: leave one of them out", "sweep.r[2] must be at least 1, not 0",
        "sweep.learning_rate[1] must be more than 0.0, not -1.0",
        "sweep.lr_scheduler[0] must be one of 'constant', 'linear' or 'cosine', not the text 'cosinus'",
        "sweep.epochs must be a list, not 3",
        "sweep.lora_dropout[0] must be 0 or at least 1/65,536 (1.6e-05): less would drop nothing",
        "unknown key 'sweep.beta': 'beta' belongs under 'train'", "unknown key 'sweep.rungz': did you mean 'rungs'?",
        "sweep.reduction_factor must be at least 2, not 1", "sweep.target_modules must not be empty",
    ])  # fmt: skip
    for changed, part in (
        ({"validation": None}, "sweep compares its trials by their validation loss, but there are no validation rows"),
        ({"sweep": {}}, "sweep has no values to try"),
        ({"sweep": {"seed": [*range(300)]}}, "sweep has 300 trials, and may have 256: give num_samples"),
        ({"sweep": {"use_dora": [False, True]}, "lora": {"lora_dropout": 0.5}}, "where use_dora needs lora_dropout"),
    ):
        with pytest.raises(SpecError, match=part):
            check_spec(BASE | {"sweep": {"r": [4]}} | changed)


@pytest.mark.parametrize(
    ("options", "trials", "steps", "rungs", "left"),
    [
        ({}, 9, 90, [10, 30, 90], [3, 1, 1]),
        ({}, 8, 90, [10, 30, 90], [2, 1, 1]),
        ({}, 27, 10, [2, 4, 10], [9, 3, 1]),
        ({"reduction_factor": 2}, 8, 81, [11, 21, 41, 81], [4, 2, 1, 1]),
        ({"rungs": 1}, 9, 90, [30, 90], [3, 1]),
        ({"rungs": 0}, 9, 90, [90], [1]),
        ({"rungs": 9}, 2, 90, [30, 90], [1, 1]),
        ({}, 9, 2, [2], [1]),
        ({}, 1, 90, [90], [1]),
    ],
)
def test_rungs_lie_a_reduction_factor_apart(
    options: dict[str, int], trials: int, steps: int, rungs: list[int], left: list[int]
) -> None:
    sweep = Sweep.model_validate({"r": [1]} | options)
    number = sweep.rungs_of(trials, steps)
    assert [sweep.step_of(rung, number, steps) for rung in range(1, number + 2)] == rungs
    assert [sweep.left_after(rung, number, trials) for rung in range(1, number + 2)] == left
    # On no more tokens than each rung's trials have until then, the most that a row of them can come to.
    going, before = [trials, *left], [0, *rungs]
    spent = sum(going[n] * 100 * (rungs[n] - before[n]) for n in range(len(rungs)))
    assert spent <= sweep.most_tokens([(steps, 100 * steps)] * trials) <= spent + 1


def test_the_most_tokens_are_those_of_the_longest_trials() -> None:
    sweep = Sweep.model_validate({"epochs": [1, 2, 3]})
    assert sweep.most_tokens([(30, 3000), (60, 6000), (90, 9000)]) == (3000 + 6000 + 9000) // 3 + 9000 * 2 // 3


# ---- which trials go on ----


def trials_at(rung: int | None, *losses: float | None, **columns: Any) -> list[Trial]:
    """Trials that wait at a rung, with these losses; one without is still on its way there."""
    rows: dict[str, Any] = {"sweep_id": "s", "parameters": {"r": 1}, "steps": 90, "rung": rung, "until_step": None}
    rows |= {"place": None, "compared": None, "attempt": 1, "error": None, "progress": None} | columns
    return [
        Trial(number=n, job_id=f"s-{n}", loss=loss, reached=(rung or 1) - (loss is None),
              status=RUNNING if loss is None else PAUSED, **rows)
        for n, loss in enumerate(losses, 1)
    ]  # fmt: skip


def ended(trials: Sequence[Trial], status: JobStatus, *numbers: int) -> list[Trial]:
    return [replace(trial, status=status) if trial.number in numbers else trial for trial in trials]


NINE = (0.9, 0.1, 0.5, 0.3, 0.7, 0.4, 0.8, 0.2, 0.6)


@pytest.mark.parametrize(
    ("trials", "order", "going", "next_rung", "until"),
    [
        (trials_at(1, *NINE), [2, 8, 4, 6, 3, 9, 5, 7, 1], 3, 2, 30),
        (ended(trials_at(2, *NINE), CANCELLED, 1, 3, 5, 6, 7, 9), [2, 8, 4], 1, None, None),
        (trials_at(1, *[0.5] * 9), [*range(1, 10)], 3, 2, 30),
        (trials_at(1, math.nan, 0.5, math.inf, *[0.6] * 6), [2, 4, 5, 6, 7, 8, 9, 1, 3], 3, 2, 30),
        (ended(trials_at(1, *NINE), FAILED, 2, 8), [4, 6, 3, 9, 5, 7, 1], 3, 2, 30),
        (ended(trials_at(1, *NINE), FAILED, *range(1, 8)), [8, 9], 2, 2, 30),
        (ended(trials_at(1, *NINE), FAILED, *range(1, 9)), [9], 1, None, None),
        (trials_at(1, *NINE[:8], None), None, 0, None, None),
        (ended(trials_at(1, *NINE), QUEUED, 2), None, 0, None, None),
        (ended(trials_at(1, *NINE), CANCELLED, *range(1, 10)), None, 0, None, None),
        (ended(trials_at(None, 0.5, 0.4), RUNNING, 1, 2), None, 0, None, None),
    ],
)  # fmt: skip
def test_the_best_trials_of_a_rung_go_on(
    trials: list[Trial], order: list[int] | None, going: int, next_rung: int | None, until: int | None
) -> None:
    """Of equal ones the first, of those that have ended none, and nobody before all are there."""
    decision = decide(Sweep.model_validate({"r": [1]}), trials[::-1])
    if order is None:
        assert decision is None
        return
    assert decision is not None
    assert [trial.number for trial in decision.trials] == order
    assert (decision.going, decision.next_rung, set(decision.until_steps)) == (going, next_rung, {until})
    assert f"rung {decision.rung}: trial {order[0]} (r 1) is best" in decision.message()
    assert decision.message_of(len(order)).endswith(place_text(len(order), len(order)))


def test_at_the_end_the_best_of_those_that_are_left_goes_on_to_be_published() -> None:
    """Where nothing was compared before, and where trials have other numbers of steps."""
    grid = Sweep.model_validate({"r": [1], "rungs": 0})
    decision = decide(grid, trials_at(1, *NINE))
    assert decision is not None and (decision.trials[0].number, decision.going, decision.next_rung) == (2, 1, None)
    longer = [replace(trial, steps=90 * trial.number) for trial in trials_at(1, *NINE)]
    halved = decide(Sweep.model_validate({"r": [1]}), longer)
    assert halved is not None and halved.until_steps == (60, 240, 120)
    assert [place_text(n, 30) for n in (1, 2, 3, 4, 11, 12, 13, 21, 22)] == [
        f"{text} of 30" for text in ("1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd")
    ]


# ---- its life in the queue ----


def submitted(queue: JobQueue, spec: JobSpec | None = None, steps: int = 90, **options: Any) -> Job:
    spec = spec or sweep_spec()
    trials = [
        NewTrial(parameters=chosen, spec=one, forward_path="llama", steps=steps, step_tokens=7)
        for chosen, one in spec.trials()
    ]
    known: dict[str, Any] = {"cluster": "c", "base": "base", "dataset_sha": "d1", "code_version": "v1"}
    return queue.submit(spec, trials=trials, **known | options)[0]


def trials_of(queue: JobQueue, sweep: Job) -> Sequence[Trial]:
    return queue.trials([sweep.id])[sweep.id]


def come_to_rungs(queue: JobQueue, sweep: Job, session_id: str, losses: dict[int, float]) -> None:
    """Have a session train these trials to where they wait."""
    for trial in trials_of(queue, sweep):
        if trial.number in losses:
            assert queue.assign(trial.job_id, session_id)
            loss = losses[trial.number]
            assert queue.move(trial.job_id, RUNNING, PAUSED, message="waits", fence=(session_id, 1), rung_loss=loss)


def states(queue: JobQueue, sweep: Job) -> list[JobStatus]:
    return [trial.status for trial in trials_of(queue, sweep)]


RESULT: JobResult = {
    "model": "base:a", "version": "v", "digest": "d", "adapter_bytes": 1,
    "metrics": {"step": 90, "loss": 0.1, "first_loss": 1.0, "tokens": 9, "supervised_tokens": 9},
}  # fmt: skip


def test_a_sweep_is_halved_and_its_best_trial_is_what_it_publishes(queue: JobQueue) -> None:
    """Whoever schedules: each time it is another one, which knows only what is in the rows."""
    sweep, session = submitted(queue), running_session(queue)
    assert sweep.is_sweep and sweep.status is QUEUED and queue.get(sweep.id[4:]) == sweep == queue.list()[0]
    snapshot = queue.snapshot("c")
    assert {job.id for job in snapshot.queued} == {trial.job_id for trial in trials_of(queue, sweep)}
    assert [(trial.rung, trial.until_step, trial.reached) for trial in trials_of(queue, sweep)] == [(1, 10, 0)] * 9
    assert submitted(queue).id == sweep.id and len(queue.list()) == 10
    assert queue.page(None, 100)[0] == [queue.get(sweep.id)] and len(queue.page(None, 100, trials=True)[0]) == 10
    assert queue.page("default", 100, statuses={QUEUED})[0] == [queue.get(sweep.id)]

    come_to_rungs(queue, sweep, session.id, dict(enumerate(NINE[:8], 1)))
    assert settle_sweeps(queue, "c") and queue.get(sweep.id).status is RUNNING
    assert [job.id for job in queue.without_session("c")] == [] == queue.snapshot("c").running
    assert states(queue, sweep) == [*[PAUSED] * 8, QUEUED], "nothing is decided before all are there"
    come_to_rungs(queue, sweep, session.id, {9: NINE[8]})
    assert not settle_sweeps(queue, "other") and settle_sweeps(queue, "c")
    going = [QUEUED if n in (2, 4, 8) else CANCELLED for n in range(1, 10)]
    assert states(queue, sweep) == going
    trial = trials_of(queue, sweep)[1]
    assert (trial.rung, trial.until_step, trial.reached, trial.loss, trial.standing) == (
        2, 30, 1, 0.1, "went on from rung 1, 1st of 9",
    )  # fmt: skip
    first = trials_of(queue, sweep)[0]
    assert (first.standing, first.rung) == ("stopped at rung 1, 9th of 9", 1)
    assert queue.events(first.job_id)[-1].message == "stopped at rung 1: validation loss 0.9000, 9th of 9"
    history = [event.message for event in queue.events(sweep.id)]
    best = "trial 2 (r 4, learning_rate 0.0002) is best, with a validation loss of 0.1000"
    assert history[-1] == f"rung 1: {best}; 3 of 9 trials go on"

    come_to_rungs(queue, sweep, session.id, {2: 0.09, 4: 0.05, 8: 0.2})
    assert settle_sweeps(queue, "c")
    assert [trial.number for trial in trials_of(queue, sweep) if not trial.ended] == [4]
    last = trials_of(queue, sweep)[3]
    assert (last.status, last.rung, last.until_step, queue.trial(queue.get(last.job_id))) == (QUEUED, None, None, last)
    assert queue.assign(last.job_id, session.id) and settle_sweeps(queue, "c")
    assert queue.move(last.job_id, RUNNING, SUCCEEDED, message="published", fence=(session.id, 1), result=RESULT)
    assert settle_sweeps(queue, "c") and not settle_sweeps(queue, "c")
    done = queue.get(sweep.id)
    assert (done.status, done.result, queue.trial(done)) == (SUCCEEDED, RESULT, None)
    for job in queue.list():
        assert_legal_history(queue, job)


def test_a_scheduler_that_was_replaced_decides_nothing(queue: JobQueue) -> None:
    sweep, session = submitted(queue), running_session(queue)
    old = queue.acquire_lease("scheduler:c", "old", 1e9)
    assert old is not None
    queue.release_lease(old)
    new = queue.acquire_lease("scheduler:c", "new", 1e9)
    come_to_rungs(queue, sweep, session.id, dict(enumerate(NINE[:8], 1)))
    for lease, status in ((old, QUEUED), (new, RUNNING)):
        settle_sweeps(queue, "c", lease)
        assert queue.get(sweep.id).status is status
    come_to_rungs(queue, sweep, session.id, {9: NINE[8]})
    settle_sweeps(queue, "c", old)
    assert set(states(queue, sweep)) == {PAUSED}
    settle_sweeps(queue, "c", new)
    assert set(states(queue, sweep)) == {QUEUED, CANCELLED}


def test_a_sweep_is_paused_resumed_and_cancelled_with_its_trials(queue: JobQueue) -> None:
    """What waits at a rung goes on waiting there; what runs is asked to, and the sweep follows."""
    sweep, session = submitted(queue), running_session(queue)
    paused = queue.request(sweep.id, RequestedAction.PAUSE)
    assert paused.status is PAUSED and states(queue, sweep) == [PAUSED] * 9
    assert queue.resume(sweep.id).status is QUEUED and states(queue, sweep) == [QUEUED] * 9
    assert sweep.id not in {job.id for job in queue.snapshot("c").queued}
    come_to_rungs(queue, sweep, session.id, {1: 0.5})
    running = trials_of(queue, sweep)[1].job_id
    assert queue.assign(running, session.id) and settle_sweeps(queue, "c")
    asked = queue.request(sweep.id, RequestedAction.PAUSE)
    assert (asked.status, asked.requested, queue.get(running).requested) == (RUNNING, "pause", "pause")
    settle_sweeps(queue, "c")
    assert queue.get(sweep.id).status is RUNNING and states(queue, sweep) == [PAUSED, RUNNING, *[PAUSED] * 7]
    assert queue.move(running, RUNNING, PAUSED, message="paused", fence=(session.id, 1))
    settle_sweeps(queue, "c")
    assert queue.get(sweep.id).status is PAUSED
    queue.resume(sweep.id)
    settle_sweeps(queue, "c")
    assert queue.get(sweep.id).status is RUNNING and states(queue, sweep) == [PAUSED, *[QUEUED] * 8]
    assert queue.assign(running, session.id)
    decision = decide(Sweep.model_validate({"r": [1]}), trials_of(queue, sweep)[:1])
    assert decision is not None
    assert queue.request(sweep.id, RequestedAction.CANCEL).requested == "cancel"
    assert not queue.settle_rung(sweep.id, decision), "which was made before"
    assert states(queue, sweep) == [CANCELLED, RUNNING, *[CANCELLED] * 7]
    assert queue.move(running, RUNNING, CANCELLED, message="cancelled", fence=(session.id, 1))
    settle_sweeps(queue, "c")
    assert queue.get(sweep.id).status is CANCELLED
    assert_legal_history(queue, queue.get(sweep.id))


def test_a_sweep_without_a_trial_that_came_to_the_end_fails_with_its_reason(queue: JobQueue) -> None:
    """A trial that failed or was cancelled is missed by nobody while there are others."""
    sweep, session = submitted(queue), running_session(queue)
    ids = [trial.job_id for trial in trials_of(queue, sweep)]
    assert queue.request(ids[0], RequestedAction.CANCEL).status is CANCELLED
    assert queue.move(ids[1], QUEUED, FAILED, message="m", error="it diverged", code=FailureCode.DIVERGED)
    come_to_rungs(queue, sweep, session.id, dict(zip(range(3, 10), NINE, strict=False)))
    settle_sweeps(queue, "c")
    going = [trial.job_id for trial in trials_of(queue, sweep) if not trial.ended]
    assert len(going) == 3
    for job_id in going:
        assert queue.move(job_id, QUEUED, FAILED, message="m", error="no memory", code=FailureCode.OUT_OF_MEMORY)
    settle_sweeps(queue, "c")
    failed = queue.get(sweep.id)
    assert (failed.status, failed.error_code) == (FAILED, FailureCode.OUT_OF_MEMORY)
    assert failed.error == f"4 of its 9 trials failed and none is left; {going[0]}: no memory"
    assert submitted(queue).id != sweep.id


def test_trials_count_for_their_tenant_and_are_no_job_that_anybody_asked_for(queue: JobQueue) -> None:
    with pytest.raises(TooManyJobsError, match="there may be 8 waiting jobs, and the sweep has 9"):
        submitted(queue, most_queued=8)
    sweep = submitted(queue, most_queued=9, most_unfinished=9)
    with pytest.raises(TooManyJobsError, match="wait for one, or cancel one"):
        queue.submit(sweep_spec(sweep=None), cluster="c", base="base", dataset_sha="d", code_version="v", most_queued=9)
    _, spec = sweep_spec().trials()[0]
    alone, new = queue.submit(spec, cluster="c", base="base", dataset_sha="d1", code_version="v1")
    assert new and not alone.is_sweep and queue.trial(alone) is None
    submitted(queue, sweep_spec(priority=5))
    assert {queue.get(trial.job_id).priority for trial in trials_of(queue, sweep)} == {5}
    assert queue.get(f"{sweep.id}-1").spec.priority == 5
    with pytest.raises(JobNotFoundError):
        queue.get(f"{sweep.id}-")


def test_trials_are_forgotten_no_sooner_than_their_sweep(queue: JobQueue) -> None:
    sweep, session = submitted(queue), running_session(queue)
    come_to_rungs(queue, sweep, session.id, dict(enumerate(NINE, 1)))
    settle_sweeps(queue, "c")
    assert states(queue, sweep).count(CANCELLED) == 6 and queue.ended_before(math.inf, 99) == []
    queue.request(sweep.id, RequestedAction.CANCEL)
    settle_sweeps(queue, "c")
    ended = queue.ended_before(math.inf, 99)
    queue.forget(ended)
    assert len(ended) == 10 and queue.list() == [] and queue.trials([sweep.id]) == {}


def test_trials_wait_for_what_their_sweep_depends_on(queue: JobQueue) -> None:
    first, _ = submit(queue, "first")
    spec = sweep_spec(depends_on=[first.id])
    sweep = submitted(queue, spec)
    assert {job.id for job in queue.snapshot("c").queued} == {first.id}
    assert queue.assign(first.id, running_session(queue).id)
    assert queue.move(first.id, RUNNING, SUCCEEDED, message="done")
    assert {job.id for job in queue.snapshot("c").queued} == {trial.job_id for trial in trials_of(queue, sweep)}
    second, _ = submit(queue, "second")
    lost = submitted(queue, sweep_spec(depends_on=[second.id]))
    queue.request(second.id, RequestedAction.CANCEL)
    settle_sweeps(queue, "c")
    assert queue.get(lost.id).error_code is FailureCode.DEPENDENCY
