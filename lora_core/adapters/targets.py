"""Which modules of a model an adapter may have, and which of them a job's `target_modules` selects: what PEFT would."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.dora import RowNorms, weight_of


class AdaptableModules:
    """The modules of a frozen model that adapters may have.

    `linears` are those of "all-linear"; `modules` are all that can be adapted: the output head too, if it has a weight
    of its own. `row_norms` are those of the base where its weights lie elsewhere than in the model's modules.
    """

    def __init__(self, model: PreTrainedModel, row_norms: RowNorms | None = None) -> None:
        self.linears = adaptable_linears(model)
        self.modules = self.linears | untied_head(model)
        self.row_norms = row_norms or RowNorms(lambda name: weight_of(self.modules[name]))
        self._refused = refused_names(model)

    def shapes(self, target_modules: str | list[str]) -> dict[str, tuple[int, int]]:
        """(in, out) of every linear that `target_modules` selects, in the model's order.

        Raises:
            ValueError: an entry matches nothing, or a module that cannot be adapted; the sentence names those that can.
        """
        return {name: in_and_out(self.modules[name]) for name in self.select(target_modules)}

    def select(self, target_modules: str | list[str]) -> list[str]:
        """Names of the linears that `target_modules` selects; see `shapes`."""
        return selected(target_modules, self.linears, self.modules, self._refused)

    def add_norms(self, adapter: Adapter, modules: Iterable[str]) -> None:
        """Compute what DoRA divides by where it is not known; nothing for an adapter without DoRA."""
        for name in modules:
            if name in adapter.magnitude and name not in adapter.norm:
                adapter.norm[name] = self.row_norms.of(name, *adapter.folded(name))


def adaptable_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every `nn.Linear` and GPT-2 `Conv1D` by name, without the output head: what PEFT calls "all-linear"."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def untied_head(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The output head by name, if its weight is its own: the update of a tied one would be wrong for the embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight:
        return {}
    return {name: module for name, module in model.named_modules() if module is head}


def refused_names(model: PreTrainedModel) -> dict[str, str]:
    """Name of each module that a user may well name, and that cannot be adapted -> what it is."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    why: dict[nn.Module, str] = {embedding: "an embedding, which LoRA does not adapt here"}
    if not untied_head(model):
        why[head] = "the output head, which shares its weight with the embedding here and so cannot be adapted alone"
    return {name: why[module] for name, module in model.named_modules() if module in why}


def selected(
    target_modules: str | list[str],
    linears: Container[str],
    modules: Mapping[str, nn.Module],
    refused: Mapping[str, str],
) -> list[str]:
    """Names of those `modules` that `target_modules` selects, in their order; `linears` are those of "all-linear".

    Raises:
        ValueError: an entry matches nothing, or a `refused` module; the sentence names those that can be chosen.
    """
    if target_modules == "all-linear":
        return [name for name in modules if name in linears]
    entries = [target_modules] if isinstance(target_modules, str) else target_modules
    matches = _full_match if isinstance(target_modules, str) else _ends_with
    problems, chosen = [], set()
    for entry in entries:
        found = [name for name in modules if matches(entry, name)]
        excluded = [f"{entry!r} selects {what}" for name, what in refused.items() if matches(entry, name)]
        problems += excluded
        if not found and not excluded:
            problems.append(f"{entry!r} matches no module")
        chosen.update(found)
    if problems:
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
        raise ValueError(f"target_modules: {'; '.join(problems)}. Choose from {leaves}, or all-linear.")
    return [name for name in modules if name in chosen]


def layer_of(module: str) -> int | None:
    """The first number in a name that two names precede, as PEFT finds it: `model.layers.3.mlp.up_proj` -> 3."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return int(found[1]) if found else None


def in_and_out(module: nn.Module) -> tuple[int, int]:
    """How many numbers a linear takes and gives."""
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
