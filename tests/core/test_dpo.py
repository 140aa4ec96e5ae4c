"""Training from preferences is direct preference optimisation as the paper and TRL have it, wherever its pairs lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from lora_core.adapters.targets import AdaptableModules
from lora_core.config import TrainConfig
from lora_core.data.dataset import Example
from lora_core.data.packing import Chunk
from lora_core.models.base import BaseModel
from lora_core.training.engine import ReadyBatch, TrainEngine
from lora_core.training.job import EngineJob
from tests.support.models import (
    adapter_in_double,
    decoder_base,
    documents,
    job,
    random_adapter,
    random_b,
    relative,
    tiny_base,
    tiny_model,
    train_to_the_end,
    train_until,
)
from tests.support.peft_reference import peft_with, reference_training

PAIRS = documents(10, 3)
DPO: dict[str, Any] = {"method": "dpo", "beta": 0.3, "batch_size": 2}
HEAD = ["lm_head", "v_proj"]


def log_probabilities(model: Any, examples: Sequence[Example]) -> Tensor:
    """Of each document's labels, added up: one at a time through transformers' own forward pass."""
    found = []
    for example in examples:
        ids, kept = torch.tensor([example.ids]), torch.tensor(example.labels_mask[1:])
        log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found.append(log_p.gather(1, ids[0, 1:, None])[kept].sum())
    return torch.stack(found)


class Textbook:
    """TRL's loss of each step, with the reference `before` training begins."""

    def __init__(self, model: Any, wanted: EngineJob, of_base: bool) -> None:
        self.beta, self.wanted, self.figures = wanted.train.beta, wanted, []
        with torch.no_grad():
            if of_base:
                with model.disable_adapter():
                    self.reference = log_probabilities(model, wanted.examples)
            else:
                self.reference = log_probabilities(model, wanted.examples)

    def __call__(self, model: Any, wanted: EngineJob, step: int) -> Tensor:
        indices = wanted.examples_of(step)
        log_p = log_probabilities(model, [wanted.examples[index] for index in indices])
        chosen_ratios, rejected_ratios = (log_p - self.reference[indices]).view(-1, 2).unbind(1)
        logits = chosen_ratios - rejected_ratios
        rewards = self.beta * chosen_ratios.detach(), self.beta * rejected_ratios.detach()
        accuracy, margin = (rewards[0] > rewards[1]).double().mean(), (rewards[0] - rewards[1]).mean()
        self.figures.append((float(accuracy), float(margin)))
        return -F.logsigmoid(self.beta * logits).mean()


@pytest.mark.parametrize("goes_on", [False, True], ids=["from the base", "from an adapter"])
@pytest.mark.parametrize(
    ("make_base", "lora", "capacity"),
    [(tiny_base, {}, 40), (decoder_base, {"use_dora": True}, 40), (tiny_base, {"target_modules": HEAD}, 9999)],
)
def test_steps_are_those_of_the_textbook(
    make_base: Callable[..., BaseModel], lora: dict[str, Any], capacity: int, goes_on: bool
) -> None:
    """In fp64: losses, rewards, and A, B and m after two epochs. Micro-batches take a document or two, or all."""
    wanted = job(examples=PAIRS, lora={"r": 3} | lora, epochs=2, weight_decay=0.1, **DPO)
    if goes_on:
        targets = lora.get("target_modules", "all-linear")
        start = random_adapter(AdaptableModules(tiny_model("llama")), 5, 3, targets=targets, dora="use_dora" in lora)
        wanted = replace(wanted, init_adapter=adapter_in_double(start))
    engine = TrainEngine(make_base("llama", dtype=torch.float64), capacity=capacity)
    live = engine.add(wanted)
    model, weights = peft_with(live)
    textbook = Textbook(model, wanted, of_base=not goes_on)
    expected = reference_training(model, weights, wanted, 6, loss=textbook)
    outcomes = train_to_the_end(engine, "job")
    assert outcomes[0].loss == pytest.approx(math.log(2), rel=1e-12) and outcomes[-1].loss < 0.8 * outcomes[0].loss
    assert [outcome.loss for outcome in outcomes] == pytest.approx(expected, rel=1e-9)
    margins = [outcome.margin for outcome in outcomes]
    assert margins == pytest.approx([margin for _, margin in textbook.figures], rel=1e-9, abs=1e-12)
    assert [outcome.accuracy for outcome in outcomes[1:]] == [accuracy for accuracy, _ in textbook.figures[1:]]
    assert [outcome.tokens for outcome in outcomes] == [
        sum(sum(PAIRS[index].labels_mask) for index in wanted.examples_of(step)) for step in range(6)
    ]
    for ours, theirs in zip(live.adapter.trained, weights, strict=True):
        assert relative(ours.detach(), theirs.detach()) < 1e-9


def preferring(count: int, seed: int) -> list[Example]:
    """Prompts with an answer of small tokens, which is preferred, and one of large ones."""
    stream = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        prompt = torch.randint(3, 96, (6,), generator=stream).tolist()
        for low in (3, 50):
            answer = torch.randint(low, low + 4, (4,), generator=stream).tolist()
            found.append(Example([*prompt, *answer], [False] * 6 + [True] * 4))
    return found


