"""The frozen parts of the written-out decoder (`decoder.py`), taken out of a model of transformers, and which models
have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_core.adapters.dora import RowNorms
from lora_core.kernels.operands import HeadNorm, LinearGroup
from lora_core.models.precision import DenseWeight, FrozenWeight

QKV, O, GATE_UP, DOWN = range(4)  # noqa: E741 - the output projection's name in every checkpoint
_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Layer:
    """The frozen parts of a layer: its four groups of linears, its two norms, the bias of q, k and v, the norm of q's
    and k's heads.
    """

    weights: tuple[FrozenWeight, ...]
    norms: tuple[Tensor, Tensor]
    bias: Tensor | None
    head_norm: HeadNorm | None


class DecoderWeights:
    """The frozen layers of a base, group by group.

    `freeze` makes of a group's weights what is multiplied with (`precision.py`).
    """

    def __init__(
        self, model: PreTrainedModel, freeze: Callable[[Sequence[Tensor]], FrozenWeight] = DenseWeight
    ) -> None:
        config, body = model.config, cast(Any, model.base_model)
        self.embedding: Tensor = cast(Any, model).get_input_embeddings().weight
        self.head: Tensor = cast(Any, model).get_output_embeddings().weight
        self.final_norm: Tensor = body.norm.weight
        self.eps = float(config.rms_norm_eps)
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.head_size = int(getattr(config, "head_dim", None) or config.hidden_size // self.heads)
        self.rotary = body.rotary_emb
        self.row_norms = RowNorms(self._weight)
        self.groups: list[LinearGroup] = []
        self._groups_by_name: dict[str, tuple[LinearGroup, int]] = {}
        self.layers = [self._layer(index, layer, freeze) for index, layer in enumerate(body.layers)]

    def _layer(self, index: int, layer: Any, freeze: Callable[[Sequence[Tensor]], FrozenWeight]) -> Layer:
        weights = []
        for leaves in _GROUPS:
            linears = [layer.get_submodule(leaf) for leaf in leaves]
            names = tuple(f"model.layers.{index}.{leaf}" for leaf in leaves)
            outputs = tuple(linear.out_features for linear in linears)
            self.groups.append(LinearGroup(len(self.groups), names, linears[0].in_features, outputs))
            weights.append(freeze([linear.weight for linear in linears]))
            self._groups_by_name |= {name: (self.groups[-1], position) for position, name in enumerate(names)}
        biases = [layer.get_submodule(leaf).bias for leaf in _GROUPS[QKV]]
        bias = None if biases[0] is None else torch.cat(biases)
        norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        return Layer(tuple(weights), norms, bias, self._head_norm(layer.self_attn))

    def weights_of(self, group: LinearGroup) -> Sequence[Tensor]:
        """W `[out, in]` of each linear of a group, as products take it: made for the call where it is quantised."""
        parts = self.layers[group.index // len(_GROUPS)].weights[group.index % len(_GROUPS)].dense()
        if len(parts) == len(group.outputs):
            return parts
        (stacked,) = parts
        split: Sequence[Tensor] = stacked.split(group.outputs)
        return split

    def _weight(self, name: str) -> Tensor:
        group, position = self._groups_by_name[name]
        return self.weights_of(group)[position]

    def _head_norm(self, attention: Any) -> HeadNorm | None:
        if not hasattr(attention, "q_norm"):
            return None
        norms = (attention.q_norm, self.heads), (attention.k_norm, self.kv_heads)
        return HeadNorm(torch.cat([norm.weight.expand(heads, -1) for norm, heads in norms]), self.eps)

    @staticmethod
    def stacks(model: PreTrainedModel) -> list[list[list[Tensor]]]:
        """Layer by layer the weights of each group of linears, in the order in which `freeze` gets them."""
        layers = cast(Any, model.base_model).layers
        return [[[layer.get_submodule(leaf).weight for leaf in leaves] for leaves in _GROUPS] for layer in layers]

    @staticmethod
    def misfit(config: Any) -> str | None:
        """Why a model of this config is not computed here; None for Llama, Mistral, Qwen2 and Qwen3 as they usually
        come.
        """
        if config.model_type not in ("llama", "mistral", "qwen2", "qwen3"):
            return f"its family is {config.model_type}"
        if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None) is not None:
            return "its attention has a sliding window"
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            return "its linears have biases"
        if config.hidden_act != "silu":
            return f"its activation is {config.hidden_act}"
        if config.hidden_size % 8 or config.intermediate_size % 8:
            return f"its sizes, {config.hidden_size} and {config.intermediate_size}, are no multiples of 8"
        return None
