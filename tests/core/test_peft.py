"""What PEFT computes in fp64 is what we compute: gradients, steps and starts, on both ways through the base; with
dropout in the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor

from lora_core.adapters.init import init_adapter
from lora_core.config import LoraConfig
from lora_core.models.base import BaseModel
from lora_core.models.hooks.bank import AdapterBank
from lora_core.training.active_job import LiveJob
from lora_core.training.engine import TrainEngine
from tests.support.models import VOCABULARY, decoder_base, documents, job, logits_of, outcome_of, relative, tiny_base
from tests.support.peft_reference import (
    LLAMA_PATTERNS,
    gradients_of,
    layers_of,
    moved,
    our_gradients,
    padded_loss,
    peft_model,
    peft_with,
    reference_training,
    step_loss,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")
DOUBLE = torch.float64
GPT2_PATTERNS: dict[str, Any] = {
    "rank_pattern": {"attn.c_proj": 2, "c_proj": 5}, "alpha_pattern": {"c_attn": 3}, "use_rslora": True,
}  # fmt: skip
DORA_HEAD = {"use_dora": True, "target_modules": ["lm_head", "q_proj", "down_proj"]}
LLAMA_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"r": 4, "lora_alpha": 7}),
    "rslora": ("llama", {"r": 16, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "patterns": ("llama", {"r": 4, "lora_alpha": 6} | LLAMA_PATTERNS),
    "dora": ("llama", {"r": 4, "use_dora": True}),
    "biases, dora with rslora": ("qwen2", {"r": 5, "use_dora": True, "use_rslora": True}),
    "norms of heads": ("qwen3", {"r": 4, "lora_alpha": 7}),
}
"""These both paths take."""

HOOKS_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "transposes": ("gpt2", {"r": 8, "lora_alpha": 12}),
    "transposes, patterns": ("gpt2", {"r": 4, "lora_alpha": 6} | GPT2_PATTERNS),
    "transposes, dora": ("gpt2", {"use_dora": True}),
    "pissa with dora": ("llama", {"use_dora": True, "init_lora_weights": "pissa"}),
    "pissa, patterns": ("llama", {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"} | LLAMA_PATTERNS),
    "pissa, transposes": ("gpt2", {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"} | GPT2_PATTERNS),
    "head and more": ("llama", {"target_modules": ["lm_head", "v_proj"]}),
    "capped head": ("gemma2-untied", {"target_modules": ["lm_head", "v_proj"]}),
    "head with dora": ("llama", DORA_HEAD),
    "transposes, some layers": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "layers_to_transform": [1]}),
    "some layers": ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
}
CASES = [(*case, tiny_base) for case in (LLAMA_CASES | HOOKS_CASES).values()]
CASES += [(*case, decoder_base) for case in LLAMA_CASES.values()]
each_case = pytest.mark.parametrize(
    ("kind", "lora", "make_base"),
    CASES,
    ids=[*LLAMA_CASES, *HOOKS_CASES, *(f"decoder, {name}" for name in LLAMA_CASES)],
)


@each_case
def test_gradients_are_pefts(kind: str, lora: dict[str, Any], make_base: Callable[..., BaseModel]) -> None:
    engine = TrainEngine(make_base(kind, dtype=DOUBLE))
    live = moved(engine, job(lora=lora, batch_size=6))
    assert (engine.forward.name == "llama") == (make_base is decoder_base)
    assert ("rank_pattern" in lora) == (len({len(a) for a in live.adapter.a.values()}) > 2)
    assert ("alpha_pattern" in lora) == (len(set(live.adapter.scale.values())) > 2)
    model, weights = peft_with(live, kind)
    step_loss(model, live.job, 0).backward()
    theirs = gradients_of(weights)
    assert all(bool(gradient.any()) for gradient in theirs)
    for ours, gradient in zip(our_gradients(engine, live), theirs, strict=True):
        assert relative(ours, gradient) < 1e-12


@each_case
def test_steps_are_pefts(kind: str, lora: dict[str, Any], make_base: Callable[..., BaseModel]) -> None:
    """From where a job starts; with weight decay, which PEFT's users have on m too."""
    engine = TrainEngine(make_base(kind, dtype=DOUBLE))
    live = engine.add(job(lora=lora, epochs=20, learning_rate=2e-3, weight_decay=0.1, warmup_ratio=0.1))
    model, weights = peft_with(live, kind)
    expected = reference_training(model, weights, live.job, 20)
    follow(engine, live, expected, weights)


def follow(engine: TrainEngine, live: LiveJob, expected: list[float], weights: list[Tensor]) -> None:
    losses = [outcome_of(engine.step()["job"]).loss for _ in expected]
    assert max(abs(ours - theirs) for ours, theirs in zip(losses, expected, strict=True)) < 1e-9
    assert min(losses) < 0.97 * losses[0]
    for ours, theirs in zip(live.adapter.trained, weights, strict=True):
        assert relative(ours.detach(), theirs.detach()) < 1e-9


