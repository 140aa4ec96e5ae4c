"""The path of every family: transformers' own modules, with adapters hung on their linears (`bank.py`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.targets import adaptable_linears
from lora_core.config import LoraConfig
from lora_core.data.packing import PackedBatch
from lora_core.models.base import BaseModel
from lora_core.models.exactness import Exactness, FrozenProduct, exactness_of
from lora_core.models.hooks.bank import AdapterBank, Segment
from lora_core.models.hooks.checkpointing import recomputed_layers
from lora_core.models.hooks.loss import batch_losses, batch_scores
from lora_core.models.llama.decoder import Checkpointing
from lora_core.models.step import Step


@dataclass(frozen=True)
class HooksBatch:
    """A packed batch, and which adapter each of its chunks has."""

    packed: PackedBatch
    segments: Sequence[Segment]


class HooksForward:
    """`Forward` through the model's own modules; see `models/forward.py`."""

    name: Literal["hooks"] = "hooks"

    def __init__(self, base: BaseModel) -> None:
        self.base, self.device = base, base.device
        self.modules = AdapterBank(base.model)

    def exactness(self) -> Exactness:
        """Asked of the linears' products; see `exactness.py`."""
        products = map(FrozenProduct.of_linear, adaptable_linears(self.base.model).values())
        return exactness_of(products, self.device, self.base.model.dtype)

    def problems(self, lora: LoraConfig) -> list[str]:
        return []

    def bind(self, adapter: Adapter) -> Adapter:
        return adapter

    def stage(self, adapter: Adapter) -> Adapter:
        return adapter.to(self.base.model.dtype)

    def load(self, adapter: Adapter) -> Adapter:
        """On the device and in the dtype of the base, to which products would convert it."""
        dtype, device = self.base.model.dtype, self.device
        a = {name: weight.to(device, dtype) for name, weight in adapter.a.items()}
        b = {name: weight.to(device, dtype) for name, weight in adapter.b.items()}
        magnitude = {name: m.to(device) for name, m in adapter.magnitude.items()}
        served = Adapter(adapter.scale, a, b, cast={name: (a[name], b[name]) for name in a}, magnitude=magnitude)
        served.norm.update(adapter.norm)
        return served

    def ready(
        self, batch: PackedBatch, adapters: Sequence[Adapter | None], dropout_keys: Sequence[Tensor | None]
    ) -> HooksBatch:
        of_chunks = zip(adapters, batch.chunks, dropout_keys, strict=True)
        return HooksBatch(batch, [Segment(adapter, chunk.padded_tokens, keys) for adapter, chunk, keys in of_chunks])

    def forward_backward(
        self, ready: HooksBatch, checkpointing: Checkpointing, weights: Tensor | None = None
    ) -> Tensor:
        """Of a graph that autograd makes; "selective" recomputes nothing here."""
        model = self.base.model
        with recomputed_layers(model, self.modules) if checkpointing == "full" else nullcontext():
            losses = batch_losses(self.base, self.modules, ready.segments, ready.packed, weights=weights)
        losses.sum().backward()
        return losses.detach()

    @torch.no_grad()
    def evaluate(self, ready: HooksBatch) -> tuple[Tensor, Tensor]:
        loss, correct = batch_scores(self.base, self.modules, ready.segments, ready.packed).unbind(1)
        return loss, correct

    def order(self, runs: Sequence[tuple[Adapter | None, int]]) -> list[int]:
        """Those of one adapter side by side: they are one segment."""
        return sorted(range(len(runs)), key=lambda index: id(runs[index][0]))

    def step(self, step: Step) -> Tensor:
        """Logits `[n, vocabulary]` of the n tokens that are asked for."""
        ids, positions = step.inputs(self.device)
        with self.modules.routed(_segments(step.runs)):
            hidden = self.base.hidden(ids[None], positions[None], step.attend)[0]
        with self.modules.routed(_segments([(adapter, 1) for adapter in step.adapters()])):
            return self.base.head(hidden[step.logits_of])

    def warm_up(self, newcomer: Adapter, others: Sequence[Adapter], checkpointing: Checkpointing) -> None:
        """There is nothing to compile."""

    def close(self) -> None:
        """Take the hooks off the model."""
        self.modules.close()


def _segments(runs: Sequence[tuple[Adapter | None, int]]) -> list[Segment]:
    """Of runs side by side, those of one adapter joined."""
    joined = [list(of_adapter) for _, of_adapter in itertools.groupby(runs, key=lambda run: id(run[0]))]
    return [Segment(of_adapter[0][0], sum(tokens for _, tokens in of_adapter)) for of_adapter in joined]
