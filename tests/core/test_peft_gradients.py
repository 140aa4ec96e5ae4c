"""Gradients against PEFT's own in fp64: exactly without dropout, on both ways through the base; in the mean with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from lora_core.models.base import BaseModel
from lora_core.training.active_job import LiveJob
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob
from tests.core.test_trainer import padded_loss
from tests.support.models import decoder_base, documents, job, next_chunks, relative, tiny_base, tiny_model

DOUBLE = torch.float64
LORAS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 7},
    "rslora": {"r": 16, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "patterns": {"r": 3, "rank_pattern": {"up_proj": 9, "q_proj": 1}, "alpha_pattern": {"mlp.*": 20}},
    "dora": {"r": 4, "use_dora": True},
    "dora with rslora": {"r": 5, "use_dora": True, "use_rslora": True},
}
CASES = [("llama", name, tiny_base) for name in LORAS]
CASES += [("llama", name, decoder_base) for name in LORAS] + [("qwen3", "lora", decoder_base)]


def moved(engine: TrainEngine, wanted: EngineJob) -> LiveJob:
    """The job with all that it trains away from where it starts."""
    live = engine.add(wanted)
    stream = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in (*live.adapter.b.values(), *live.adapter.magnitude.values()):
            weight.add_(torch.randn(weight.shape, generator=stream, dtype=DOUBLE) * 0.1)
    live.adapter.norm.clear()
    return live


def peft_with(live: LiveJob, kind: str = "llama") -> tuple[torch.nn.Module, list[Tensor]]:
    """PEFT's model with the weights of `live`, and its trained weights in our order."""
    lora = live.job.lora
    options = lora.model_dump(exclude={"init_lora_weights", "layers_to_transform"})
    model = tiny_model(kind, attention="eager", dtype=DOUBLE)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    layers = [model.base_model.model.get_submodule(name) for name in live.adapter.a]
    weights = [layer.lora_A["default"].weight for layer in layers]
    weights += [layer.lora_B["default"].weight for layer in layers]
    if lora.use_dora:
        weights += [layer.lora_magnitude_vector["default"].weight for layer in layers]
    with torch.no_grad():
        for theirs, ours in zip(weights, live.adapter.trained, strict=True):
            assert theirs.dtype == DOUBLE
            theirs.copy_(ours)
    return model.train(), weights


def gradient_of(weights: list[Tensor]) -> Tensor:
    """All of it in one vector; zero afterwards."""
    parts = []
    for weight in weights:
        assert weight.grad is not None
        parts.append(weight.grad.flatten().clone())
        weight.grad.zero_()
    return torch.cat(parts)


def our_gradient(engine: TrainEngine, live: LiveJob) -> Tensor:
    """Of the next step, by its supervised tokens."""
    engine.forward_backward(engine.ready(next_chunks([live])))
    tokens = float(live.optimizer._message[-1])
    live.optimizer._message[-2:] = 0
    return gradient_of(live.adapter.trained) / tokens


@pytest.mark.parametrize(("kind", "name", "make_base"), CASES)
def test_without_dropout_the_gradient_is_pefts(kind: str, name: str, make_base: Callable[..., BaseModel]) -> None:
    engine = TrainEngine(make_base(kind, dtype=DOUBLE))
    live = moved(engine, job(lora=LORAS[name], batch_size=6))
    assert (engine.forward.name == "llama") == (make_base is decoder_base)
    model, weights = peft_with(live, kind)
    padded_loss(model, [live.job.examples[index] for index in live.job.examples_of(0)]).backward()
    theirs = gradient_of(weights)
    assert relative(our_gradient(engine, live), theirs) < 1e-11


PASSES, COPIES = 40, 64


def z_squared(one: Tensor, other: Tensor) -> float:
    """Mean over the coordinates of `(difference of means / its standard error)^2` of two samples `[n, coordinates]`:
    1 by expectation where both are drawn from the same distribution.
    """
    variance = one.var(0) / len(one) + other.var(0) / len(other)
    return float(((one.mean(0) - other.mean(0)) ** 2 / variance).mean())


@pytest.mark.parametrize(("name", "make_base"), [("lora", tiny_base), ("rslora", decoder_base)])
def test_with_dropout_the_gradient_is_pefts_in_the_mean(name: str, make_base: Callable[..., BaseModel]) -> None:
    """One document 64 times in a batch, each time with dropout of its own, in 40 steps: means of 2,560 draws on each
    side differ by no more than their standard error says; and so do the means of squares, in which draws that hang
    together would show. Another rate of dropout is seen.
    """
    document = documents(1, seed=3, shortest=10, longest=10)

    def ours(p: float, seed: int) -> tuple[LiveJob, Tensor]:
        engine = TrainEngine(make_base("llama", dtype=DOUBLE))
        lora = {**LORAS[name], "lora_dropout": p, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        live = moved(engine, job(examples=document * COPIES, batch_size=COPIES, epochs=PASSES, seed=seed, lora=lora))
        with torch.no_grad():  # another seed is another start; the dropout alone is to differ
            for place, a in enumerate(live.adapter.a.values()):
                a.copy_(torch.randn(a.shape, generator=torch.Generator().manual_seed(place), dtype=DOUBLE) * 0.1)
        draws = []
        for step in range(PASSES):
            live.progress.step = step
            draws.append(our_gradient(engine, live))
        return live, torch.stack(draws)

    live, here = ours(0.4, seed=0)
    model, weights = peft_with(live)
    torch.manual_seed(0)
    draws = []
    for _ in range(PASSES):
        padded_loss(model, document * COPIES).backward()
        draws.append(gradient_of(weights))
    there = torch.stack(draws)
    assert z_squared(here, there) < 1.4
    middle = there.mean(0)
    assert z_squared((here - middle) ** 2, (there - middle) ** 2) < 1.4
    assert z_squared(ours(0.3, seed=1)[1], there) > 4
