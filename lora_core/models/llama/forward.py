"""The path of the Llama family: the written-out decoder (`decoder.py`) with adapters as its kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.init import adapted_modules
from lora_core.adapters.targets import AdaptableModules
from lora_core.config import LoraConfig
from lora_core.data.packing import PackedBatch
from lora_core.kernels.operands import NO_ADAPTER
from lora_core.models.exactness import Exactness, FrozenProduct, exactness_of
from lora_core.models.llama.adapters import KernelArgs
from lora_core.models.llama.decoder import Batch, Checkpointing, Decoder, Rows
from lora_core.models.llama.head import Labels
from lora_core.models.llama.warmup import Rehearsals
from lora_core.models.precision import QUANTISED


@dataclass(frozen=True)
class ReadyRows:
    """A packed batch on the device, as the decoder takes it."""

    batch: Batch
    labels: Labels


class LlamaForward:
    """`Forward` through the decoder; see `models/forward.py`."""

    name: Literal["llama"] = "llama"

    def __init__(self, decoder: Decoder, modules: AdaptableModules, precision: str) -> None:
        self.decoder, self.modules, self._precision = decoder, modules, precision
        self.device = decoder.embedding.device
        self._rehearsals = Rehearsals(decoder) if self.device.type == "cuda" else None

    def exactness(self) -> Exactness:
        """Asked of the stacked products; see `exactness.py`. All else runs on one chunk at a time, or by rows."""
        decoder, dtype = self.decoder, self.decoder.embedding.dtype
        weights = [weight for layer in decoder.layers for weight in layer.weights]
        products = [
            FrozenProduct((type(weight), group.outputs), group.inputs, sum(group.outputs), dtype, weight.forward,
                          weight.input_gradient)
            for group, weight in zip(decoder.groups, weights, strict=True)
        ]  # fmt: skip
        return exactness_of(products, self.device, dtype)

    def problems(self, lora: LoraConfig) -> list[str]:
        """Why such an adapter cannot take this path."""
        return problems_on_llama(self.modules, lora, self._precision)

    def bind(self, adapter: Adapter) -> KernelArgs:
        """The adapter as kernels take it; it follows every change of the weights."""
        return self.decoder.kernel_args(adapter)

    def ready(
        self, batch: PackedBatch, adapters: Sequence[KernelArgs | None], dropout_keys: Sequence[Tensor | None]
    ) -> ReadyRows:
        """All that is made of a batch before the first kernel: it can be made while another one is computed."""
        present = list({id(adapter): adapter for adapter in adapters if adapter is not None}.values())
        places = {id(adapter): place for place, adapter in enumerate(present)}
        segments = [
            (NO_ADAPTER if adapter is None else places[id(adapter)], chunk.padded_tokens)
            for adapter, chunk in zip(adapters, batch.chunks, strict=True)
        ]
        rows = Rows(batch.ids[0], batch.positions[0], batch.lengths, segments, _joined(batch, dropout_keys))
        return ReadyRows(self.decoder.batch(rows, present), batch.labels)

    def forward_backward(self, ready: ReadyRows, checkpointing: Checkpointing) -> Tensor:
        """Add the gradients of every adapter; the summed token loss of each chunk."""
        return self.decoder.forward_backward(ready.batch, ready.labels, checkpointing)

    def evaluate(self, ready: ReadyRows) -> tuple[Tensor, Tensor]:
        """(summed token loss, number of labels that have the largest logit) of each chunk."""
        return self.decoder.evaluate(ready.batch, ready.labels)

    def warm_up(self, newcomer: Adapter, others: Sequence[Adapter], checkpointing: Checkpointing) -> None:
        """Compile the kernels of a newcomer's batches, alone and beside the others', before they are needed."""
        if self._rehearsals is not None:
            self._rehearsals.before(newcomer, others, checkpointing)

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


def _joined(batch: PackedBatch, dropout_keys: Sequence[Tensor | None]) -> Tensor | None:
    """int64 `[T]`, zero for chunks without dropout; None where all are without."""
    if all(keys is None for keys in dropout_keys):
        return None
    of_chunks = zip(batch.chunks, dropout_keys, strict=True)
    return torch.cat([torch.zeros_like(chunk.positions) if keys is None else keys for chunk, keys in of_chunks])
