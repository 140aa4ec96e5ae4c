"""What one adapter may choose for itself, against PEFT: ranks and alphas by module, layers, PiSSA, LoRA+."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.init import LoraConfigError, adapted_modules, continued_adapter, init_adapter
from lora_core.adapters.peft_format import adapter_files, read_adapter
from lora_core.adapters.targets import AdaptableModules
from lora_core.config import LoraConfig, TrainConfig
from lora_core.models.hooks.bank import AdapterBank, Segment
from lora_core.models.probes import probe_losses
from lora_core.training.active_job import LiveJob
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob
from tests.core.test_trainer import exact_clip, padded_loss
from tests.support.models import (
    InDouble,
    documents,
    in_double,
    micro_batches,
    next_chunks,
    random_b,
    relative,
    tiny_base,
    tiny_model,
    train_until,
)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")
DOUBLE = torch.float64
PATTERNS: dict[str, dict[str, Any]] = {
    "llama": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {r"layers\.0\..*q_proj": 2, "q_proj": 9, "mlp.down_proj": 3},
        "alpha_pattern": {"v_proj": 1, r"model\.layers\.1\..*": 20},
    },
    "gpt2": {"r": 4, "lora_alpha": 6, "rank_pattern": {"attn.c_proj": 2, "c_proj": 5}, "alpha_pattern": {"c_attn": 3}},
}


def wanted(lora: dict[str, Any], **train: Any) -> EngineJob:
    options = {"epochs": 20, "batch_size": 4, "learning_rate": 2e-3, "warmup_ratio": 0.0, "lr_scheduler": "constant"}
    return EngineJob("job", LoraConfig(**lora), TrainConfig(**options | train), documents(10, seed=0))


def peft_model(kind: str, lora: dict[str, Any]) -> Any:
    """In fp64."""
    config = peft.LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | lora)
    model = tiny_model(kind, attention="eager")
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


def copy_weights(model: Any, live: LiveJob) -> None:
    with torch.no_grad():
        for name, layer in layers_of(model, live).items():
            layer.lora_A["default"].weight.copy_(live.adapter.a[name])
            layer.lora_B["default"].weight.copy_(live.adapter.b[name])


def gradients_of_peft(model: Any, live: LiveJob) -> dict[str, Tensor]:
    examples = [live.job.examples[index] for index in live.job.examples_of(0)]
    padded_loss(model, examples).backward()
    return {
        f"{name}.{part}": getattr(layer, f"lora_{part}")["default"].weight.grad
        for name, layer in layers_of(model, live).items()
        for part in "AB"
    }


def gradients_of_ours(engine: TrainEngine, live: LiveJob) -> dict[str, Tensor]:
    for chunks in micro_batches([next_chunks([live])], 2048):
        engine.forward_backward(engine.ready(chunks))
    tokens = live.optimizer._message[-1]
    pairs = ((live.adapter.a, "A"), (live.adapter.b, "B"))
    return {
        f"{name}.{part}": weight.grad / tokens
        for weights, part in pairs
        for name, weight in weights.items()
        if weight.grad is not None
    }


def outcomes(engine: TrainEngine, steps: int) -> list[float]:
    done = engine.live["job"].progress.step
    return [outcome.loss for outcome in train_until(engine, "job", done + steps)]


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_gradients_with_patterns_equal_pefts(kind: str, use_rslora: bool) -> None:
    lora = PATTERNS[kind] | {"use_rslora": use_rslora}
    live = (engine := TrainEngine(tiny_base(kind, dtype=DOUBLE))).add(wanted(lora))
    random_b(live)
    model = peft_model(kind, lora)
    copy_weights(model, live)
    theirs, ours = gradients_of_peft(model, live), gradients_of_ours(engine, live)
    assert theirs.keys() == ours.keys()
    assert len({weight.shape[0] for weight in live.adapter.a.values()}) > 2
    assert len(set(live.adapter.scale.values())) > 2
    for name in theirs:
        assert relative(ours[name], theirs[name]) < 1e-12, name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_are_those_that_peft_chooses(kind: str) -> None:
    names = ["q_proj", "down_proj"] if kind == "llama" else ["c_attn", "mlp.c_proj"]
    lora = {"target_modules": names, "layers_to_transform": [1]}
    live = TrainEngine(tiny_base(kind)).add(wanted(lora))
    assert len(layers_of(peft_model(kind, lora), live)) == 2
    everything = adapted_modules(AdaptableModules(tiny_model(kind)), LoraConfig(layers_to_transform=[1]))
    assert {name.split(".")[2] for name in everything} == {"1"}


def test_gaussian_start_is_normal_with_deviation_one_by_its_rank() -> None:
    lora = LoraConfig(r=32, rank_pattern={"q_proj": 64}, init_lora_weights="gaussian")
    start = init_adapter(AdaptableModules(tiny_model("llama")), lora, seed=0)
    for name, a in start.a.items():
        assert float(a.std()) == pytest.approx(1 / (64 if "q_proj" in name else 32), rel=0.1)
        assert float(a.abs().max()) > 2.5 * float(a.std())  # no uniform
        assert not start.b[name].any()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pissa_starts_and_trains_as_pefts(kind: str) -> None:
    """The first gradients, and ten steps; a singular vector's sign is free, so products are compared."""
    lora = PATTERNS[kind] | {"init_lora_weights": "pissa"}
    live = (engine := TrainEngine(tiny_base(kind, dtype=DOUBLE))).add(wanted(lora))
    model = peft_model(kind, lora)
    signs: dict[str, Tensor] = {}
    for name, layer in layers_of(model, live).items():
        theirs, ours = layer.lora_A["default"].weight.detach(), live.adapter.a[name].detach()
        signs[name] = (theirs * ours).sum(1).sign()
        torch.testing.assert_close(ours * signs[name][:, None], theirs, rtol=1e-9, atol=1e-9)
    theirs, ours = gradients_of_peft(model, live), gradients_of_ours(engine, live)
    for name, sign in signs.items():
        assert relative(ours[f"{name}.A"] * sign[:, None], theirs[f"{name}.A"]) < 1e-9, name
        assert relative(ours[f"{name}.B"] * sign, theirs[f"{name}.B"]) < 1e-9, name
    engine.live.clear()
    engine.add(live.job)
    expected = reference_losses(model, live.job, torch.optim.AdamW(trained(model), lr=2e-3, weight_decay=0.0), 10)
    losses = outcomes(engine, 10)
    assert losses == pytest.approx(expected, rel=1e-9)
    plain = (other := TrainEngine(tiny_base(kind))).add(wanted(PATTERNS[kind]))
    assert plain.adapter.residual is None
    assert abs(outcomes(other, 10)[-1] - losses[-1]) > 1e-2