def test_loraplus_is_pefts_optimizer() -> None:
    engine = TrainEngine(tiny_base("llama", dtype=DOUBLE))
    rates = {"loraplus_lr_ratio": 8.0, "learning_rate": 5e-4, "weight_decay": 0.1, "lr_scheduler": "constant"}
    live = engine.add(job(lora={"r": 4, "lora_alpha": 6} | LLAMA_PATTERNS, max_grad_norm=None, **rates))
    model, weights = peft_with(live)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=5e-4, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    follow(engine, live, reference_training(model, weights, live.job, 10, optimizer), weights)


# --- starts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pissa, patterns", "pissa, transposes"])
def test_pissa_starts_as_pefts(name: str) -> None:
    """A singular vector's sign is free."""
    kind, lora = HOOKS_CASES[name]
    live = TrainEngine(tiny_base(kind, dtype=DOUBLE)).add(job(lora=lora))
    for module, layer in layers_of(peft_model(kind, live.job.lora), live).items():
        for part, ours, dim in (("lora_A", live.adapter.a[module], 1), ("lora_B", live.adapter.b[module], 0)):
            theirs = getattr(layer, part)["default"].weight
            signs = (theirs * ours).sum(dim, keepdim=True).sign()
            torch.testing.assert_close((ours * signs).detach(), theirs.detach(), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_m_starts_as_pefts_and_changes_nothing(kind: str) -> None:
    base = tiny_base(kind, dtype=DOUBLE)
    bank, lora = AdapterBank(base.model), LoraConfig(r=4, use_dora=True)
    adapter = init_adapter(bank, lora, seed=0)
    model = peft_model(kind, lora).base_model.model
    for name, m in adapter.magnitude.items():
        theirs = model.get_submodule(name).lora_magnitude_vector["default"].weight
        torch.testing.assert_close(m, theirs, rtol=1e-12, atol=0)
    ids = torch.randint(3, VOCABULARY, (1, 24))
    torch.testing.assert_close(logits_of(base, ids, bank, adapter), logits_of(base, ids), rtol=1e-12, atol=1e-12)


# --- dropout ---------------------------------------------------------------------------------------------------------

PASSES, COPIES = 40, 32
DROPS = {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"]}
DOCUMENT = documents(1, seed=3, shortest=10, longest=10)


def z_squared(one: Tensor, other: Tensor) -> float:
    """Mean over the coordinates of `(difference of means / its standard error)^2` of two samples `[n, coordinates]`:
    1 by expectation where both are drawn from the same distribution.
    """
    variance = one.var(0) / len(one) + other.var(0) / len(other)
    return float(((one.mean(0) - other.mean(0)) ** 2 / variance).mean())


def drawn_by_us(p: float, seed: int = 0) -> tuple[LiveJob, Tensor]:
    """A job, and the gradients of its steps `[PASSES, coordinates]`."""
    engine, lora = TrainEngine(tiny_base("llama", dtype=DOUBLE)), DROPS | {"lora_dropout": p}
    live = moved(engine, job(examples=DOCUMENT * COPIES, batch_size=COPIES, epochs=PASSES, seed=seed, lora=lora))
    with torch.no_grad():  # another seed is another start; the dropout alone is to differ
        for place, a in enumerate(live.adapter.a.values()):
            a.copy_(torch.randn(a.shape, generator=torch.Generator().manual_seed(place), dtype=DOUBLE) * 0.1)
    draws = []
    for step in range(PASSES):
        live.progress.step = step
        draws.append(torch.cat([gradient.flatten() for gradient in our_gradients(engine, live)]))
    return live, torch.stack(draws)


def test_with_dropout_the_gradient_is_pefts_in_the_mean() -> None:
    """One document 32 times in a batch, each time with dropout of its own, in 40 steps: means of 1,280 draws on each
    side differ by no more than their standard error says; and so do the means of squares, in which draws that hang
    together would show. Another rate of dropout is seen. (What the decoder drops is what the hooks drop: test_decoder.)
    """
    live, ours = drawn_by_us(0.4)
    model, weights = peft_with(live)
    model.train()
    torch.manual_seed(0)
    draws = []
    for _ in range(PASSES):
        padded_loss(model, DOCUMENT * COPIES).backward()
        draws.append(torch.cat([gradient.flatten() for gradient in gradients_of(weights)]))
    theirs = torch.stack(draws)
    middle = theirs.mean(0)
    assert z_squared(ours, theirs) < 1.4
    assert z_squared((ours - middle) ** 2, (theirs - middle) ** 2) < 1.4
    assert z_squared(drawn_by_us(0.3, seed=1)[1], theirs) > 4
