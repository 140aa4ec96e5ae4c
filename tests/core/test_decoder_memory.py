"""The decoder's memory, from runs without numbers: against what its tensors come to, and peaks of a GPU; what fits."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase, Qwen3Config

from lora_core.config import LoraConfig, TrainConfig
from lora_core.data.dataset import Example
from lora_core.models.attention import ATTENTION_NAME
from lora_core.models.base import BaseModel, placed
from lora_core.models.forward import ForwardPath, open_forward
from lora_core.models.llama.decoder import Checkpointing
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob
from lora_core.training.memory.dry_run import Meter
from lora_core.training.memory.predictor import CONTEXT, HOLES, Predictor, predictor
from tests.bench.peers import SHAPES
from tests.support.models import CPU, next_chunks

NEEDS_TRITON = pytest.mark.skipif(sys.platform != "linux", reason="Triton has no build for this system")
GIB = 2**30
H100 = int(79.1 * GIB)
"""What an H100 of 80 GB shows to CUDA."""

WAYS: tuple[Checkpointing, ...] = ("none", "selective", "full")
SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
TINY = LlamaConfig(**SIZES)
CONFIGS: dict[str, PretrainedConfig] = {"llama": TINY, "qwen3": Qwen3Config(**SIZES, head_dim=48)}
PLAIN = [LoraConfig(r=8), LoraConfig(r=5, target_modules=["k_proj", "v_proj"], rank_pattern={"v_proj": 20})]
DORA = [lora.model_copy(update={"use_dora": True}) for lora in PLAIN]


# --- what tensors come to --------------------------------------------------------------------------------------------


def tiny_base(precision: str = "bf16", config: PretrainedConfig = TINY) -> BaseModel:
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    model.to(torch.bfloat16).eval().requires_grad_(False)
    return placed(BaseModel(model, PreTrainedTokenizerBase(), "tiny", "0" * 64, precision, CPU), CPU)


def empty_product(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(*left.shape[:-1], right.shape[-1])


PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.mm.default: empty_product,
    torch.ops.aten.bmm.default: empty_product,
    torch.ops.aten.mm.out: lambda left, right, out: out,
    torch.ops.aten.addmm.out: lambda added, left, right, out, **_: out,
    torch.ops.aten.addmm_.default: lambda added, left, right, **_: added,
    torch.ops.aten.baddbmm.out: lambda added, left, right, out, **_: out,
    torch.ops.aten.baddbmm_.default: lambda added, left, right, **_: added,
    torch.ops.aten.baddbmm.default: lambda added, left, right, **_: empty_product(left, right),
}
"""Without numbers: what counts here is the memory that they return, and a CPU without units for bf16 takes minutes."""


class MeterWithoutProducts(Meter):
    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return super().__torch_dispatch__(PRODUCTS.get(operation, operation), types, args, kwargs)


class MicroBatch(NamedTuple):
    """Two jobs with documents of these lengths each."""

    checkpointing: Checkpointing
    lengths: list[int]
    precision: str = "bf16"
    kind: str = "llama"
    loras: Sequence[LoraConfig] = PLAIN


def measured(case: MicroBatch) -> int:
    """Bytes of a real one, at most."""
    base = tiny_base(case.precision, CONFIGS[case.kind])
    engine = TrainEngine(base, capacity=4096, checkpointing=case.checkpointing)
    examples = [Example([7] * length, [False] + [True] * (length - 1)) for length in case.lengths]
    for number, lora in enumerate(case.loras):
        train = TrainConfig(batch_size=len(case.lengths), max_seq_len=max(case.lengths))
        engine.add(EngineJob(str(number), lora, train, examples))
    with MeterWithoutProducts() as meter:
        engine.forward_backward(engine.ready(next_chunks(engine.live.values())))
    return meter.peak


@functools.cache
def predictor_of(kind: str, quantised: str | None) -> Predictor:
    """It remembers its dry runs, which take most of the time."""
    return predictor(CONFIGS[kind], torch.bfloat16, "llama", quantised=quantised)


def predicted(case: MicroBatch) -> int:
    """What is predicted of it."""
    of = predictor_of(case.kind, "nf4" if case.precision == "nf4" else None)
    kinds = [of.shapes.of(lora) for lora in case.loras]
    return of.activations.peak_bytes(kinds, 2 * sum(case.lengths), max(case.lengths), case.checkpointing)


@pytest.mark.parametrize("checkpointing", WAYS)
@pytest.mark.parametrize(
    ("count", "length", "precision", "kind", "loras"),
    [
        (8, 64, "bf16", "llama", PLAIN),
        (1, 512, "bf16", "llama", PLAIN),
        (2, 64, "nf4", "llama", PLAIN),
        (8, 64, "nf4", "llama", DORA),
        (1, 512, "bf16", "qwen3", PLAIN),
        (8, 64, "bf16", "qwen3", [DORA[0], PLAIN[1]]),
        (8, 64, "bf16", "llama", [PLAIN[0], DORA[1]]),
    ],
)
def test_a_run_without_numbers_counts_what_a_real_one_holds(
    checkpointing: Checkpointing,
    count: int,
    length: int,
    precision: str,
    kind: str,
    loras: Sequence[LoraConfig],
) -> None:
    case = MicroBatch(checkpointing, [length] * count, precision, kind, loras)
    assert predicted(case) == pytest.approx(measured(case), rel=0.01)


@pytest.mark.parametrize("checkpointing", WAYS)
def test_documents_of_any_lengths_take_no_more(checkpointing: Checkpointing) -> None:
    """On a CPU attention keeps its probabilities where documents are short, and computes them again where not."""
    for lengths in ([520, 512], [768, 100, 70, 300]):
        case = MicroBatch(checkpointing, lengths)
        assert predicted(case) >= measured(case)


@pytest.mark.parametrize("layers", [4, 8])
@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_quantised_weights_are_counted(precision: str, layers: int) -> None:
    """Of eight layers, those at both ends are dense in fp8."""
    config = LlamaConfig(**SIZES | {"num_hidden_layers": layers})
    assert predictor(config, torch.bfloat16, "llama", "cpu", precision).weights == tiny_base(precision, config).nbytes


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("lora", [PLAIN[0], DORA[0]])
def test_layers_that_are_alike_are_counted_from_a_few(device: str, lora: LoraConfig) -> None:
    """Exactly; and adapters that are not on all layers from all of them."""
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 5})
    of = predictor(config, torch.bfloat16, "llama", device)
    for few in (lora, lora.model_copy(update={"layers_to_transform": [0, 3]})):
        shape = of.shapes.of(few)
        for checkpointing in WAYS:
            run = shape, 64, 64, checkpointing
            assert of.activations.peaks(*run) == of.activations.dry_run(*run)


@NEEDS_TRITON
def test_threads_ask_for_devices_of_their_own_at_once() -> None:
    of = [predictor(TINY, torch.bfloat16, "llama", device) for device in ("cpu", "cuda")]

    def peaks(of: Predictor) -> tuple[int, int]:
        return of.activations.dry_run(of.shapes.of(PLAIN[0]), 64, 64, "none")

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(peaks, of * 4)) == list(map(peaks, of)) * 4


# --- against a GPU ---------------------------------------------------------------------------------------------------


@functools.cache
def llama_8b(precision: str | None = None) -> Predictor:
    return predictor(LlamaConfig(**SHAPES["8b"]), torch.bfloat16, "llama", "cuda", precision)


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("precision", "jobs", "checkpointing", "peak"),
    [
        (None, 1, "none", 39.58),
        (None, 1, "selective", 25.70),
        (None, 1, "full", 19.14),
        (None, 8, "none", 44.51),
        (None, 32, "none", 61.38),
        ("fp8", 1, "none", 39.59),
    ],
)
def test_peaks_of_an_h100_are_met(precision: str | None, jobs: int, checkpointing: Checkpointing, peak: float) -> None:
    """`torch.cuda.max_memory_allocated` in GiB, 8,192 tokens in documents of 256, r 16 on all linears."""
    told = llama_8b(precision).predict([LoraConfig()] * jobs, 8192, 256, checkpointing) - CONTEXT["cuda"]
    assert told / HOLES["cuda"] / GIB == pytest.approx(peak, abs=0.1)


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("jobs", "capacity", "checkpointing", "dora", "taken"),
    [
        (1, 8192, "none", False, 40.89),
        (1, 8192, "selective", False, 27.48),
        (1, 8192, "full", False, 20.61),
        (1, 2048, "none", False, 23.24),
        (8, 8192, "none", False, 46.08),
        (8, 4096, "selective", False, 27.25),
        (32, 8192, "none", False, 64.15),
        (32, 4096, "full", False, 41.05),
        (8, 8192, "none", True, 51.42),
        (1, 4096, "full", True, 20.04),
    ],
)
def test_what_an_h100_gave_is_met(
    jobs: int, capacity: int, checkpointing: Checkpointing, dora: bool, taken: float
) -> None:
    """GiB reserved by torch and taken beside it, documents of 256, as `tests/bench/memory_gpu.py` measured them."""
    told = llama_8b().predict([LoraConfig(use_dora=dora)] * jobs, capacity, 256, checkpointing)
    assert told / GIB == pytest.approx(taken, rel=0.05)


@NEEDS_TRITON
def test_64_jobs_on_an_8b_base_fit_on_one_gpu() -> None:
    of, loras = llama_8b(), [LoraConfig()] * 64
    plan = of.fit(H100 - CONTEXT["cuda"], loras, 1024, 1024)
    assert (plan.checkpointing, plan.exact_heap) == ("none", False)
    assert 4700 < plan.capacity < 5300
    assert plan.predicted_bytes <= H100 - CONTEXT["cuda"]
    assert of.predict(loras, plan.capacity + 1, 1024, "none") > H100 - CONTEXT["cuda"]


@NEEDS_TRITON
def test_memory_that_shrinks_leads_through_every_way() -> None:
    of, loras = llama_8b(), [LoraConfig()]
    plans = [of.fit(budget, loras, 1024, 4096) for budget in range(80 * GIB, 19 * GIB, -GIB // 2)]
    assert list(dict.fromkeys(plan.checkpointing for plan in plans)) == list(WAYS)
    assert plans[0].capacity == 8192
    needs = [of.predict(loras, 4096, 1024, checkpointing) for checkpointing in WAYS]
    assert needs == sorted(needs, reverse=True)


# --- which path ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "path"), [("bf16", "llama"), ("bf16", "hooks"), ("nf4", "llama")])
def test_an_engine_counts_by_its_path(precision: str, path: ForwardPath) -> None:
    base = tiny_base(precision)
    engine = TrainEngine(base, forward=open_forward(base, path), capacity=None, budget_bytes=GIB)
    assert engine.planner.predictor.activations.path == path


def test_an_engine_on_a_quantised_base_predicts_its_weights() -> None:
    engine = TrainEngine(tiny_base("nf4"), capacity=None, budget_bytes=GIB)
    assert engine.planner.budget == int(0.955 * GIB)  # which predictions for nf4 were too low by
    assert TrainEngine(tiny_base("bf16"), capacity=None, budget_bytes=GIB).planner.budget == GIB
    assert engine.planner.predictor.weights == predictor(TINY, torch.bfloat16, "llama", "cpu", "nf4").weights
