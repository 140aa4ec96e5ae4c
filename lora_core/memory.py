"""How much memory training will take, before the base is loaded; and what fits into what there is.

    predicted = context + weights + vectors of every adapter + the peak of one micro-batch

The micro-batch is run, forward and backward, on the meta device, where tensors have shapes and no numbers: a meter
counts the bytes of every storage from its first tensor to its last. Two lengths are run, and the line through them is
what a token costs. So whatever a family, an option or checkpointing changes is counted here rather than known.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_core.adapter_bank import Adapter, AdapterBank, Run
from lora_core.adapter_init import adapted_modules
from lora_core.attention import ATTENTION_NAME, SHORT_DOCUMENT, Attend, AttentionSpec, plain_attention
from lora_core.base_model import BaseModel
from lora_core.checkpointing import Checkpointing, recomputed_layers
from lora_core.config import LoraConfig, TrainConfig
from lora_core.dataset import Example
from lora_core.loss import SLICE_ROWS, batch_losses
from lora_core.optim import FlatAdamW
from lora_core.packing import Chunk, pack

META = torch.device("meta")
LARGEST_CAPACITY = 2048
"""Tokens of a micro-batch beyond which nothing is won: products are as fast as they get."""

FIRST_USE = 40_000_000
"""What torch's libraries take when they first multiply: scratch memory, threads."""

EXACT_HEAP_BYTES = 2**20
_M_MMAP_THRESHOLD = -3  # malloc.h


class DoesNotFitError(ValueError):
    """Training that needs more memory than there is; the sentence says what to change."""


class Activations(Protocol):
    """What one micro-batch takes beside weights and adapters. Each way through the base is one: the hooks here."""

    def peak_bytes(self, loras: Sequence[LoraConfig], tokens: int, longest: int, checkpointing: Checkpointing) -> int:
        """At most, while `tokens` of any of these adapters, in documents up to `longest`, go forward and backward."""
        ...


@dataclass(frozen=True)
class Plan:
    """Tokens of a micro-batch and whether layers are computed twice, and what training takes with them.

    `exact_heap`: it only fits where freed memory goes back at once (see `return_freed_memory`).
    """

    capacity: int
    checkpointing: Checkpointing
    predicted_bytes: int
    exact_heap: bool


@dataclass(frozen=True)
class Predictor:
    """Bytes of training any adapters on one base: `model` is the base on the meta device.

    `longest` is everywhere the most tokens of one document.
    """

    model: PreTrainedModel
    activations: Activations
    _vectors: dict[str, int] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    def predict(self, loras: Sequence[LoraConfig], capacity: int, longest: int, checkpointing: Checkpointing) -> int:
        """What training adds at its peak to what the process held before the base was loaded."""
        vectors = sum(self._vector_bytes(lora) for lora in loras)
        peak = self.activations.peak_bytes(loras, capacity, longest, checkpointing)
        return FIRST_USE + self.weights + vectors + peak

    def _vector_bytes(self, lora: LoraConfig) -> int:
        key = lora.model_dump_json()
        if key not in self._vectors:
            self._vectors[key] = vector_bytes(self.model, lora)
        return self._vectors[key]

    def fit(self, budget_bytes: int, loras: Sequence[LoraConfig], longest: int, smallest: int) -> Plan:
        """The largest capacity from `smallest` on that fits, without checkpointing if that goes.

        Raises:
            DoesNotFitError: `smallest` tokens do not fit even with checkpointing.
        """
        largest = max(smallest, LARGEST_CAPACITY)
        ways: tuple[Checkpointing, ...] = ("none", "full")
        for checkpointing in ways:
            least = self.predict(loras, smallest, longest, checkpointing)
            if least > budget_bytes:
                continue
            most, capacity = self.predict(loras, largest, longest, checkpointing), largest
            if most > budget_bytes:
                share = (budget_bytes - least) / (most - least)
                capacity = smallest + int(share * (largest - smallest))
            predicted = self.predict(loras, capacity, longest, checkpointing)
            heap = self.activations.peak_bytes(loras, capacity, longest, "none")  # holes came to half of it
            return Plan(capacity, checkpointing, predicted, predicted + heap > budget_bytes)
        raise DoesNotFitError(
            f"training needs {_gb(least)} of memory even with micro-batches of {smallest:,} tokens and activation"
            f" checkpointing ({_gb(self.weights)} of it for the base), but {_gb(budget_bytes)} are there: lower"
            f" max_seq_len or r, train fewer adapters at once (these are {len(loras)}), or use a smaller base or a"
            " lower precision"
        )


