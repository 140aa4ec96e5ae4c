"""Evaluation: the validation loss and accuracy, when they are taken, what follows from them, and what does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.data.dataset import Example
from lora_core.training import job as engine_job
from lora_core.training.active_job import LiveJob
from lora_core.training.engine import TrainEngine
from lora_core.training.job import JobDiverged, Progress
from lora_core.training.optimizer import Evaluation, StepOutcome
from tests.support.models import (
    RanksInThreads,
    documents,
    job,
    logits_of,
    outcome_of,
    state,
    tiny_base,
    train_to_the_end,
)

VALIDATION = documents(9, seed=50)


def by_definition(engine: TrainEngine, live: LiveJob, examples: Sequence[Example]) -> Evaluation:
    """One document at a time, all of its logits, no dropout."""
    loss, correct, tokens = 0.0, 0, 0
    for example in examples:
        ids = torch.tensor([example.ids])
        logits = logits_of(engine.base, ids, engine.forward.modules, live.adapter)[0, :-1]
        kept = torch.tensor(example.labels_mask[1:])
        labels = ids[0, 1:][kept]
        loss += float(F.cross_entropy(logits[kept].double(), labels, reduction="sum"))
        correct += int((logits[kept].argmax(-1) == labels).sum())
        tokens += len(labels)
    return Evaluation(live.progress.step, loss / tokens, correct / tokens, tokens)


def test_loss_and_accuracy_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """On what it has learned, so that some tokens are right, with dropout in training; in few packed micro-batches."""
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 48)
    examples = documents(6, seed=1)
    engine = TrainEngine(tiny_base("llama", dtype=torch.float64), capacity=512)
    live = engine.add(
        job(examples=examples, validation=[*examples[:4], *VALIDATION], epochs=30, lora={"lora_dropout": 0.3})
    )
    batches = 0
    evaluate = engine.evaluate

    def counted(batch: Any) -> None:
        nonlocal batches
        batches += 1
        evaluate(batch)

    monkeypatch.setattr(engine, "evaluate", counted)
    outcomes = train_to_the_end(engine, "job")
    found = outcomes[-1].evaluation
    expected = by_definition(engine, live, live.job.validation)
    assert found is not None
    assert (found.step, found.tokens, found.accuracy) == (60, expected.tokens, expected.accuracy)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert 0.2 < found.accuracy < 0.9
    assert live.progress.before is not None
    assert live.progress.before.accuracy < found.accuracy
    assert batches == 31  # 13 documents in one micro-batch, before the first epoch and after each


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"epochs": 2}, [3, 6]),
        ({"epochs": 2, "eval_steps": 2}, [2, 4, 6]),
        ({"epochs": 1, "eval_steps": 2}, [2, 3]),
        ({"epochs": 2, "eval_steps": 50}, [6]),
    ],
    ids=str,
)
def test_evaluates_every_so_many_steps_or_epochs_and_at_both_ends(options: dict[str, Any], steps: list[int]) -> None:
    engine = TrainEngine(tiny_base("llama"))
    live = engine.add(job(validation=VALIDATION, **options))
    outcomes = train_to_the_end(engine, "job")
    evaluations = [outcome.evaluation for outcome in outcomes if outcome.evaluation is not None]
    assert [evaluation.step for evaluation in evaluations] == steps
    assert all(outcomes[evaluation.step - 1].evaluation is evaluation for evaluation in evaluations)
    assert live.progress.before is not None
    assert live.progress.before.step == 0
    assert live.progress.evaluation == evaluations[-1]
    assert live.progress.best == min(evaluations, key=lambda evaluation: evaluation.loss)
    assert live.progress.step == live.job.steps


def test_evaluating_changes_nothing_in_training() -> None:
    def train(validation: Sequence[Example], **options: Any) -> Tensor:
        engine = TrainEngine(tiny_base("llama"))
        live = engine.add(job(validation=validation, epochs=3, lora={"lora_dropout": 0.2}, **options))
        train_to_the_end(engine, "job")
        return state(live)

    assert torch.equal(train([]), train(VALIDATION, eval_steps=1))


def test_two_ranks_evaluate_their_shares_to_the_same_figures() -> None:
    """One of the jobs has a single validation document, so that the second rank has nothing to evaluate."""
    single = job("single", examples=documents(4, 2), validation=VALIDATION[:1], epochs=2)
    several = job("several", validation=VALIDATION, epochs=2, early_stopping_patience=1)
    engine = TrainEngine(tiny_base("llama", dtype=torch.float64))
    expected = {}
    for wanted in (single, several):
        engine.add(wanted)
        expected[wanted.name] = [outcome.evaluation for outcome in train_to_the_end(engine, wanted.name)]
    found: list[dict[str, list[Evaluation | None]]] = []

    def both(engine: TrainEngine) -> None:
        live = [engine.add(wanted) for wanted in (single, several)]
        evaluations: dict[str, list[Evaluation | None]] = {wanted.name: [] for wanted in (single, several)}
        while not all(one.done for one in live):
            for name, outcome in engine.micro_batch().items():
                evaluations[name].append(outcome_of(outcome).evaluation)
        found.append(evaluations)

    RanksInThreads("llama", torch.float64).run(both)
    assert found[0] == found[1]
    for name, evaluations in expected.items():
        for one, other in zip(found[0][name], evaluations, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert (one.step, one.tokens, one.accuracy) == (other.step, other.tokens, other.accuracy)
                assert one.loss == pytest.approx(other.loss, rel=1e-9)


# --- what follows from it --------------------------------------------------------------------------------------------

# Some of what it is trained on among what it is not: the loss falls, then rises.
MIXED = [*documents(10, seed=0)[:3], *VALIDATION[:5]]
OVERFITS: dict[str, Any] = {"epochs": 8, "learning_rate": 0.03, "lr_scheduler": "constant"}


def trained(**options: Any) -> tuple[LiveJob, list[float], list[Tensor]]:
    """A job that learns its ten random documents by heart: its validation losses, and its weights after each step."""
    engine = TrainEngine(tiny_base("llama"))
    live = engine.add(job(validation=MIXED, eval_steps=1, **OVERFITS | options))
    losses, weights = [], []
    while not live.done:
        flat = live.optimizer.flat.clone()
        outcome = engine.micro_batch().get("job")
        if outcome is not None:
            evaluation = outcome_of(outcome).evaluation
            assert evaluation is not None
            losses.append(evaluation.loss)
            weights.append(flat)  # from before the evaluation, which may have gone back to the best
    return live, losses, weights


def test_load_best_model_at_end_ends_with_the_weights_of_the_lowest_validation_loss() -> None:
    last, losses, weights = trained()
    lowest = min(range(len(losses)), key=lambda step: losses[step])
    assert 0 < lowest < len(losses) - 1, losses
    assert torch.equal(last.optimizer.flat, weights[-1])
    best, same_losses, _ = trained(load_best_model_at_end=True)
    assert same_losses == losses
    assert best.progress.step == len(losses) == best.job.steps
    assert torch.equal(best.optimizer.flat, weights[lowest])
    assert best.progress.best is not None
    assert (best.progress.best.step, best.progress.best.loss) == (lowest + 1, losses[lowest])


@pytest.mark.parametrize("best", [False, True])
def test_a_job_that_waits_at_some_steps_ends_as_one_that_does_not(best: bool) -> None:
    """It is evaluated there, goes on from what it was, and loads its best weights at its end alone."""
    straight, _, _ = trained(load_best_model_at_end=best)
    checkpoint = None
    for until in (7, 7, 13, 24, None):
        wanted = job(validation=MIXED, eval_steps=1, load_best_model_at_end=best, **OVERFITS)
        engine = TrainEngine(tiny_base("llama"))
        live = engine.add(replace(wanted, until=until), checkpoint)
        train_to_the_end(engine, "job")
        assert live.progress.step == (until or 24) and live.complete == (until in (24, None))
        assert live.progress.evaluation is not None and live.progress.evaluation.step == live.progress.step
        checkpoint = live.snapshot().dump()
    assert live.progress == straight.progress and torch.equal(state(live), state(straight))
    rare = job(validation=MIXED, eval_steps=100, **OVERFITS)
    engine = TrainEngine(tiny_base("llama"))
    live = engine.add(replace(rare, until=5))
    train_to_the_end(engine, "job")
    assert live.progress.evaluation is not None and live.progress.evaluation.step == 5


@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping_ends_the_job_after_so_many_evaluations_without_a_better_one(patience: int) -> None:
    _, losses, weights = trained()
    improves = [loss < min([math.inf, *losses[:step]]) for step, loss in enumerate(losses)]
    stop = next(n for n in range(patience, len(losses)) if not any(improves[n - patience + 1 : n + 1]))
    lowest = min(range(stop + 1), key=lambda step: losses[step])
    stopped, _, _ = trained(early_stopping_patience=patience)
    assert stopped.progress.step == stop + 1 < stopped.job.steps
    assert stopped.done
    assert stopped.progress.stopped is not None
    for part in (f"after step {stop + 1}:", f"in {patience} evaluation", f"after step {lowest + 1}"):
        assert part in stopped.progress.stopped
    assert torch.equal(stopped.optimizer.flat, weights[lowest])
    last, _, _ = trained(early_stopping_patience=patience, load_best_model_at_end=False)
    assert torch.equal(last.optimizer.flat, weights[stop])


@pytest.mark.parametrize(
    ("losses", "stops_at"),
    [([3, 4, 2, 3, 1, 2], None), ([3, 4, 2, 3, 3, 1], 5), ([3, 3, 3], 3), ([1, 2, math.inf], 3), ([3, 2, 1], None)],
)
def test_patience_counts_evaluations_in_a_row(losses: list[float], stops_at: int | None) -> None:
    """A better one starts the count anew; one that is as good is not better."""
    progress = Progress()
    progress.evaluated(Evaluation(0, 0.5, 0.0, 9), patience=2)  # what it started from is not to be beaten
    for step, loss in enumerate(losses, 1):
        progress.stepped(StepOutcome(1.0, 9, 1.0), tokens=9, vocabulary=96)
        progress.evaluated(Evaluation(step, loss, 0.0, 9), patience=2)
        if progress.stopped:
            break
    assert (progress.step if progress.stopped else None) == stops_at


def test_a_job_that_had_no_step_left_did_not_stop_early() -> None:
    """Its last evaluation is the one at which patience ends."""
    options = {"eval_steps": 1, "early_stopping_patience": 1, "batch_size": 10, "learning_rate": 0.5}
    engine = TrainEngine(tiny_base("llama"))
    stopped = engine.add(job("stopped", validation=VALIDATION, **options))
    train_to_the_end(engine, "stopped")
    ended = engine.add(job("ended", validation=VALIDATION, **options, epochs=stopped.progress.step))
    train_to_the_end(engine, "ended")
    assert ended.progress.step == ended.job.steps == stopped.progress.step
    assert stopped.progress.stopped is not None
    assert ended.progress.misses == 1 and ended.progress.stopped is None


def test_a_job_that_stopped_early_rests_while_its_neighbour_goes_on() -> None:
    engine = TrainEngine(tiny_base("llama"))
    stopped = engine.add(job(validation=VALIDATION, eval_steps=1, early_stopping_patience=1, **OVERFITS))
    going = engine.add(job("neighbour", epochs=20))
    train_to_the_end(engine, "neighbour")
    assert stopped.done
    assert stopped.progress.step < stopped.job.steps
    assert going.progress.step == going.job.steps


def test_best_weights_are_what_a_bf16_base_computes_with_afterwards() -> None:
    engine = TrainEngine(tiny_base("llama", dtype=torch.bfloat16))
    live = engine.add(job(validation=VALIDATION, eval_steps=1, load_best_model_at_end=True, **OVERFITS))
    train_to_the_end(engine, "job")
    best, last = live.progress.best, live.progress.evaluation
    assert best is not None and last is not None
    assert last.loss > 1.02 * best.loss
    # In bf16 rows may round otherwise where they lie among others.
    assert by_definition(engine, live, VALIDATION).loss == pytest.approx(best.loss, rel=5e-3)


def test_validation_loss_that_is_not_finite_fails_its_job_alone_with_the_step() -> None:
    engine = TrainEngine(tiny_base("llama"), capacity=96)
    bad = engine.add(job("bad", validation=VALIDATION, eval_steps=2))
    sound = engine.add(job("sound", validation=VALIDATION, eval_steps=2, epochs=3))
    failures = []
    while not sound.done:
        if bad.evaluation_due and bad.progress.step == 4:
            bad.optimizer.flat.fill_(math.nan)
        if isinstance(result := engine.micro_batch().get("bad"), JobDiverged):
            failures.append(result)
            engine.remove("bad")
    assert [failure.step for failure in failures] == [4]
    assert "validation loss" in str(failures[0])
    alone = TrainEngine(tiny_base("llama"))
    same = alone.add(sound.job)
    train_to_the_end(alone, "sound")
    assert torch.equal(state(sound), state(same))
    assert sound.progress == same.progress


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"eval_steps": 5}, {"load_best_model_at_end": True}, {"early_stopping_patience": 2}], ids=str
)
def test_options_that_need_validation_rows_are_refused_without_them(options: dict[str, Any]) -> None:
    (option,) = options
    with pytest.raises(ValueError, match=f"validation examples, which {option} "):
        TrainEngine(tiny_base("llama")).add(job(**options))
    TrainEngine(tiny_base("llama")).add(job(validation=VALIDATION, **options))
    TrainEngine(tiny_base("llama")).add(job(load_best_model_at_end=False))


def test_validation_rows_without_a_supervised_token_are_refused() -> None:
    unsupervised = [Example(example.ids, [False] * len(example.ids)) for example in VALIDATION]
    with pytest.raises(ValueError, match="supervised token"):
        TrainEngine(tiny_base("llama")).add(job(validation=unsupervised))
    engine = TrainEngine(tiny_base("llama"))
    engine.add(job(validation=[*unsupervised, VALIDATION[0]], epochs=1))
    evaluations = [outcome.evaluation for outcome in train_to_the_end(engine, "job")]
    assert [evaluation.tokens for evaluation in evaluations if evaluation] == [sum(VALIDATION[0].labels_mask)]
