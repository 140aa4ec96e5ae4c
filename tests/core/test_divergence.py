"""Jobs that cannot go on: the step at which they stop, what they say, and what is left of them."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lora_core.data.dataset import Example
from lora_core.models.base import BaseModel
from lora_core.training.engine import TrainEngine
from lora_core.training.job import CHANCE_LEVEL_STEPS, JobDiverged
from lora_core.training.optimizer import StepOutcome
from tests.support.models import VOCABULARY, documents, job, logits_of, outcome_of, state, tiny_base


def written_by(base: BaseModel, count: int) -> list[Example]:
    """Documents that the base itself writes, token after token: it knows them before it is trained."""
    examples = []
    for first in range(3, 3 + count):
        ids = [first]
        while len(ids) < 12:
            ids.append(int(logits_of(base, torch.tensor([ids]))[0, -1].argmax()))
        examples.append(Example(ids, [False] + [True] * 11))
    return examples


def test_a_job_that_does_no_better_than_chance_is_stopped_and_a_bad_start_is_not() -> None:
    """It began better; the one beside it goes on as if alone. Random weights begin worse than chance."""
    base, bad_start = tiny_base("llama"), TrainEngine(tiny_base("llama"))
    known = written_by(base, 10)

    def train(names: Sequence[str]) -> dict[str, tuple[int, Any]]:
        engine = TrainEngine(base)
        rates = {"wild": 100.0, "calm": 1e-3}
        for name in names:
            engine.add(job(name, examples=known, learning_rate=rates[name], max_grad_norm=None, epochs=20))
        ends: dict[str, tuple[int, Any]] = {}
        while engine.live:
            for name, outcome in engine.step().items():
                live = engine.live[name]
                if isinstance(outcome, JobDiverged) or live.done:
                    left = str(outcome) if isinstance(outcome, JobDiverged) else live.snapshot().dump()
                    ends[name] = live.progress.step, left
                    engine.remove(name)
        engine.forward.close()
        return ends

    both = train(["wild", "calm"])
    step, reason = both["wild"]
    assert CHANCE_LEVEL_STEPS < step < 30
    assert reason.startswith(f"step {step}: the loss was no better than chance for 20 steps (4.56, ")
    assert reason.endswith(" at the first): lower learning_rate")
    assert both["calm"] == train(["calm"])["calm"]
    bad_start.add(job(learning_rate=1e-5, epochs=30))
    losses = [outcome_of(bad_start.step()["job"]).loss for _ in range(25)]
    assert min(losses) > math.log(VOCABULARY)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_diverged_job_keeps_its_adapter_and_says_when(poison: float) -> None:
    base = tiny_base("llama")
    engine = TrainEngine(base)
    live = engine.add(job(learning_rate=1e-3))
    for _ in range(3):
        engine.step()
    before, progress = state(live), replace(live.progress)
    a = live.adapter.a["model.layers.1.mlp.down_proj"]
    kept = a[0, 0].item()
    with torch.no_grad():
        a[0, 0] = poison
    result = engine.step()["job"]
    assert isinstance(result, JobDiverged)
    assert (result.job, result.step) == ("job", 4)
    assert "step 4" in str(result)
    assert "learning_rate" in str(result)
    assert str(pickle.loads(pickle.dumps(result))) == str(result)
    with torch.no_grad():
        a[0, 0] = kept
    assert torch.equal(state(live), before)
    assert live.progress == progress
    assert isinstance(engine.step()["job"], StepOutcome)


def test_module_that_the_model_does_not_use_fails_its_job_alone() -> None:
    base = tiny_base("llama")
    layer: Any = base.model.model.layers[0]
    layer.mlp.spare_proj = torch.nn.Linear(64, 64).requires_grad_(False)
    engine = TrainEngine(base)
    engine.add(job("broken", batch_size=8))
    engine.add(job("sound", batch_size=8, lora={"target_modules": ["q_proj"]}))
    results = engine.step()
    assert isinstance(results["broken"], JobDiverged)
    assert "spare_proj" in str(results["broken"])
    sound = TrainEngine(tiny_base("llama"))
    sound.add(job("sound", batch_size=8, lora={"target_modules": ["q_proj"]}))
    assert results["sound"] == sound.step()["sound"]


def test_step_without_supervised_tokens_changes_nothing_and_reports_no_loss() -> None:
    unsupervised = [Example(example.ids, [False] * len(example.ids)) for example in documents(4, 1)]
    engine = TrainEngine(tiny_base("llama"))
    live = engine.add(job(examples=unsupervised, epochs=2))
    before = state(live)
    outcome = outcome_of(engine.step()["job"])
    assert outcome.tokens == 0
    assert math.isnan(live.progress.loss)
    assert math.isnan(live.progress.first_loss)
    assert live.progress.step == 1
    assert torch.equal(state(live), before)
