"""PEFT as the reference: its model in fp64 with the weights of a job, trained as everybody trains with plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.config import LoraConfig
from lora_core.data.dataset import Example
from lora_core.training.active_job import LiveJob
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob
from lora_core.training.optimizer import learning_rate
from tests.support.models import InDouble, in_double, next_chunks, tiny_model

LLAMA_PATTERNS: dict[str, Any] = {
    "rank_pattern": {r"layers\.0\..*q_proj": 2, "q_proj": 9, "mlp.down_proj": 3},
    "alpha_pattern": {"v_proj": 1, r"model\.layers\.1\..*": 20},
}


def moved(engine: TrainEngine, wanted: EngineJob) -> LiveJob:
    """The job with B and m away from where they start, so that every part has a gradient."""
    live = engine.add(wanted)
    stream = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for b in live.adapter.b.values():
            b.copy_(torch.randn(b.shape, generator=stream) * 0.1)
        for m in live.adapter.magnitude.values():
            m.mul_(1 + 0.2 * torch.randn(m.shape, generator=stream))
    live.adapter.norm.clear()
    return live


def peft_model(kind: str, lora: LoraConfig) -> Any:
    """In fp64 with transformers' own attention, with the weights that PEFT starts from."""
    config, model = peft.LoraConfig(task_type="CAUSAL_LM", **lora.model_dump()), tiny_model(kind, attention="eager")
    with InDouble():  # singular vectors too
        return in_double(peft.get_peft_model(model, config))


def layers_of(model: Any, live: LiveJob) -> dict[str, Any]:
    """PEFT's layer of every module of ours; there are no others."""
    found = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert list(found) == list(live.adapter.a)
    return found


def peft_with(live: LiveJob, kind: str = "llama") -> tuple[Any, list[Tensor]]:
    """PEFT's model with the weights of `live`, and its trained weights in the order of `live.adapter.trained`."""
    model = peft_model(kind, live.job.lora)
    layers = layers_of(model, live).values()
    weights = [layer.lora_A["default"].weight for layer in layers]
    weights += [layer.lora_B["default"].weight for layer in layers]
    if live.job.lora.use_dora:
        weights += [layer.lora_magnitude_vector["default"].weight for layer in layers]
    with torch.no_grad():
        for theirs, ours in zip(weights, live.adapter.trained, strict=True):
            assert theirs.dtype == torch.float64
            theirs.copy_(ours)
    return model, weights


def padded_loss(model: torch.nn.Module, examples: Sequence[Example]) -> Tensor:
    """Mean loss of a supervised token, from transformers' own forward pass on a batch that is padded on the right."""
    longest = max(len(example.ids) for example in examples)
    ids, mask = torch.zeros(2, len(examples), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length], mask[row, :length] = torch.tensor(example.ids), 1
        labels[row, :length][torch.tensor(example.labels_mask)] = ids[row, :length][torch.tensor(example.labels_mask)]
    logits = model(input_ids=ids, attention_mask=mask).logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).to(wide), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
    )
    return total / (labels != -100).sum()


def step_loss(model: torch.nn.Module, wanted: EngineJob, step: int) -> Tensor:
    return padded_loss(model, [wanted.examples[index] for index in wanted.examples_of(step)])


def reference_training(
    model: torch.nn.Module,
    weights: Sequence[Tensor],
    wanted: EngineJob,
    steps: int,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[torch.nn.Module, EngineJob, int], Tensor] = step_loss,
) -> list[float]:
    """Losses of plain torch, which trains `weights` in place: padded batches, autograd, AdamW if not said."""
    config = wanted.train
    optimizer = optimizer or torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=config.weight_decay)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(steps):
        of_step = loss(model, wanted, step)
        of_step.backward()
        if config.max_grad_norm is not None:
            exact_clip(weights, config.max_grad_norm)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (learning_rate(config, step, wanted.steps) / config.learning_rate)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(of_step.detach()))
    return losses


def exact_clip(weights: Sequence[Tensor], limit: float) -> None:
    """clip_grad_norm_ without the 1e-6 that it adds to the norm."""
    grads = [weight.grad for weight in weights if weight.grad is not None]
    norm = float(torch.cat([grad.flatten() for grad in grads]).norm())
    for grad in grads:
        grad.mul_(min(1.0, limit / norm))


def gradients_of(weights: Sequence[Tensor]) -> list[Tensor]:
    """They are zero afterwards."""
    found = []
    for weight in weights:
        assert weight.grad is not None
        found.append(weight.grad.clone())
        weight.grad.zero_()
    return found


def our_gradients(engine: TrainEngine, live: LiveJob) -> list[Tensor]:
    """Of the next step, by its supervised tokens."""
    engine.forward_backward(engine.ready(next_chunks([live])))
    tokens = float(live.optimizer._message[-1])
    live.optimizer._message[-2:] = 0
    return [gradient / tokens for gradient in gradients_of(live.adapter.trained)]
