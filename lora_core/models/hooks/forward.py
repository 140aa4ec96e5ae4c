"""The path of every family: transformers' own modules, with adapters hung on their linears (`bank.py`)."""

from __future__ import annotations

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


@dataclass(frozen=True)
class ReadySegments:
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
        """It takes every adapter."""
        return []

    def bind(self, adapter: Adapter) -> Adapter:
        """Hooks take it as it is."""
        return adapter

    def ready(
        self, batch: PackedBatch, adapters: Sequence[Adapter | None], dropout_keys: Sequence[Tensor | None]
    ) -> ReadySegments:
        """A segment for each chunk."""
        of_chunks = zip(adapters, batch.chunks, dropout_keys, strict=True)
        return ReadySegments(batch, [Segment(adapter, chunk.padded_tokens, keys) for adapter, chunk, keys in of_chunks])

    def forward_backward(self, ready: ReadySegments, checkpointing: Checkpointing) -> Tensor:
        """Add the gradients of every adapter; the summed token loss of each chunk. "selective" saves nothing here."""
        model = self.base.model
        with recomputed_layers(model, self.modules) if checkpointing == "full" else nullcontext():
            losses = batch_losses(self.base, self.modules, ready.segments, ready.packed)
        losses.sum().backward()
        return losses.detach()

    @torch.no_grad()
    def evaluate(self, ready: ReadySegments) -> tuple[Tensor, Tensor]:
        """(summed token loss, number of labels that have the largest logit) of each chunk."""
        loss, correct = batch_scores(self.base, self.modules, ready.segments, ready.packed).unbind(1)
        return loss, correct

    def warm_up(self, newcomer: Adapter, others: Sequence[Adapter], checkpointing: Checkpointing) -> None:
        """There is nothing to compile."""

    def close(self) -> None:
        """Take the hooks off the model."""
        self.modules.close()