def test_what_is_preferred_is_learnt_and_told_of_pairs_that_it_never_saw() -> None:
    engine = TrainEngine(tiny_base("llama"), capacity=256)
    options = DPO | {"batch_size": 8, "epochs": 4, "learning_rate": 5e-3, "load_best_model_at_end": True}
    live = engine.add(
        job(examples=preferring(24, 0), validation=preferring(20, 1), lora={"lora_dropout": 0.1}, **options)
    )
    outcomes, progress = train_to_the_end(engine, "job"), live.progress
    assert progress.before is not None and progress.best is not None
    assert (progress.before.loss, progress.before.margin) == (pytest.approx(math.log(2)), pytest.approx(0, abs=1e-5))
    assert progress.best.loss < 0.45 and progress.best.accuracy > 0.8 and (progress.best.margin or 0) > 0.5
    assert outcomes[-1].loss < 0.2 and outcomes[-1].accuracy == 1.0


def test_the_reference_scores_each_document_once_whatever_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[tuple[int, ...]] = []
    evaluate = TrainEngine.evaluate

    def watched(engine: TrainEngine, batch: ReadyBatch) -> None:
        scored.extend(tuple(chunk.examples[0][1].ids) for chunk in batch.chunks if chunk.reference)
        evaluate(engine, batch)

    monkeypatch.setattr(TrainEngine, "evaluate", watched)
    wanted = job(examples=PAIRS, validation=documents(4, 8), epochs=3, eval_steps=2, **DPO)
    engine = TrainEngine(tiny_base("llama"), capacity=64)
    live = engine.add(wanted)
    train_until(engine, "job", 2)
    again = TrainEngine(tiny_base("llama"), capacity=99)
    resumed = again.add(wanted, live.snapshot().dump())
    train_to_the_end(again, "job")
    assert sorted(scored) == sorted(tuple(one.ids) for one in (*wanted.examples, *wanted.validation))
    train_to_the_end(engine, "job")
    assert resumed.snapshot().dump() == live.snapshot().dump()


@pytest.mark.parametrize("make_base", [tiny_base, decoder_base])
def test_a_document_is_scored_with_the_dropout_that_it_is_trained_with(
    make_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the weights would be of another loss than the one whose gradient is taken."""
    engine = TrainEngine(make_base("llama"), capacity=48)
    random_b(engine.add(job(examples=PAIRS, lora={"lora_dropout": 0.5}, **DPO)))
    losses: dict[bool, dict[int, float]] = {False: {}, True: {}}
    evaluate, forward_backward = engine.forward.evaluate, engine.forward.forward_backward
    chunks: list[Chunk] = []

    def scored(ready: Any) -> tuple[Tensor, Tensor]:
        found = evaluate(ready)
        losses[False] |= {c.examples[0][0]: float(x) for c, x in zip(chunks, found[0], strict=True) if not c.reference}
        return found

    def trained(*given: Any) -> Tensor:
        found = forward_backward(*given)
        losses[True] |= {chunk.examples[0][0]: float(loss) for chunk, loss in zip(chunks, found, strict=True)}
        return found

    monkeypatch.setattr(engine.forward, "evaluate", scored)
    monkeypatch.setattr(engine.forward, "forward_backward", trained)
    for name in ("evaluate", "forward_backward"):
        compute = getattr(engine, name)

        def watched(batch: ReadyBatch, compute: Any = compute) -> None:
            chunks[:] = batch.chunks
            compute(batch)

        monkeypatch.setattr(engine, name, watched)
    train_until(engine, "job", 1)
    assert losses[True].keys() == {0, 1, 2, 3} and losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_an_adapter_to_score_with_is_counted_and_options_of_other_methods_are_refused() -> None:
    start = random_adapter(AdaptableModules(tiny_model("llama")), 5)
    alone = job(examples=PAIRS, **DPO)
    planner = TrainEngine(tiny_base("llama"), capacity=None).planner
    plans = [planner.plan([one]) for one in (alone, replace(alone, init_adapter=start))]
    assert plans[0] is not None and plans[1] is not None
    copy = sum(weight.nbytes for weight in start.trained)
    assert plans[1].predicted_bytes - plans[0].predicted_bytes == copy > 0
    assert "has an example without another one" in job(examples=PAIRS[:3], **DPO).problems()[0]
    for options, sentence in (
        ({"beta": 0.2}, "beta\n.* is of method dpo alone: set method to dpo"),
        ({"method": "dpo", "beta": 0}, "beta\n.* greater than 0"),
        ({"method": "dpo", "train_on": "all"}, "train_on\n.* must be completion with method dpo"),
    ):
        with pytest.raises(ValidationError, match=sentence):
            TrainConfig(**options)
    given: list[dict[str, Any]] = [{}, {"method": "dpo"}, {"method": "dpo", "learning_rate": 1e-3}]
    assert [TrainConfig(**options).learning_rate for options in given] == [2e-4, 2e-5, 1e-3]
