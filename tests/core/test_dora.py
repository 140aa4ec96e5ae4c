"""DoRA and adapters on the output head: PEFT's numbers, whoever else is in the batch, in every form they leave in."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_core.adapters import dora
from lora_core.adapters.dora import weight_of
from lora_core.adapters.init import LoraConfigError, init_adapter
from lora_core.adapters.peft_format import read_adapter
from lora_core.config import LoraConfig
from lora_core.models.base import BaseModel
from lora_core.models.hooks.bank import AdapterBank, Segment
from lora_core.models.merge import write_merged
from lora_core.models.probes import probe_losses
from lora_core.training import job as engine_job
from lora_core.training.engine import TrainEngine
from tests.support.models import (
    CONFIGS,
    VOCABULARY,
    adapter_in_double,
    decode_with_triton,
    decoder_base,
    documents,
    in_double,
    job,
    logits_of,
    micro_batches,
    next_chunks,
    outcome_of,
    relative,
    tiny_base,
    tiny_model,
)
from tests.support.peft_reference import moved
from tests.support.tiny_models import byte_tokenizer, write_adapter

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")
IDS = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
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
    measured: list[str] = []
    measure = engine.forward.modules.row_norms.of

    def counted(module: str, a: Tensor, b: Tensor) -> Tensor:
        measured.append(module)
        return measure(module, a, b)

    monkeypatch.setattr(engine.forward.modules.row_norms, "of", counted)
    for _ in range(3):
        engine.step()
    assert sorted(measured) == sorted([*live.adapter.a] * 3)


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


# --- what training leaves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [HEAD, DORA_HEAD])
def test_a_probe_leaves_no_gradient(lora: dict[str, Any]) -> None:
    engine = TrainEngine(tiny_base("llama"))
    live = moved(engine, job(lora=lora))
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
    torch.testing.assert_close(
        logits_of(base, IDS, bank, live.adapter), logits_of(base, IDS, bank, given), rtol=1e-12, atol=1e-12
    )
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


# --- in the decoder --------------------------------------------------------------------------------------------------

SOME = {"use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}


IN_TRITON = pytest.param(
    True, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="tests/core/test_decoder.py has the GPU's DoRA")
)


@pytest.mark.parametrize("in_triton", [False, IN_TRITON])
def test_many_steps_in_the_decoder_are_those_of_the_hooks(in_triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms follow every step, an evaluation before the first, a step that failed, and the return to the best."""
    # In Triton's interpreter rows take seconds.
    dtype, layers, steps, rows, held_out = (torch.float32, 1, 2, 2, 1) if in_triton else (torch.float64, 2, 8, 8, 4)
    if in_triton:
        pytest.importorskip("triton", reason="Triton has no build for this system")

    def train(base: BaseModel) -> dict[str, Tensor]:
        engine = TrainEngine(base)
        best = {"validation": documents(held_out, 9), "eval_steps": 2, "load_best_model_at_end": True}
        jobs = [
            job("best", examples=documents(rows, 1), lora=SOME, epochs=steps, batch_size=rows, **best),
            job("failed", examples=documents(rows, 2), lora={"use_dora": True, "r": 3}, batch_size=rows),
            job("plain", examples=documents(rows, 3), batch_size=rows),
        ]
        live = [engine.add(wanted) for wanted in (jobs[:2] if in_triton else jobs)]
        poisoned = False
        while not live[0].done:
            if live[0].progress.step == 1 and not poisoned:
                live[1].optimizer._grad[3], poisoned = math.nan, True
            engine.micro_batch()
        found = {one.job.name: one.optimizer.flat.detach().clone() for one in live}
        evaluations = [live[0].progress.before, live[0].progress.evaluation]
        return found | {"losses": torch.tensor([one.loss for one in evaluations if one is not None])}

    by_hooks = train(tiny_base("llama", dtype=dtype, num_hidden_layers=layers))
    if in_triton:
        decode_with_triton(monkeypatch)
    by_decoder = train(decoder_base("llama", dtype=dtype, num_hidden_layers=layers))
    for name, numbers in by_hooks.items():
        assert relative(by_decoder[name], numbers) < (1e-4 if in_triton else 1e-11), name


def test_the_decoder_measures_norms_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the jobs alone that have stepped."""
    base = decoder_base("llama")
    assert base.decoder is not None
    engine = TrainEngine(base, capacity=64)
    quick = engine.add(job("quick", examples=documents(8, 1), lora={"use_dora": True}, batch_size=2))
    slow = engine.add(job("slow", examples=documents(8, 2), lora=SOME, batch_size=8))
    measured: list[int] = []
    measure = base.decoder.row_norms.of

    def counted(module: str, a: Tensor, b: Tensor) -> Tensor:
        measured.append(a.data_ptr())
        return measure(module, a, b)

    monkeypatch.setattr(base.decoder.row_norms, "of", counted)
    while slow.progress.step < 2:
        engine.micro_batch()
    assert quick.progress.step > slow.progress.step
    for live in (quick, slow):
        count = sum(measured.count(weight.data_ptr()) for weight in live.adapter.a.values())
        times, left = divmod(count, len(live.adapter.a))
        assert left == 0 and times in (live.progress.step, live.progress.step + 1)  # of the next step, too, or not yet


# --- merged ----------------------------------------------------------------------------------------------------------


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
    write_adapter(adapter, bank, tmp_path)
    ours = logits_of(base, IDS, bank, adapter_in_double(read_adapter(tmp_path, bank)))
    write_merged(base, tmp_path, tmp_path / "merged")
    model = in_double(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval())
    torch.testing.assert_close(model(IDS).logits, ours, rtol=1e-12, atol=1e-12)
    assert float((ours - logits_of(base, IDS, bank, None)).abs().max()) > 0.1
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
