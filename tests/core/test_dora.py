"""DoRA and adapters on the output head: PEFT's numbers, whoever else is in the batch, in every form they leave in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lora_core.adapters import dora
from lora_core.adapters.adapter import Adapter
from lora_core.adapters.dora import weight_of
from lora_core.adapters.init import LoraConfigError, init_adapter
from lora_core.adapters.peft_format import adapter_files, read_adapter
from lora_core.config import LoraConfig
from lora_core.models.attention import PackedAttention
from lora_core.models.hooks.bank import AdapterBank, Segment
from lora_core.models.merge import write_merged
from lora_core.models.probes import probe_losses
from lora_core.training import job as engine_job
from lora_core.training.active_job import LiveJob
from lora_core.training.engine import TrainEngine
from tests.core.test_trainer import gradient, padded_loss, reference_training
from tests.support.models import (
    CONFIGS,
    VOCABULARY,
    InDouble,
    adapter_in_double,
    documents,
    in_double,
    job,
    micro_batches,
    next_chunks,
    outcome_of,
    relative,
    state,
    tiny_base,
    tiny_model,
)
from tests.support.tiny_models import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")
HEAD = {"target_modules": ["lm_head"]}
DORA_HEAD = {"use_dora": True, "target_modules": ["lm_head", "q_proj", "down_proj"]}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"use_dora": True}),
    "qwen2, which has biases": ("qwen2", {"use_dora": True, "use_rslora": True}),
    "gpt2, which keeps transposes": ("gpt2", {"use_dora": True}),
    "pissa": ("llama", {"use_dora": True, "init_lora_weights": "pissa"}),
    "head": ("llama", HEAD),
    "head and more": ("llama", {"target_modules": ["lm_head", "v_proj"]}),
    "capped head": ("gemma2-untied", {"target_modules": ["lm_head", "v_proj"]}),
    "head with dora": ("llama", DORA_HEAD),
}


def move(live: LiveJob) -> None:
    """B and m away from where they start; the rest of the vector too, so that every part has a gradient."""
    stream = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for b in live.adapter.b.values():
            b.copy_(torch.randn(b.shape, generator=stream) * 0.1)
        for m in live.adapter.magnitude.values():
            m.mul_(1 + 0.2 * torch.randn(m.shape, generator=stream))
    live.adapter.norm.clear()


def pefts(live: LiveJob, kind: str) -> tuple[PreTrainedModel, list[Tensor]]:
    """PEFT's model in fp64 with the weights of `live`, and its trained weights in the order of the flat vector."""
    fields = {"r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "init_lora_weights"}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **live.job.lora.model_dump(include=fields))
    model = tiny_model(kind, attention="eager")
    with InDouble():  # singular vectors too
        model = in_double(peft.get_peft_model(model, config))
    layers = [model.base_model.model.get_submodule(name) for name in live.adapter.a]
    weights = [layer.lora_A["default"].weight for layer in layers]
    weights += [layer.lora_B["default"].weight for layer in layers]
    if live.job.lora.use_dora:
        weights += [layer.lora_magnitude_vector["default"].weight for layer in layers]
    with torch.no_grad():
        for theirs, ours in zip(weights, live.adapter.trained, strict=True):
            theirs.copy_(ours)
    return model, weights


# --- the same as PEFT ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_gradients_equal_pefts(name: str) -> None:
    kind, lora = ADAPTERS[name]
    engine = TrainEngine(tiny_base(kind, dtype=torch.float64))
    live = engine.add(job(lora=lora, batch_size=6))
    move(live)
    model, weights = pefts(live, kind)
    engine.forward_backward(engine.ready(next_chunks([live])))
    examples = [live.job.examples[index] for index in live.job.examples_of(0)]
    tokens = sum(sum(example.labels_mask) for example in examples)
    (padded_loss(model, examples) * tokens).backward()
    for ours, theirs in zip(live.adapter.trained, weights, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert bool(theirs.grad.any())
        assert relative(ours.grad, theirs.grad) < 1e-10


@pytest.mark.parametrize("name", ADAPTERS)
def test_twenty_steps_equal_peft(name: str) -> None:
    """From PEFT's own start of m; with weight decay, which PEFT's users have on m too."""
    kind, lora = ADAPTERS[name]
    engine = TrainEngine(tiny_base(kind, dtype=torch.float64))
    live = engine.add(job(lora=lora, learning_rate=2e-3, weight_decay=0.1, warmup_ratio=0.1))
    model, weights = pefts(live, kind)
    expected = reference_training(model, weights, live.job, 20)
    losses = [outcome_of(engine.step()["job"]).loss for _ in range(20)]
    assert max(abs(ours - theirs) for ours, theirs in zip(losses, expected, strict=True)) < 1e-9
    assert min(losses) < 0.97 * losses[0]
    for ours, theirs in zip(live.adapter.trained, weights, strict=True):
        assert relative(ours.detach(), theirs.detach()) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_m_starts_as_pefts_and_changes_nothing(kind: str) -> None:
    base = tiny_base(kind, dtype=torch.float64)
    bank = AdapterBank(base.model)
    adapter = init_adapter(bank, LoraConfig(r=4, use_dora=True), seed=0)
    config = peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model(kind, dtype=torch.float64), config).base_model.model
    for name, m in adapter.magnitude.items():
        theirs = model.get_submodule(name).lora_magnitude_vector["default"].weight
        torch.testing.assert_close(m, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits(base, bank, adapter), logits(base, bank, None), rtol=1e-12, atol=1e-12)


def test_m_of_a_fresh_adapter_takes_no_product_with_a(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor the copies to the device that one needs: each waits for a step of those that train there."""
    bank = AdapterBank(tiny_base("llama").model)
    monkeypatch.setattr(bank.row_norms, "of", None)
    assert init_adapter(bank, LoraConfig(r=4, use_dora=True), seed=0).magnitude


# --- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_norms_are_those_of_the_sum(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "SLICE_ROWS", 50)  # of 64, 96, 172 and 192 rows
    bank = AdapterBank(tiny_base(kind, dtype=dtype).model)
    norms = bank.row_norms
    rounding = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # of sums of up to 172 squares
    for seed, (name, module) in enumerate(bank.modules.items()):
        stream = torch.Generator().manual_seed(seed)
        weight = (module.weight.t() if kind == "gpt2" else module.weight).double()
        a = torch.randn(5, weight.shape[1], generator=stream).to(torch.promote_types(dtype, torch.float32))
        b = torch.randn(weight.shape[0], 5, generator=stream).to(a.dtype)
        for scale in (0.5, 0.0):
            found, expected = norms.of(name, a, scale * b), (weight + scale * b.double() @ a.double()).norm(dim=1)
            assert found.dtype == a.dtype
            torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=0)


def test_row_of_zeros_stops_nobody() -> None:
    base = tiny_base("llama")
    layer: Any = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.weight[3] = 0
    engine = TrainEngine(base)
    engine.add(job(lora={"use_dora": True}))
    for _ in range(3):
        assert outcome_of(engine.step()["job"]).grad_norm < 100


def test_norms_are_taken_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 16)
    engine = TrainEngine(tiny_base("llama"), capacity=32)
    live = engine.add(job(lora={"use_dora": True}, batch_size=8))
    assert len(micro_batches([next_chunks([live])], 32)) > 2
    taken: list[str] = []
    of = engine.forward.modules.row_norms.of

    def counted(module: str, a: Tensor, b: Tensor) -> Tensor:
        taken.append(module)
        return of(module, a, b)

    monkeypatch.setattr(engine.forward.modules.row_norms, "of", counted)
    for _ in range(3):
        engine.step()
    assert sorted(taken) == sorted([*live.adapter.a] * 3)


@torch.no_grad()
def test_small_dora_scales_survive_a_bf16_base() -> None:
    """m 2 % above the norm: in bf16 m / norm would be 1.0234. What is rounded is not even over a bf16 number's 128
    steps, so that 3e-4 of it is left in the mean.
    """
    base = tiny_base("llama", dtype=torch.bfloat16)
    bank = AdapterBank(base.model)
    adapter = init_adapter(bank, LoraConfig(r=4, use_dora=True, target_modules=["down_proj"]), seed=0)
    x = torch.randn(1, 2000, 172, generator=torch.Generator().manual_seed(0)).bfloat16()
    module = bank.linears["model.layers.0.mlp.down_proj"]
    plain = module(x).double()
    adapter.magnitude["model.layers.0.mlp.down_proj"].mul_(1.02)
    with bank.routed([Segment(adapter, 2000)]):
        scaled = module(x).double()
    assert float(scaled.norm() / plain.norm()) == pytest.approx(1.02, abs=1e-3)


# --- neighbours, chunks, restarts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [DORA_HEAD, {**HEAD, "lora_dropout": 0.3}])
def test_one_micro_batch_or_many_same_gradient(lora: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the head too: a row's dropout is its own, wherever its chunk and its slice of logits begin."""
    wanted, base = job(batch_size=8, lora=lora), tiny_base("llama", dtype=torch.float64)
    whole = gradient(base, wanted, capacity=4096)
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 32)
    monkeypatch.setattr("lora_core.models.hooks.loss.SLICE_ROWS", 7)
    assert relative(gradient(base, wanted, capacity=64), whole) < 1e-12
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 1)
    assert relative(gradient(base, wanted, capacity=4096), whole) < 1e-12


