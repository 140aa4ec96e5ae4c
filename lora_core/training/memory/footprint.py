"""What memory depends on, of an adapter: the rank of each module, and its kind. Neither alpha nor the seed is in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.init import adapted_modules
from lora_core.adapters.targets import AdaptableModules
from lora_core.config import LoraConfig

META = torch.device("meta")


@dataclass(frozen=True)
class Footprint:
    """`ranks` are those of all modules that the model has, 0 where one is not adapted."""

    ranks: tuple[int, ...]
    dropout: bool
    dora: bool
    residual: bool

    @staticmethod
    def widest(footprints: Iterable[Footprint]) -> Footprint:
        """Of an adapter that has every module of these, with the highest rank, dropout, DoRA and residual."""
        ranks, *kinds = zip(*((one.ranks, one.dropout, one.dora, one.residual) for one in footprints), strict=True)
        return Footprint(tuple(map(max, zip(*ranks, strict=True))), *map(any, kinds))


class Footprints:
    """Of adapters of one model, each made once for a config: a plan asks for those of all jobs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._adaptable = AdaptableModules(model)
        self.modules = self._adaptable.shapes
        self._known: dict[str, Footprint] = {}

    def of(self, lora: LoraConfig) -> Footprint:
        """Of an adapter of this config."""
        key = lora.model_dump_json()
        if key not in self._known:
            adapted = set(adapted_modules(self._adaptable, lora))
            ranks = tuple(lora.rank_of(name) if name in adapted else 0 for name in self.modules)
            pissa = lora.init_lora_weights == "pissa"
            self._known[key] = Footprint(ranks, lora.lora_dropout > 0, lora.use_dora, pissa)
        return self._known[key]

    def adapter(self, footprint: Footprint) -> Adapter:
        """One without numbers."""
        ranks = {name: rank for name, rank in zip(self.modules, footprint.ranks, strict=True) if rank}
        adapter = Adapter(
            dict.fromkeys(ranks, 1.0),
            {name: _trained((rank, self.modules[name][0])) for name, rank in ranks.items()},
            {name: _trained((self.modules[name][1], rank)) for name, rank in ranks.items()},
            0.5 if footprint.dropout else 0.0,
        )
        if footprint.residual:
            a, b = ({name: weight.detach().clone() for name, weight in of.items()} for of in (adapter.a, adapter.b))
            adapter.residual = Adapter(adapter.scale, a, b)
        if footprint.dora:
            adapter.magnitude = {name: _trained((self.modules[name][1],)) for name in ranks}
        return adapter


def _trained(shape: tuple[int, ...]) -> Tensor:
    weight = torch.empty(shape, device=META, requires_grad=True)
    weight.grad = torch.empty(shape, device=META)
    return weight
