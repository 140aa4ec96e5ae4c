"""An optimizer step that is queued: what it does to a job's numbers, and when it does nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_core.live_job import LiveJob
from lora_core.trainer import TrainEngine
from tests.models import job, tiny_base


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
    return [tensor.clone() for tensor in (optimizer.flat.detach(), *optimizer.moments, optimizer._cast, *counts)]


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
