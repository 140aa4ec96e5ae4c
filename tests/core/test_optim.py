"""An optimizer step that is queued: what it does to a job's numbers, and when it does nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_core.data.dataset import Example
from lora_core.training.active_job import LiveJob
from lora_core.training.engine import TrainEngine
from lora_core.training.job import JobDiverged
from tests.support.models import documents, job, tiny_base


def stepped_job(**train: object) -> LiveJob:
    """A job with moments that are not zero."""
    engine = TrainEngine(tiny_base("llama"))
    live = engine.add(job(**train))
    engine.step()
    return live


def numbers(live: LiveJob) -> list[Tensor]:
    """Weights, moments and AdamW's own counts."""
    optimizer = live.optimizer
    counts = [state["step"] for state in optimizer._adamw.state.values()]
    return [
        tensor.clone() for tensor in (optimizer.flat.detach(), *optimizer.moments, optimizer._trained.cast, *counts)
    ]


def message(live: LiveJob, gradient: float, loss: float, tokens: float) -> None:
    live.optimizer._message.fill_(0.0)
    live.optimizer._grad[3:5] = gradient
    live.optimizer._message[-2:] = torch.tensor([loss, tokens])


@pytest.mark.parametrize("longest", [1.0, None])
@pytest.mark.parametrize(
    ("gradient", "loss", "tokens"),
    [
        (math.inf, 4.0, 2.0),
        (math.nan, 4.0, 2.0),
        (1e30, 4.0, 2.0),  # its square is too large
        (1.0, math.inf, 2.0),
        (1.0, math.nan, 2.0),
        (0.0, 0.0, 0.0),
    ],
)
def test_a_step_that_is_not_finite_or_empty_changes_nothing(
    gradient: float, loss: float, tokens: float, longest: float | None
) -> None:
    live = stepped_job(max_grad_norm=longest)
    before, steps = numbers(live), live.optimizer.steps
    message(live, gradient, loss, tokens)
    outcome = live.optimizer.outcome(*live.optimizer.queue_step(0.1, None).tolist())
    assert outcome.is_finite == (tokens == 0)
    assert live.optimizer.steps == steps
    for now, then in zip(numbers(live), before, strict=True):
        assert torch.equal(now, then)
    assert not live.optimizer._message.any()


@pytest.mark.parametrize(("longest", "factor"), [(None, 0.5), (10.0, 0.5), (1.5, 1.5 / 5.0)])
def test_the_gradient_is_divided_by_tokens_and_clipped(longest: float | None, factor: float) -> None:
    """Its norm is 5, over 2 tokens."""
    live = stepped_job(max_grad_norm=longest)
    before = numbers(live)
    message(live, 0.0, 4.0, 2.0)
    live.optimizer._grad[3:5] = torch.tensor([3.0, 4.0])
    outcome = live.optimizer.outcome(*live.optimizer.queue_step(0.1, None).tolist())
    assert (outcome.loss, outcome.tokens, outcome.grad_norm) == (2.0, 2, 2.5)
    beta = live.optimizer._adamw.param_groups[0]["betas"][0]
    moment, then = numbers(live)[1][3:5], before[1][3:5]
    torch.testing.assert_close(moment, beta * then + (1 - beta) * factor * torch.tensor([3.0, 4.0]))
    assert live.optimizer.steps == 2


def test_a_module_that_the_model_does_not_use_ends_the_job() -> None:
    """Its steps have few labels, so that only several together tell; they are the same on a resumed job."""
    base = tiny_base("llama")
    base.model.model.layers[1].mlp.forward = torch.zeros_like
    wanted = job(examples=documents(8, seed=1, shortest=7, longest=7), batch_size=1)
    assert wanted.gradient_check_step is not None and wanted.gradient_check_step > 1
    for resumed in (False, True):
        engine = TrainEngine(base)
        live = engine.add(wanted)
        for _ in range(wanted.gradient_check_step):
            assert not isinstance(engine.step()["job"], JobDiverged)
            if resumed:
                blob, engine = live.snapshot().dump(), TrainEngine(base)
                live = engine.add(wanted, blob)
        before = numbers(live)
        outcome = engine.step()["job"]
        assert isinstance(outcome, JobDiverged) and outcome.step == wanted.gradient_check_step + 1
        without_gradient = ", ".join(f"model.layers.1.mlp.{leaf}_proj" for leaf in ("gate", "up", "down"))
        assert f"no gradient reaches {without_gradient}: this model does not use them" in outcome.reason
        assert all(map(torch.equal, numbers(live), before))


def test_a_judged_step_without_a_gradient_of_its_own_is_judged_by_those_before_it() -> None:
    """Labels that the model is sure of have none."""
    live = stepped_job()
    message(live, 0.0, 0.0, 16.0)
    live.optimizer.queue_step(0.1, None, check_gradients=True)


def test_rows_of_two_tokens_say_nothing_about_q_and_k() -> None:
    """Their one label follows a token that sees itself alone; with PiSSA's start, B is not zero either."""
    pairs = [Example([3 + place, 4], [False, True]) for place in range(20)]
    assert job(examples=pairs, batch_size=20).gradient_check_step is None
    for lora in ({}, {"init_lora_weights": "pissa"}):
        longer = documents(4, seed=1, shortest=30)
        wanted = job(examples=[*pairs, *longer], batch_size=4, epochs=4, lora=lora)
        engine = TrainEngine(tiny_base("llama"))
        live = engine.add(wanted)
        while not live.done:
            assert not isinstance(engine.step()["job"], JobDiverged)
