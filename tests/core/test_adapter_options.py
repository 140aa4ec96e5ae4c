"""What one adapter may choose for itself: ranks and alphas by module, PiSSA, where it starts; and what does not fit."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.init import LoraConfigError, adapted_modules, continued_adapter, init_adapter
from lora_core.adapters.peft_format import read_adapter
from lora_core.adapters.targets import AdaptableModules
from lora_core.config import LoraConfig, TrainConfig
from lora_core.models.hooks.bank import AdapterBank, Segment
from lora_core.models.probes import probe_losses
from lora_core.training.active_job import LiveJob
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob
from tests.support.models import (
    documents,
    tiny_base,
    tiny_model,
    train_until,
)
from tests.support.peft_reference import LLAMA_PATTERNS
from tests.support.tiny_models import write_adapter

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")
DOUBLE = torch.float64
PATTERNS: dict[str, Any] = {"r": 4, "lora_alpha": 6, **LLAMA_PATTERNS}


def wanted(lora: dict[str, Any], **train: Any) -> EngineJob:
    options = {"epochs": 20, "batch_size": 4, "learning_rate": 2e-3, "warmup_ratio": 0.0, "lr_scheduler": "constant"}
    return EngineJob("job", LoraConfig(**lora), TrainConfig(**options | train), documents(10, seed=0))


def outcomes(engine: TrainEngine, steps: int) -> list[float]:
    done = engine.live["job"].progress.step
    return [outcome.loss for outcome in train_until(engine, "job", done + steps)]


def test_layers_are_a_part_of_all_linears() -> None:
    chosen = adapted_modules(AdaptableModules(tiny_model("llama")), LoraConfig(layers_to_transform=[1]))
    assert len(chosen) == 7 and {name.split(".")[2] for name in chosen} == {"1"}


def test_gaussian_start_is_normal_with_deviation_one_by_its_rank() -> None:
    lora = LoraConfig(r=32, rank_pattern={"q_proj": 64}, init_lora_weights="gaussian")
    start = init_adapter(AdaptableModules(tiny_model("llama")), lora, seed=0)
    for name, a in start.a.items():
        assert float(a.std()) == pytest.approx(1 / (64 if "q_proj" in name else 32), rel=0.1)
        assert float(a.abs().max()) > 2.5 * float(a.std())  # no uniform
        assert not start.b[name].any()


def test_no_clipping_leaves_the_gradient_as_it_is() -> None:
    def first_moment(limit: float | None) -> Tensor:
        live = (engine := TrainEngine(tiny_base("llama"))).add(wanted({"r": 4}, max_grad_norm=limit))
        outcomes(engine, 1)
        return live.optimizer.moments[0]

    assert torch.equal(first_moment(None), first_moment(1e9))
    assert not torch.equal(first_moment(None), first_moment(1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_that_found_other_singular_vectors_go_on_from_those_of_rank_0(dtype: torch.dtype) -> None:
    job = wanted({"r": 4, "init_lora_weights": "pissa"})
    rank_0, rank_1 = (TrainEngine(tiny_base("llama", seed=seed, dtype=dtype)).add(job) for seed in (0, 1))
    sent: list[Tensor] = []

    def receive(tensor: Tensor) -> None:
        tensor.copy_(sent.pop(0))

    rank_0.optimizer.synchronise(lambda tensor: sent.append(tensor.clone()))
    rank_1.optimizer.synchronise(receive)
    assert not sent
    residuals = rank_0.adapter.residual, rank_1.adapter.residual
    assert residuals[0] is not None and residuals[1] is not None
    for one, other in ((rank_0.adapter, rank_1.adapter), (residuals[0], residuals[1])):
        for name, a in one.a.items():
            assert torch.equal(a, other.a[name]) and torch.equal(one.b[name], other.b[name])
            pairs = zip(one.weights(name, dtype), other.weights(name, dtype), strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@torch.no_grad()
def test_pissa_drops_nothing_of_what_the_base_computes() -> None:
    """PEFT's dropout is before the trained A alone; W - s B0 A0 sees all of x."""
    bank = AdapterBank(tiny_model("llama", dtype=DOUBLE))
    name = "model.layers.0.self_attn.q_proj"
    adapter = init_adapter(bank, LoraConfig(r=4, lora_dropout=0.5, init_lora_weights="pissa"), seed=0)
    x, keys = torch.randn(1, 8, 64, dtype=DOUBLE), torch.arange(8)

    def update(run: Segment) -> Tensor:
        with bank.routed([run]):
            seen: Tensor = bank.linears[name](x)
        return seen - bank.linears[name](x)

    both = update(Segment(adapter, 8, keys))
    trained_alone = update(Segment(replace(adapter, residual=None), 8, keys))
    residual = update(Segment(adapter.residual, 8))
    torch.testing.assert_close(both, trained_alone + residual, rtol=1e-12, atol=1e-12)
    assert float((trained_alone + residual).abs().max()) > 0.1
    assert float((update(Segment(adapter, 8))).abs().max()) < 1e-12


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"rank_pattern": {"q_porj": 8}}, "rank_pattern: 'q_porj' matches no adapted module; choose from down_proj,"),
        ({"rank_pattern": {"proj": 8}}, "rank_pattern: 'proj' matches no adapted module"),
        ({"rank_pattern": {"q_proj.*x": 8}}, "rank_pattern: 'q_proj.*x' matches no adapted module"),
        ({"alpha_pattern": {"lm_head": 8}}, "alpha_pattern: 'lm_head' matches no adapted module"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 8}},
         "rank_pattern: 'k_proj' matches no adapted module; choose from q_proj"),
        ({"rank_pattern": {".*_proj": 4, "q_proj": 8}},
         "rank_pattern: 'q_proj' never counts, as earlier keys match all its modules; put it first"),
        ({"layers_to_transform": [0, 2, 7]},
         "layers_to_transform: no adapted module lies in layer 2, 7; the layers are 0, 1"),
        ({"target_modules": ["q_proj"], "r": 65, "layers_to_transform": [1], "init_lora_weights": "pissa"},
         "init_lora_weights: model.layers.1.self_attn.q_proj has 64 singular vectors, and pissa was asked to train"
         " 65; lower r or rank_pattern"),
    ],
)  # fmt: skip
def test_what_fits_no_module_is_one_sentence(lora: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LoraConfigError) as caught:
        init_adapter(AdaptableModules(tiny_model("llama")), LoraConfig(**lora), seed=0)
    assert len(caught.value.problems) == 1
    assert sentence in str(caught.value)


