"""The path of the Llama family: the written-out decoder (`decoder.py`) with adapters as its kernels take them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.init import adapted_modules
from lora_core.adapters.targets import AdaptableModules
from lora_core.config import LoraConfig
from lora_core.data.packing import PackedBatch
from lora_core.kernels.operands import EXACT_DTYPES, NO_ADAPTER
from lora_core.kernels.transfer import beside_kernels, kernels_read
from lora_core.models.attention import DocumentAttention, StepAttention
from lora_core.models.exactness import (
    SERVED_HEAD_ROWS,
    SERVED_ROWS,
    Exactness,
    FrozenProduct,
    exactness_of,
    served_rows_are_alike,
)
from lora_core.models.llama.adapters import (
    AdapterLayout,
    KernelArgs,
    ServableAdapter,
    StagedAdapter,
    on_device,
    staged,
)
from lora_core.models.llama.decode import ROWS, DecodeGraphs
from lora_core.models.llama.decoder import Checkpointing, Decoder, DecoderBatch, DecoderInput
from lora_core.models.llama.head import Labels
from lora_core.models.llama.packing import pack_for_serving
from lora_core.models.llama.stacks import AdapterStacks
from lora_core.models.llama.warmup import KernelWarmup
from lora_core.models.paged_kv import PagedAttention
from lora_core.models.precision import EXACT_ROWS, QUANTISED, DenseWeight, FrozenWeight
from lora_core.models.step import Step

log = logging.getLogger("lora.engine")


@dataclass(frozen=True)
class LlamaBatch:
    """A packed batch on the device, as the decoder takes it."""

    batch: DecoderBatch
    labels: Labels
    adapters: Sequence[ServableAdapter | None]


class LlamaForward:
    """`Forward` through the decoder; see `models/forward.py`."""

    name: Literal["llama"] = "llama"

    def __init__(self, decoder: Decoder, modules: AdaptableModules, precision: str) -> None:
        self.decoder, self.modules, self._precision = decoder, modules, precision
        self.device = decoder.embedding.device
        self._head_weight = DenseWeight([decoder.head])
        self._head = next(iter(modules.modules.keys() - modules.linears.keys()), "")
        self._is_exact = self.device.type == "cpu" and decoder.embedding.dtype in EXACT_DTYPES
        self._stacks = AdapterStacks(decoder.groups, decoder.embedding.dtype) if self.device.type == "cpu" else None
        self._dense = [
            weight for layer in decoder.layers for weight in layer.weights if isinstance(weight, DenseWeight)
        ]
        self._dense.append(self._head_weight)
        self._serving_problems: dict[int, str | None] = {}
        self._graphs: DecodeGraphs | None = None
        self._layouts: dict[tuple[object, ...], AdapterLayout] = {}
        self._making_layout = Lock()
        self._warmup = KernelWarmup(decoder) if self.device.type == "cuda" else None

    def exactness(self) -> Exactness:
        """Asked of the stacked products; see `exactness.py`. All else runs on one chunk at a time, or by rows."""
        return exactness_of(self._products(lambda weight: weight.forward), self.device, self.decoder.embedding.dtype)

    def _products(self, forward: Callable[[FrozenWeight], Callable[[Tensor], Tensor]]) -> list[FrozenProduct]:
        weights = [weight for layer in self.decoder.layers for weight in layer.weights]
        dtype = self.decoder.embedding.dtype
        return [
            FrozenProduct((type(weight), group.outputs), group.inputs, sum(group.outputs), dtype, forward(weight),
                          weight.input_gradient)
            for group, weight in zip(self.decoder.groups, weights, strict=True)
        ]  # fmt: skip

    def serving_problem(self) -> str | None:
        """Why a request's tokens may depend on those beside it, with the threads of now; None where they do not.

        Asked at the first step, for which weights are packed, of the products and of those of adapters.
        """
        threads = torch.get_num_threads()
        if threads not in self._serving_problems:
            if self.device.type == "cpu" and not self._serving_problems:
                pack_for_serving(self._dense, self.decoder.embedding.dtype)
            problem = self._found_problem(threads)
            self._serving_problems[threads] = problem
            log.info("event=serving_exactness answer=%r", problem or "bit for bit")
        return self._serving_problems[threads]

    def _found_problem(self, threads: int) -> str | None:
        if not self._is_exact:
            return "bits are promised in fp32 on CPU alone"
        alike = self._rows_are_alike()
        if not alike and self._head_weight.is_packed:
            log.warning("event=serving_unpacked reason=exactness threads=%d", threads)
            for weight in self._dense:
                weight.unpack()
            alike = self._rows_are_alike()
        if not alike:
            return f"this CPU's products depend on how many rows they have with {threads} threads"
        if self._stacks is not None and not self._stacks.are_exact():
            return f"this CPU's products of adapters depend on how many there are with {threads} threads"
        return None

    def _rows_are_alike(self) -> bool:
        weight, (outputs, inputs) = self._head_weight, self.decoder.head.shape
        dtype = self.decoder.head.dtype
        head = FrozenProduct((type(weight),), inputs, outputs, dtype, weight.serve, weight.input_gradient)
        products = self._products(lambda weight: weight.serve)
        return served_rows_are_alike(products, SERVED_ROWS) and served_rows_are_alike([head], SERVED_HEAD_ROWS)

    def problems(self, lora: LoraConfig) -> list[str]:
        return problems_on_llama(self.modules, lora, self._precision)

    def bind(self, adapter: Adapter) -> KernelArgs:
        return self.decoder.kernel_args(adapter)

    def stage(self, adapter: Adapter) -> Adapter:
        """In the dtype of the base; beside a GPU in pinned memory, and in one piece."""
        dtype = self.decoder.embedding.dtype
        return staged(adapter, dtype, pinned=True) if self.device.type == "cuda" else adapter.to(dtype)

    def load(self, adapter: Adapter) -> ServableAdapter:
        """On the device, in the dtype of the base, as kernels read it fastest; beside what is computed meanwhile."""
        dtype, on_gpu = self.decoder.embedding.dtype, self.device.type == "cuda"
        if not isinstance(adapter, StagedAdapter) or adapter.memory.dtype != dtype:
            adapter = staged(adapter, dtype, pinned=on_gpu)
        with beside_kernels(self.device):
            bound: ServableAdapter
            if on_gpu and not adapter.magnitude:
                bound = self._layout(adapter).adapter_at(adapter.memory.to(self.device, non_blocking=True))
            else:
                bound = args = self.bind(on_device(adapter, adapter.memory, self.device))
                args.take_norms(adapter.norm)
        kernels_read(bound.memory)
        return bound

    def _layout(self, adapter: StagedAdapter) -> AdapterLayout:
        kind = adapter.kind
        with self._making_layout:  # adapters are loaded by many threads
            if kind not in self._layouts:
                self._layouts[kind] = AdapterLayout(adapter, self.decoder.groups, self.device)
            return self._layouts[kind]

    def ready(
        self, batch: PackedBatch, adapters: Sequence[ServableAdapter | None], dropout_keys: Sequence[Tensor | None]
    ) -> LlamaBatch:
        present, indices = _indexed(adapters)
        segments = [(index, chunk.padded_tokens) for index, chunk in zip(indices, batch.chunks, strict=True)]
        inputs = DecoderInput(batch.ids[0], batch.positions[0], segments, _joined(batch, dropout_keys))
        tokens = [chunk.padded_tokens for chunk in batch.chunks]
        attention = DocumentAttention(batch.lengths, tokens, self.decoder.scaling, self.device)
        return LlamaBatch(self.decoder.batch(inputs, present, attention), batch.labels, adapters)

    def forward_backward(
        self, ready: LlamaBatch, checkpointing: Checkpointing, weights: Tensor | None = None
    ) -> Tensor:
        return self.decoder.forward_backward(ready.batch, ready.labels, checkpointing, weights)

    def evaluate(self, ready: LlamaBatch) -> tuple[Tensor, Tensor]:
        if not any(map(self._adapts_head, ready.adapters)):
            return self.decoder.evaluate(ready.batch, ready.labels)
        hidden, scores = self.decoder.hidden(ready.batch), []
        for adapter, (rows, labels) in zip(ready.adapters, ready.labels, strict=True):
            logits = self._logits(hidden[rows], [adapter] * len(rows)).float()
            correct = (logits.argmax(-1) == labels).sum().float()
            scores.append(torch.stack([F.cross_entropy(logits, labels, reduction="sum"), correct]))
        losses, correct = torch.stack(scores, dim=1)
        return losses, correct

    def order(self, runs: Sequence[tuple[ServableAdapter | None, int]]) -> list[int]:
        """As kernels take them in the fewest products."""
        if self._stacks is not None:
            return self._stacks.order([(None if of is None else of.args, tokens) for of, tokens in runs])
        return sorted(range(len(runs)), key=lambda index: id(runs[index][0]))

    def step(self, step: Step) -> Tensor:
        """Logits `[n, vocabulary]` of the n tokens that are asked for."""
        if isinstance(step.attend, PagedAttention) and len(step.ids) <= ROWS[-1]:
            return self._graph_step(step, step.attend)
        runs, (ids, positions) = list(step.runs), step.inputs(self.device)
        self.serving_problem()
        if self._is_exact and (missing := EXACT_ROWS - len(ids)) > 0:
            ids, positions, runs = F.pad(ids, (0, missing)), F.pad(positions, (0, missing)), [*runs, (None, missing)]
        present, indices = _indexed([adapter for adapter, _ in runs])
        segments = [(index, tokens) for index, (_, tokens) in zip(indices, runs, strict=True)]
        stacks = self._stacks.of(runs) if self._stacks is not None and present else None
        attention = StepAttention(step.attend, self.decoder.scaling)
        inputs = DecoderInput(ids, positions, segments)
        hidden = self.decoder.hidden(self.decoder.batch(inputs, present, attention, serving=True, stacks=stacks))
        return self._logits(hidden[step.logits_of], step.adapters())

    def _graph_step(self, step: Step, attend: PagedAttention) -> Tensor:
        if self._graphs is None or self._graphs.kv is not attend.kv:
            self._graphs = DecodeGraphs(self.decoder, self._head_weight, attend.kv)
        hidden, logits = self._graphs.step(step, attend)
        return self._with_head_adapters(logits, hidden, step.adapters())

    def _logits(self, hidden: Tensor, adapters: Sequence[ServableAdapter | None]) -> Tensor:
        """`[n, vocabulary]` of hidden states `[n, H]`."""
        return self._with_head_adapters(self._head_weight.serve(hidden), hidden, adapters)

    def _with_head_adapters(self, logits: Tensor, hidden: Tensor, adapters: Sequence[ServableAdapter | None]) -> Tensor:
        """Add to each row what its adapter has on the head: here it is served, and not trained."""
        for row, bound in enumerate(adapters):
            if bound is None or not self._adapts_head(bound):
                continue
            adapter, name = bound.args.adapter, self._head
            a, b = adapter.weights(name, hidden.dtype)
            logits[row] += (hidden[row] @ a.t()) @ b.t() * adapter.scale[name]
            if name in adapter.magnitude:
                self.modules.add_norms(adapter, [name])
                logits[row] *= adapter.dora_scale(name).to(logits.dtype)
        return logits

    def _adapts_head(self, bound: ServableAdapter | None) -> bool:
        return bound is not None and self._head in bound.modules

    def warm_up(self, newcomer: Adapter, others: Sequence[Adapter], checkpointing: Checkpointing) -> None:
        """Compile the kernels of a newcomer's batches, alone and beside the others', before they are needed."""
        if self._warmup is not None:
            self._warmup.warm_up(newcomer, others, checkpointing)

    def close(self) -> None:
        """Nothing was hung on the model."""


def problems_on_llama(modules: AdaptableModules, lora: LoraConfig, precision: str) -> list[str]:
    """What the decoder does not compute of such an adapter, PiSSA and modules outside of its layers: a sentence each.

    Raises:
        LoraConfigError: `lora` does not fit the model.
    """
    outside = [name for name in adapted_modules(modules, lora) if not name.startswith("model.layers.")]
    names = ["init_lora_weights"] if lora.init_lora_weights == "pissa" else []
    names += [f"target_modules: {name}" for name in outside]
    if precision in QUANTISED:
        return [f"{name} is not possible on a base in {precision}: leave it out, or use bf16" for name in names]
    return [f"{name} needs the path of hooks: train it apart from jobs of the llama path" for name in names]


def _indexed(adapters: Sequence[ServableAdapter | None]) -> tuple[list[KernelArgs], list[int]]:
    """Those that are there, once each, and each one's index among them."""
    present = {id(adapter): adapter.args for adapter in adapters if adapter is not None}
    index = {key: index for index, key in enumerate(present)} | {id(None): NO_ADAPTER}
    return list(present.values()), [index[id(adapter)] for adapter in adapters]


def _joined(batch: PackedBatch, dropout_keys: Sequence[Tensor | None]) -> Tensor | None:
    """int64 `[T]`, zero for chunks without dropout; None where all are without."""
    if all(keys is None for keys in dropout_keys):
        return None
    of_chunks = zip(batch.chunks, dropout_keys, strict=True)
    return torch.cat([torch.zeros_like(chunk.positions) if keys is None else keys for chunk, keys in of_chunks])