def trained(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def reference_losses(model: Any, job: EngineJob, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = padded_loss(model, [job.examples[index] for index in job.examples_of(step)])
        loss.backward()
        if job.train.max_grad_norm is not None:
            exact_clip(trained(model), job.train.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_loraplus_equals_pefts_optimizer() -> None:
    lora = PATTERNS["llama"]
    live = (engine := TrainEngine(tiny_base("llama", dtype=DOUBLE))).add(
        wanted(lora, loraplus_lr_ratio=8.0, weight_decay=0.1, max_grad_norm=None, learning_rate=5e-4)
    )
    model = peft_model("llama", lora)
    copy_weights(model, live)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=5e-4, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    expected = reference_losses(model, live.job, optimizer, 10)
    assert outcomes(engine, 10) == pytest.approx(expected, rel=1e-9)
    for name, layer in layers_of(model, live).items():
        assert relative(live.adapter.b[name].detach(), layer.lora_B["default"].weight.detach()) < 1e-9


def test_no_clipping_leaves_the_gradient_as_it_is() -> None:
    def first_moment(limit: float | None) -> Tensor:
        live = (engine := TrainEngine(tiny_base("llama"))).add(wanted({"r": 4}, max_grad_norm=limit))
        outcomes(engine, 1)
        return live.optimizer.moments[0]

    assert torch.equal(first_moment(None), first_moment(1e9))
    assert not torch.equal(first_moment(None), first_moment(1e-3))


def test_pissa_resumes_bit_equal_where_other_singular_vectors_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    job = wanted({"r": 4, "init_lora_weights": "pissa"}, epochs=2)
    live = (engine := TrainEngine(tiny_base("llama"))).add(job)
    outcomes(engine, 2)
    blob = live.snapshot().dump()
    losses = outcomes(engine, 3)
    svd = torch.linalg.svd

    def rounded_elsewhere(*args: Any, **options: Any) -> Any:
        return tuple(part * (1 + 1e-6) for part in svd(*args, **options))

    monkeypatch.setattr(torch.linalg, "svd", rounded_elsewhere)
    resumed = (other := TrainEngine(tiny_base("llama"))).add(job, blob)
    assert outcomes(other, 3) == losses
    assert torch.equal(resumed.optimizer.flat, live.optimizer.flat)


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


def test_pissa_on_bf16_is_the_base_at_the_start_and_follows_fp32() -> None:
    def losses(dtype: torch.dtype) -> list[float]:
        engine = TrainEngine(tiny_base("llama", dtype=dtype))
        engine.add(wanted({"r": 4, "init_lora_weights": "pissa"}))
        return outcomes(engine, 10)

    exact, rounded = losses(torch.float32), losses(torch.bfloat16)
    assert rounded == pytest.approx(exact, rel=0.02)


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"rank_pattern": {"q_porj": 8}}, "rank_pattern: 'q_porj' matches no adapted module; choose from down_proj,"),
        ({"rank_pattern": {"proj": 8}}, "rank_pattern: 'proj' matches no adapted module"),  # no part of a name
        ({"rank_pattern": {"q_proj.*x": 8}}, "rank_pattern: 'q_proj.*x' matches no adapted module"),
        ({"alpha_pattern": {"lm_head": 8}}, "alpha_pattern: 'lm_head' matches no adapted module"),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 8}},
            "rank_pattern: 'k_proj' matches no adapted module; choose from q_proj",
        ),
        (
            {"rank_pattern": {".*_proj": 4, "q_proj": 8}},
            "rank_pattern: 'q_proj' never counts, as earlier keys match all its modules; put it first",
        ),
        (
            {"layers_to_transform": [0, 2, 7]},
            "layers_to_transform: no adapted module lies in layer 2, 7; the layers are 0, 1",
        ),
        (
            {"target_modules": ["q_proj"], "r": 65, "layers_to_transform": [1], "init_lora_weights": "pissa"},
            "init_lora_weights: model.layers.1.self_attn.q_proj has 64 singular vectors, and pissa was asked to train"
            " 65; lower r or rank_pattern",
        ),
    ],
)
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
    for name, content in adapter_files(live.adapter, engine.forward.modules, "tiny").items():
        (folder / name).write_bytes(content)
    return read_adapter(folder, engine.forward.modules)


