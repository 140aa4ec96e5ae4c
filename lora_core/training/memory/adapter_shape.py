"""What memory depends on, of an adapter: the rank of each module, and its kind. Neither alpha nor the seed is in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.init import adapted_modules
from lora_core.adapters.targets import AdaptableModules, layer_of
from lora_core.config import LoraConfig

META = torch.device("meta")


@dataclass(frozen=True)
class AdapterShape:
    """`ranks` are those of all modules that the model has, 0 where one is not adapted, and `dora` says which of them
    have a magnitude.
    """

    ranks: tuple[int, ...]
    dora: tuple[bool, ...]
    dropout: bool
    residual: bool

    @staticmethod
    def widest(shapes: Iterable[AdapterShape]) -> AdapterShape:
        """Of an adapter that has every module of these, with the highest rank and DoRA where one has it, dropout and
        residual.
        """
        kinds = list(shapes)
        ranks = tuple(map(max, zip(*(one.ranks for one in kinds), strict=True)))
        dora = tuple(map(any, zip(*(one.dora for one in kinds), strict=True)))
        return AdapterShape(ranks, dora, any(one.dropout for one in kinds), any(one.residual for one in kinds))


class AdapterShapes:
    """Of adapters of one model, each made once for a config: a plan asks for those of all jobs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.adaptable = AdaptableModules(model)
        self.modules = self.adaptable.shapes
        self._known: dict[str, AdapterShape] = {}

    def of(self, lora: LoraConfig) -> AdapterShape:
        """Of an adapter of this config."""
        key = lora.model_dump_json()
        if key not in self._known:
            adapted = set(adapted_modules(self.adaptable, lora))
            ranks = tuple(lora.rank_of(name) if name in adapted else 0 for name in self.modules)
            dora = tuple(lora.use_dora and rank > 0 for rank in ranks)
            self._known[key] = AdapterShape(ranks, dora, lora.lora_dropout > 0, lora.init_lora_weights == "pissa")
        return self._known[key]

    def layers_are_alike(self, shape: AdapterShape) -> bool:
        """Whether an adapter is the same on every layer."""
        parts: dict[int | None, list[tuple[str, int, bool]]] = {}
        for name, rank, dora in zip(self.modules, shape.ranks, shape.dora, strict=True):
            parts.setdefault(layer_of(name), []).append((name.rpartition(".")[2], rank, dora))
        parts.pop(None, None)
        first = next(iter(parts.values()))
        return all(part == first for part in parts.values())

    def adapter(self, shape: AdapterShape, layers: int | None = None) -> Adapter:
        """One without numbers, on the first `layers` alone."""
        present = self.modules if layers is None else [name for name in self.modules if (layer_of(name) or 0) < layers]
        ranks = {name: rank for name, rank in zip(self.modules, shape.ranks, strict=True) if rank and name in present}
        adapter = Adapter(
            dict.fromkeys(ranks, 1.0),
            {name: _trained((rank, self.modules[name][0])) for name, rank in ranks.items()},
            {name: _trained((self.modules[name][1], rank)) for name, rank in ranks.items()},
            0.5 if shape.dropout else 0.0,
        )
        if shape.residual:
            a, b = ({name: weight.detach().clone() for name, weight in of.items()} for of in (adapter.a, adapter.b))
            adapter.residual = Adapter(adapter.scale, a, b)
        dora = [name for name, adapted in zip(self.modules, shape.dora, strict=True) if adapted and name in ranks]
        adapter.magnitude = {name: _trained((self.modules[name][1],)) for name in dora}
        return adapter


def _trained(shape: tuple[int, ...]) -> Tensor:
    weight = torch.empty(shape, device=META, requires_grad=True)
    weight.grad = torch.empty(shape, device=META)
    return weight
