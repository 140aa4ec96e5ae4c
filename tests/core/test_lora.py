"""The definition of `lora.py`, and that the service's engine is the same thing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_core.config import LoraConfig, TrainConfig
from lora_core.lora import LinearWithLoRA, LoRALayer, replace_linear_with_lora
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob
from lora_core.training.optimizer import StepOutcome
from tests.support.models import documents, tiny_base, tiny_model


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["layers.1.mlp.down_proj"], ["o_proj", "gate_proj", "k_proj"]]
)
def test_one_step_equals_one_step_of_the_engine(kind: str, targets: list[str]) -> None:
    """`alpha` here is `lora_alpha / r` there. One document, one AdamW step, from the same A and from a B that is not
    zero.
    """
    rank, alpha, rate = 4, 1.5, 1e-2
    example = documents(1, seed=3, shortest=20)[0]
    engine = TrainEngine(tiny_base(kind, dtype=torch.float64))
    lora = LoraConfig(r=rank, lora_alpha=alpha * rank, target_modules=targets)
    train = TrainConfig(
        epochs=1, batch_size=1, learning_rate=rate, lr_scheduler="constant", warmup_ratio=0, max_grad_norm=1e9
    )
    live = engine.add(EngineJob("job", lora, train, [example]))
    model = tiny_model(kind, attention="eager", dtype=torch.float64)
    names = replace_linear_with_lora(model, rank, alpha, targets)
    model.double()
    assert names == list(live.adapter.a)
    torch.manual_seed(0)
    layers = {name: model.get_submodule(name) for name in names}
    with torch.no_grad():
        for name, layer in layers.items():
            assert isinstance(layer, LinearWithLoRA)
            live.adapter.b[name].copy_(torch.randn_like(live.adapter.b[name]) * 0.1)
            layer.lora.A.copy_(live.adapter.a[name].t())
            layer.lora.B.copy_(live.adapter.b[name].t())
    before = live.optimizer.flat.clone()
    outcome = engine.step()["job"]
    assert isinstance(outcome, StepOutcome)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    logits = model(torch.tensor([example.ids])).logits[0, :-1]
    supervised = torch.tensor(example.labels_mask[1:])
    loss = F.cross_entropy(logits[supervised], torch.tensor(example.ids[1:])[supervised])
    loss.backward()
    optimizer.step()
    assert outcome.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert float((live.optimizer.flat - before).abs().max()) > rate / 2
    for name, layer in layers.items():
        assert isinstance(layer, LinearWithLoRA)
        # One Adam step is rate * sign(gradient), but where a gradient is near zero its rounding shows.
        torch.testing.assert_close(live.adapter.a[name].detach(), layer.lora.A.detach().t(), rtol=0, atol=rate * 1e-6)
        torch.testing.assert_close(live.adapter.b[name].detach(), layer.lora.B.detach().t(), rtol=0, atol=rate * 1e-6)


def test_layer_is_alpha_x_a_b_and_starts_at_zero() -> None:
    layer = LoRALayer(in_dim=6, out_dim=5, rank=2, alpha=0.5).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    assert (layer.A.shape, layer.B.shape) == ((6, 2), (2, 5))
    assert not layer(x).any()
    nn.init.normal_(layer.B)
    torch.testing.assert_close(layer(x), 0.5 * x @ layer.A @ layer.B, rtol=1e-12, atol=1e-12)


def test_wrapped_linear_adds_to_the_linear() -> None:
    linear = nn.Linear(6, 5, dtype=torch.float64)
    wrapped = LinearWithLoRA(linear, rank=2, alpha=3.0).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(wrapped(x), linear(x))
    nn.init.normal_(wrapped.lora.B)
    update = 3.0 * x @ wrapped.lora.A @ wrapped.lora.B
    torch.testing.assert_close(wrapped(x), linear(x) + update, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_dim", [64, 4096])
def test_initial_a_takes_its_fan_in_from_the_input(in_dim: int) -> None:
    """kaiming_uniform_ on `[in, r]` would make the bound 1 / sqrt(r): 16 times this one at 4,096."""
    a = LoRALayer(in_dim, 8, rank=16, alpha=1.0).A.detach()
    bound = 1 / math.sqrt(in_dim)
    assert float(a.abs().max()) <= bound
    assert float(a.abs().max()) > 0.98 * bound
    assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4))])
        self.norm = nn.LayerNorm(4)


def test_every_linear_is_replaced_and_all_else_frozen() -> None:
    model = Nested()
    assert replace_linear_with_lora(model, 2, 1.0) == ["first", "blocks.0.0", "blocks.1.0"]
    assert isinstance(model.blocks[0][0], LinearWithLoRA)  # type: ignore[index]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.lora.{part}" for name in ("first", "blocks.0.0", "blocks.1.0") for part in "AB"}


def test_target_modules_match_full_names_and_last_parts() -> None:
    assert replace_linear_with_lora(Nested(), 2, 1.0, ["first"]) == ["first"]
    assert replace_linear_with_lora(Nested(), 2, 1.0, ["0.0"]) == ["blocks.0.0"]
    model = Nested()
    assert replace_linear_with_lora(model, 2, 1.0, ["blocks.1.0"]) == ["blocks.1.0"]
    assert isinstance(model.first, nn.Linear)
    assert not model.first.weight.requires_grad


@pytest.mark.parametrize("targets", [["q_proj"], ["irst"], [], ["blocks"]])
def test_nothing_that_matches_is_an_error_that_names_what_exists(targets: list[str]) -> None:
    model = Nested()
    with pytest.raises(ValueError, match=r"the linears here are: 0, first"):
        replace_linear_with_lora(model, 2, 1.0, targets)
    assert model.first.weight.requires_grad  # the model is as it was


def test_bf16_base_is_computed_in_bf16_with_fp32_weights() -> None:
    wrapped = LinearWithLoRA(nn.Linear(6, 5, dtype=torch.bfloat16), rank=2, alpha=1.0)
    assert wrapped(torch.randn(3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert wrapped.lora.A.dtype == torch.float32