def test_all_that_fits_no_module_is_told_at_once() -> None:
    lora = LoraConfig(
        target_modules=["nothing"], rank_pattern={"x": 1}, alpha_pattern={"y": 1}, layers_to_transform=[9]
    )
    with pytest.raises(LoraConfigError) as caught:
        adapted_modules(AdaptableModules(tiny_model("llama")), lora)
    options = [problem.partition(":")[0] for problem in pickle.loads(pickle.dumps(caught.value)).problems]
    assert options == ["target_modules", "layers_to_transform", "rank_pattern", "alpha_pattern"]


def test_the_order_of_a_pattern_survives_json() -> None:
    lora = LoraConfig(rank_pattern={"q_proj": 2, ".*_proj": 4})
    again = LoraConfig.model_validate_json(json.dumps(lora.model_dump(mode="json")))
    assert [again.rank_of("layers.0.q_proj"), again.rank_of("layers.0.k_proj")] == [2, 4]


# --- a start from another adapter ------------------------------------------------------------------------------------


def published(live: LiveJob, engine: TrainEngine, folder: Path) -> Adapter:
    """What a reader of a job's published files gets: scale 1, zeros up to the largest rank."""
    return read_adapter(write_adapter(live.adapter, engine.forward.modules, folder), engine.forward.modules)