def test_bf16_follows_fp32() -> None:
    def losses(dtype: torch.dtype) -> list[float]:
        engine = TrainEngine(tiny_base("llama", dtype=dtype))
        engine.add(job(lora=DORA_HEAD | {"lora_alpha": 4}, learning_rate=2e-3))
        return [outcome_of(engine.step()["job"]).loss for _ in range(10)]

    exact = losses(torch.float32)
    assert losses(torch.bfloat16) == pytest.approx(exact, rel=0.02)
    assert exact[-1] < 0.99 * exact[0]


def test_restart_continues_bit_for_bit() -> None:
    wanted = job(lora=DORA_HEAD)
    whole = (engine := TrainEngine(tiny_base("llama"))).add(wanted)
    for _ in range(2):
        engine.step()
    checkpoint = whole.snapshot().dump()
    again = (other := TrainEngine(tiny_base("llama"))).add(wanted, checkpoint)
    for _ in range(3):
        assert engine.step() == other.step()
    assert torch.equal(state(whole), state(again))


@pytest.mark.parametrize("lora", [HEAD, DORA_HEAD])
def test_a_probe_leaves_no_gradient(lora: dict[str, Any]) -> None:
    engine = TrainEngine(tiny_base("llama"))
    live = engine.add(job(lora=lora))
    move(live)
    probe_losses(engine.forward, live.bound, documents(2, 1))
    assert not live.optimizer._message.any()


