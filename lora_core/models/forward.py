"""How a base computes with adapters: one path for all who use it at a time, chosen here and nowhere else.

    llama   the written-out decoder (`llama/`)                      Llama, Mistral, Qwen2 and Qwen3; fp8 and nf4
    hooks   transformers' modules with adapters on them (`hooks/`)  other families; PiSSA, and adapters of the head

Whoever trains or serves asks a `Forward` and knows nothing of what is behind it, so no micro-batch is ever half one and
half the other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, device
from transformers import PretrainedConfig

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.init import LoraConfigError
from lora_core.adapters.targets import AdaptableModules
from lora_core.config import LoraConfig
from lora_core.data.packing import PackedBatch
from lora_core.models.base import BaseModel
from lora_core.models.exactness import Exactness
from lora_core.models.hooks.forward import HooksForward
from lora_core.models.llama.decoder import Checkpointing, Decoder
from lora_core.models.llama.forward import LlamaForward, problems_on_llama
from lora_core.models.precision import QUANTISED
from lora_core.models.step import Bound, Step

log = logging.getLogger("lora.engine")

ForwardPath = Literal["llama", "hooks"]

Ready = Any
"""A batch as a path takes it, which its `ready` returned."""


class Forward(Protocol):
    """One base with any number of adapters on it. `modules` are those that can be adapted."""

    @property
    def name(self) -> ForwardPath: ...
    @property
    def modules(self) -> AdaptableModules: ...
    @property
    def device(self) -> device: ...

    def exactness(self) -> Exactness:
        """How training here keeps a job beside others equal to the same job alone."""
        ...

    def problems(self, lora: LoraConfig) -> list[str]:
        """Why such an adapter cannot take this path, a sentence each.

        Raises:
            LoraConfigError: `lora` does not fit the model.
        """
        ...

    def bind(self, adapter: Adapter) -> Bound:
        """The adapter as this path takes it, with the memory of its weights and gradients."""
        ...

    def stage(self, adapter: Adapter) -> Adapter:
        """An adapter that is only served, in host memory as `load` copies it soonest."""
        ...

    def load(self, adapter: Adapter) -> Bound:
        """The same of an adapter that is only served, staged or not, which is copied to where and to what this path
        takes; what a device computes meanwhile does not wait for that.
        """
        ...

    def ready(
        self, batch: PackedBatch, adapters: Sequence[Bound | None], dropout_keys: Sequence[Tensor | None]
    ) -> Ready:
        """Make all that comes before the first kernel: of each chunk its adapter (None: the base alone), and dropout
        keys where it drops features.
        """
        ...

    def forward_backward(self, ready: Ready, checkpointing: Checkpointing, weights: Tensor | None = None) -> Tensor:
        """Add every chunk's gradient to its adapter, times its weight in `[chunks]` (None: 1); `[chunks]`, their summed
        token losses.
        """
        ...

    def evaluate(self, ready: Ready) -> tuple[Tensor, Tensor]:
        """`[chunks]` twice: summed token losses, and how many labels are the most probable token."""
        ...

    def order(self, runs: Sequence[tuple[Bound | None, int]]) -> list[int]:
        """Say in which order a step had best have these runs, (adapter, tokens) each."""
        ...

    def step(self, step: Step) -> Tensor:
        """Logits `[n, vocabulary]` of the n tokens that are asked for, where nothing is trained."""
        ...

    def warm_up(self, newcomer: Adapter, others: Sequence[Adapter], checkpointing: Checkpointing) -> None:
        """Do beforehand what the first batch with a newcomer would wait for."""
        ...

    def close(self) -> None:
        """Leave the base as it was."""
        ...


def forward_path(config: PretrainedConfig, modules: AdaptableModules, lora: LoraConfig, precision: str) -> ForwardPath:
    """The path of a job with this adapter, on a model of this config in `precision`; its `modules` may be without
    weights.

    Raises:
        LoraConfigError: `lora` does not fit the model, or such an adapter is not possible in this precision.
    """
    problems = problems_on_llama(modules, lora, precision)
    if precision in QUANTISED and problems:
        raise LoraConfigError(problems)
    return "hooks" if problems or Decoder.misfit(config) is not None else "llama"


def open_forward(base: BaseModel, path: ForwardPath | None = None) -> Forward:
    """The base's path of this name (None: the one that plain adapters take).

    Raises:
        ValueError: the base has no such path.
    """
    path = path or ("hooks" if base.decoder is None else "llama")
    log.info("event=forward base=%s path=%s", base.source, path)
    if path == "hooks" and base.is_quantised:
        raise ValueError(f"base model {base.source}: in {base.precision} there is the llama path alone; use bf16")
    if path == "hooks":
        return HooksForward(base)
    if base.decoder is None:
        raise ValueError(f"base model {base.source}: there is no llama path for it; use hooks")
    norms = base.decoder.row_norms if base.is_quantised else None
    return LlamaForward(base.decoder, AdaptableModules(base.model, norms), base.precision)