def started_from(given: Adapter, lora: dict[str, Any], **train: Any) -> EngineJob:
    return replace(wanted(lora, **train), init_adapter=given)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_job_goes_on_from_a_published_adapter_with_another_scale(use_dora: bool, tmp_path: Path) -> None:
    """Its first loss is the last one's, and its A, B and m are the trained ones, up to what the scales differ by."""
    plain = PATTERNS["llama"] | {"use_dora": use_dora}
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


def test_where_a_job_starts_counts_in_its_checkpoints(tmp_path: Path) -> None:
    first = (engine := TrainEngine(tiny_base("llama"))).add(wanted({"r": 4}))
    outcomes(engine, 3)
    given = published(first, engine, tmp_path)
    engine.live.clear()
    live = engine.add(started_from(given, {"r": 4}))
    outcomes(engine, 4)
    blob = live.snapshot().dump()
    changed = replace(given, b={name: b * 1.5 for name, b in given.b.items()})
    for job in (wanted({"r": 4}), started_from(changed, {"r": 4})):
        with pytest.raises(ValueError, match="the checkpoint is not one of job"):
            TrainEngine(tiny_base("llama")).add(job, blob)
    resumed = TrainEngine(tiny_base("llama")).add(started_from(given, {"r": 4}), blob)
    assert torch.equal(resumed.optimizer.flat, live.optimizer.flat)


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