def test_tail_of_the_vector_is_all_m_in_order() -> None:
    """A, then B and m: two slices, as LoRA+ has two rates (m has B's)."""
    live = TrainEngine(tiny_base("llama")).add(job(lora={"use_dora": True}))
    sizes = [weight.numel() + -weight.numel() % 8 for weight in live.adapter.trained]
    starts = [weight.storage_offset() for weight in live.adapter.trained]
    assert starts == [sum(sizes[:i]) for i in range(len(sizes))]
    assert live.optimizer.parameters == sum(weight.numel() for weight in live.adapter.trained)
    assert list(live.adapter.magnitude) == list(live.adapter.b) == list(live.adapter.a)


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False])
def test_a_start_from_another_adapter_computes_the_same(before: bool) -> None:
    """From a DoRA adapter with its m, from a plain one with the norms."""
    base = tiny_base("llama", dtype=torch.float64)
    bank = AdapterBank(base.model)
    given = adapter_in_double(init_adapter(bank, LoraConfig(r=4, lora_alpha=9, use_dora=before), seed=0))
    for weight in (*given.b.values(), *given.magnitude.values()):
        weight.add_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    wanted = replace(job(lora={"use_dora": True}), init_adapter=given)
    live = TrainEngine(base).add(wanted)
    torch.testing.assert_close(logits(base, bank, live.adapter), logits(base, bank, given), rtol=1e-12, atol=1e-12)
    assert live.adapter.magnitude.keys() == live.adapter.a.keys()
    if before:
        with pytest.raises(LoraConfigError, match="init_adapter: it was trained with DoRA, so set use_dora"):
            TrainEngine(base).add(replace(wanted, lora=LoraConfig(r=4)))
        other = replace(given, magnitude={name: 1.1 * m for name, m in given.magnitude.items()})
        assert replace(wanted, init_adapter=other).digest != wanted.digest


def test_peft_files_with_a_head_can_be_checked_without_the_bases_weights(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head"], use_dora=True)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        peft.get_peft_model(tiny_model("llama"), config).save_pretrained(str(tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    assert list(read_adapter(tmp_path, AdapterBank(model)).a) == ["lm_head"]


def test_dropout_with_dora_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="needs lora_dropout to be 0: with dropout PEFT"):
        LoraConfig(use_dora=True, lora_dropout=0.1)


# --- merged ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(base: Any, bank: AdapterBank, adapter: Adapter | None) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
    with bank.routed([Segment(adapter, 24)]):
        return base.head(base.hidden(ids, torch.arange(24)[None], PackedAttention([24])))


@torch.no_grad()
@pytest.mark.parametrize("case", [*ADAPTERS, "plain", "tied"])
def test_merged_directory_computes_the_same(case: str, tmp_path: Path) -> None:
    kind, lora = (ADAPTERS | {"plain": ("qwen2", {}), "tied": ("gemma", {"use_dora": True})})[case]
    base = replace(tiny_base(kind, dtype=torch.float64), tokenizer=byte_tokenizer())
    bank = AdapterBank(base.model)
    name = next(iter(bank.modules))
    weight_of(bank.modules[name])[5] = 0
    adapter = init_adapter(bank, LoraConfig(**{"r": 4, "lora_alpha": 6} | lora), seed=1)
    for weight in (*adapter.b.values(), *adapter.magnitude.values()):
        weight.add_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.2)
    if name in adapter.b:
        adapter.b[name][5] = 0  # a row of zeros, whose norm is none to divide by
    for file, content in adapter_files(adapter, bank, "base").items():
        (tmp_path / file).write_bytes(content)
    ours = logits(base, bank, adapter_in_double(read_adapter(tmp_path, bank)))
    write_merged(base, tmp_path, tmp_path / "merged")
    model = in_double(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval())
    ids = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, ours, rtol=1e-12, atol=1e-12)
    assert float((ours - logits(base, bank, None)).abs().max()) > 0.1
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