def started_from(given: Adapter, lora: dict[str, Any], **train: Any) -> EngineJob:
    return replace(wanted(lora, **train), init_adapter=given)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_job_goes_on_from_a_published_adapter_with_another_scale(use_dora: bool, tmp_path: Path) -> None:
    """Its first loss is the last one's, and its A, B and m are the trained ones, up to what the scales differ by."""
    plain = PATTERNS | {"use_dora": use_dora}
    first = (engine := TrainEngine(tiny_base("llama"))).add(wanted(plain))
    outcomes(engine, 10)
    given = published(first, engine, tmp_path)
    assert {a.shape[0] for a in given.a.values()} == {9}
    engine.live.clear()
    other = plain | {"lora_alpha": 31, "use_rslora": True}
    second = engine.add(started_from(given, other, learning_rate=1e-9))
    for name, a in first.adapter.a.items():
        assert torch.equal(second.adapter.a[name], a)
        assert not use_dora or torch.equal(second.adapter.magnitude[name], first.adapter.magnitude[name])
        scaled = second.adapter.b[name] * second.adapter.scale[name]
        torch.testing.assert_close(scaled, first.adapter.b[name] * first.adapter.scale[name], rtol=1e-6, atol=0)
    examples = first.job.examples
    losses = [probe_losses(engine.forward, live.bound, examples) for live in (first, second)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1] != pytest.approx(probe_losses(engine.forward, None, examples), rel=1e-2)


def test_lengths_of_rows_are_part_of_a_start(tmp_path: Path) -> None:
    live = (engine := TrainEngine(tiny_base("llama"))).add(wanted({"r": 4, "use_dora": True}))
    given = published(live, engine, tmp_path)
    with pytest.raises(LoraConfigError, match="init_adapter: it was trained with DoRA, so set use_dora"):
        continued_adapter(engine.forward.modules, LoraConfig(r=4), given)
    longer = replace(given, magnitude={name: m * 2 for name, m in given.magnitude.items()})
    jobs = [started_from(start, {"r": 4, "use_dora": True}) for start in (given, longer)]
    assert jobs[0].digest != jobs[1].digest


def test_zeros_up_to_the_largest_rank_are_no_ranks(tmp_path: Path) -> None:
    """A and B of zero would never learn, so that a job may not count them as ranks of its own."""
    live = (engine := TrainEngine(tiny_base("llama"))).add(wanted({"r": 4, "rank_pattern": {"q_proj": 2}}))
    given = published(live, engine, tmp_path)
    with pytest.raises(LoraConfigError, match=r"its rank is 2 in model.layers.0.self_attn.q_proj, and this job's is 4"):
        continued_adapter(engine.forward.modules, LoraConfig(r=4), given)


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"r": 8}, "init_adapter: its rank is 4 in model.layers.0.self_attn.q_proj, and this job's is 8; set r and"),
        ({"r": 2}, "init_adapter: its rank is 4 in model.layers.0.self_attn.q_proj, and this job's is 2"),
        ({"rank_pattern": {"k_proj": 3}}, "init_adapter: its rank is 4 in model.layers.0.self_attn.k_proj, and this"),
        ({"target_modules": ["q_proj"]}, "init_adapter: it also adapts model.layers.0.self_attn.k_proj, so set target"),
        ({"target_modules": "all-linear"}, "init_adapter: it does not adapt model.layers.0.mlp.down_proj, so set"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: leave it out, since init_adapter says where A and B"),
    ],
)
def test_a_start_that_does_not_fit_is_one_sentence(lora: dict[str, Any], sentence: str) -> None:
    bank, options = AdaptableModules(tiny_model("llama")), {"r": 4, "target_modules": ["q_proj", "k_proj"]}
    given = init_adapter(bank, LoraConfig(**options), seed=0)
    with pytest.raises(LoraConfigError) as caught:
        continued_adapter(bank, LoraConfig(**options | lora), given)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(sentence)