@dataclass
class HookActivations:
    """Of transformers' own modules with the bank's hooks, on `device`."""

    model: PreTrainedModel
    device: str
    _lines: dict[Any, tuple[float, float]] = field(default_factory=dict)

    def peak_bytes(self, loras: Sequence[LoraConfig], tokens: int, longest: int, checkpointing: Checkpointing) -> int:
        """Its two dry runs are remembered for adapters that come to the same."""
        bank = AdapterBank(self.model)
        try:
            widest, runs = _widest(bank, loras), min(len(loras), 2)
            document = max(longest, SLICE_ROWS)
            ranks = tuple((module, len(a)) for module, a in widest.a.items())
            kinds = widest.dropout > 0, bool(widest.magnitude), widest.residual is not None
            key = checkpointing, runs, longest, kinds, ranks
            if key not in self._lines:
                attend = _MetaAttention(longest, self.device)
                one, two = (
                    self._dry_run(bank, widest, runs, length, attend, checkpointing)
                    for length in (document, 2 * document)
                )
                self._lines[key] = 2 * one - two, (two - one) / document
        finally:
            bank.close()
        constant, slope = self._lines[key]
        return int(constant + slope * tokens) + self._scratch()

    def _scratch(self) -> int:
        """oneDNN lays a weight out anew for a bf16 product, outside of any tensor, once forward and once backward; the
        head's is the largest.
        """
        weight = self.model.get_output_embeddings().weight
        return 2 * weight.nbytes if self.device == "cpu" and weight.dtype == torch.bfloat16 else 0

    def _dry_run(
        self,
        bank: AdapterBank,
        adapter: Adapter,
        runs: int,
        tokens: int,
        attend: Attend,
        checkpointing: Checkpointing,
    ) -> int:
        base = BaseModel(self.model, PreTrainedTokenizerBase(), "", "", "", META)
        example = Example([0] * (tokens // runs), [False] + [True] * (tokens // runs - 1))
        batch = pack([Chunk("", ((0, example),))] * runs, META)
        routed = [Run(adapter, chunk.rows, chunk.row_tokens) for chunk in batch.chunks]
        known = [*self.model.parameters(), *self.model.buffers(), *adapter.trained, *_frozen(adapter)]
        meter = _Meter([*known, *(tensor.grad for tensor in adapter.trained if tensor.grad is not None)])
        layers = recomputed_layers(self.model, bank) if checkpointing == "full" else nullcontext()
        with meter:
            with layers:
                losses = batch_losses(base, bank, routed, batch, attend)
            losses.sum().backward()
        return meter.peak


def predictor(config: PretrainedConfig, dtype: torch.dtype, device: str = "cpu") -> Predictor:
    """For a base of this config that computes in `dtype`; `device` is a torch device's type."""
    with META:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=ATTENTION_NAME, dtype=dtype
        )
    model.requires_grad_(False)
    model.eval()
    return Predictor(model, HookActivations(model, device))


def vector_bytes(model: PreTrainedModel, lora: LoraConfig) -> int:
    """Of one adapter: its master weights, their gradient, two moments, the copy that products use."""
    bank = AdapterBank(model)
    try:
        adapter = _widest(bank, [lora])
    finally:
        bank.close()
    meter = _Meter([*adapter.trained, *_frozen(adapter)])
    with meter:
        FlatAdamW(adapter, TrainConfig(), META, model.dtype)
    return meter.peak


def _widest(bank: AdapterBank, loras: Sequence[LoraConfig]) -> Adapter:
    """An adapter without numbers that has every module of these, with the highest rank, dropout, DoRA and residual."""
    shapes = bank.shapes(list(bank.modules))
    ranks: dict[str, int] = {}
    for lora in loras:
        for name in adapted_modules(bank, lora):
            ranks[name] = max(lora.rank_of(name), ranks.get(name, 0))
    modules = [name for name in bank.modules if name in ranks]
    dropout = max(lora.lora_dropout for lora in loras)
    adapter = Adapter(
        dict.fromkeys(modules, 1.0),
        {name: _trained((ranks[name], shapes[name][0])) for name in modules},
        {name: _trained((shapes[name][1], ranks[name])) for name in modules},
        dropout,
    )
    if any(lora.init_lora_weights == "pissa" for lora in loras):
        a, b = ({name: weight.detach().clone() for name, weight in of.items()} for of in (adapter.a, adapter.b))
        adapter.residual = Adapter(adapter.scale, a, b)
    if any(lora.use_dora for lora in loras):
        adapter.magnitude = {name: _trained((shapes[name][1],)) for name in modules}
    return adapter


def _trained(shape: tuple[int, ...]) -> Tensor:
    weight = torch.empty(shape, device=META, requires_grad=True)
    weight.grad = torch.empty(shape, device=META)
    return weight


def _frozen(adapter: Adapter) -> list[Tensor]:
    return [] if adapter.residual is None else [*adapter.residual.a.values(), *adapter.residual.b.values()]


class _Meter(TorchDispatchMode):
    """Bytes of the storages that come to be within it: `live` now, `peak` at most. `known` are there already."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        return result

    def _forget(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.live -= nbytes


class _MetaAttention:
    """Takes the memory of `PackedAttention` on `device`: for meta tensors torch would choose other kernels."""

    def __init__(self, document: int, device: str) -> None:
        self._document, self._device = document, device

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        plain = self._device == "cpu" and q.dtype == torch.bfloat16
        if spec.softcap is None and not (plain and q.requires_grad):
            fused: Tensor = _FusedAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
            return fused
        document = self._document if spec.softcap is not None else min(self._document, SHORT_DOCUMENT)
        parts = zip(q.split(document, 2), k.split(document, 2), v.split(document, 2), strict=True)
        outputs = [plain_attention(q, k, v, spec, None) for q, k, v in parts]
        return torch.cat([output.transpose(1, 2) for output in outputs], dim=1).transpose(1, 2)


class _FusedAttention(torch.autograd.Function):
    """Keeps its inputs, its output and one fp32 number a row and head; its backward pass makes their gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Laid out as [1, tokens, heads, d], as PackedAttention joins its documents.
        out = torch.empty_like(q.transpose(1, 2).contiguous()).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], device=q.device, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def available_bytes(device: torch.device) -> int:
    """What training may take in all: on a GPU with the weights that lie there, on a CPU, where they are mapped, too."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    available = int(psutil.virtual_memory().available)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
        available = min(available, int(text) - int(stat["anon"]))  # what is mapped from files can be dropped
    return available


def resident_bytes() -> int:
    """What this process holds now, with its share of what it shares with others."""
    smaps = Path("/proc/self/smaps_rollup")
    if not smaps.exists():
        return int(psutil.Process().memory_info().rss)
    (line,) = [line for line in smaps.read_text().splitlines() if line.startswith("Pss:")]
    return int(line.split()[1]) * 1024


def return_freed_memory() -> None:
    """From now on every tensor of 1 MiB or more is memory of its own, which goes back to the system with it.

    Else glibc keeps them in one heap with holes that it cannot use (2.36: up to 0.7 GB more at 1,024 tokens of
    SmolLM2-135M than the tensors come to, half of what checkpointing saves). The price is time in the kernel.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none, and no such heap
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, EXACT_HEAP_BYTES)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
