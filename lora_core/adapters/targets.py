"""The catalogue of a model's adaptable modules: which there are, and which a job's `target_modules` selects, as PEFT
would. Whoever only asks for names and shapes asks here; nothing is hooked or moved.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.dora import RowNorms, weight_of


class AdaptableModules:
    """The modules of a frozen model that adapters may have; the model may lie on the meta device.

    `linears` are those of "all-linear"; `modules` are all that can be adapted: the output head too, if it has a weight
    of its own, since the update of a tied one would be wrong for the embedding. `shapes` says how many numbers each
    takes and gives. `row_norms` are those of the base where its weights lie elsewhere than in the model's modules.
    """

    def __init__(self, model: PreTrainedModel, row_norms: RowNorms | None = None) -> None:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        refused: dict[nn.Module, str] = {embedding: "an embedding, which LoRA does not adapt here"}
        if head is not None and head.weight is embedding.weight:
            refused[head] = "the output head, which shares its weight with the embedding and so cannot be adapted alone"
        self.linears = adaptable_linears(model)
        self.modules = dict(self.linears)
        if head is not None and head not in refused:
            self.modules |= {name: module for name, module in model.named_modules() if module is head}
        self.shapes = {name: in_and_out(module) for name, module in self.modules.items()}
        self.row_norms = row_norms or RowNorms(lambda name: weight_of(self.modules[name]))
        # Modules that a user may well name, and that cannot be adapted.
        self._refused = {name: refused[module] for name, module in model.named_modules() if module in refused}

    def select(self, target_modules: str | list[str]) -> list[str]:
        """Return the names of the modules that `target_modules` selects, in the model's order.

        Raises:
            ValueError: an entry matches nothing, or a module that cannot be adapted; the sentence names those that can.
        """
        if target_modules == "all-linear":
            return list(self.linears)
        entries = [target_modules] if isinstance(target_modules, str) else target_modules
        matches = _full_match if isinstance(target_modules, str) else _ends_with
        problems, chosen = [], set()
        for entry in entries:
            found = [name for name in self.modules if matches(entry, name)]
            excluded = [f"{entry!r} selects {what}" for name, what in self._refused.items() if matches(entry, name)]
            problems += excluded
            if not found and not excluded:
                problems.append(f"{entry!r} matches no module")
            chosen.update(found)
        if problems:
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in self.modules}))
            raise ValueError(f"target_modules: {'; '.join(problems)}. Choose from {leaves}, or all-linear.")
        return [name for name in self.modules if name in chosen]

    def add_norms(self, adapter: Adapter, modules: Iterable[str]) -> None:
        """Compute what DoRA divides by where it is not known; nothing for an adapter without DoRA."""
        for name in modules:
            if name in adapter.magnitude and name not in adapter.norm:
                adapter.norm[name] = self.row_norms.of(name, *adapter.folded(name))


def adaptable_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return every `nn.Linear` and GPT-2 `Conv1D` by name, without the output head: what PEFT calls "all-linear"."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def layer_of(module: str) -> int | None:
    """Return the first number in a name that two names precede, as PEFT does: `model.layers.3.mlp.up_proj` -> 3."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return int(found[1]) if found else None


def in_and_out(module: nn.Module) -> tuple[int, int]:
    """Return how many numbers a linear takes and gives."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    assert isinstance(module, Conv1D)
    return int(module.nx), int(module.nf)


def _ends_with(entry: str, name: str) -> bool:
    return name == entry or name.endswith("." + entry)


def _full_match(entry: str, name: str) -> bool:
    try:
        return re.fullmatch(entry, name) is not None
    except re.error as error:
        raise ValueError(f"target_modules: {entry!r} is no regular expression ({error})") from error
