"""What an adapter is before its first step: which modules it has, and A, B and scale of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.dora import weight_of
from lora_core.adapters.dropout import key_of
from lora_core.adapters.targets import AdaptableModules, layer_of
from lora_core.config import LoraConfig, pattern_key


class LoraConfigError(ValueError):
    """Options that do not fit this base model: `problems`, one sentence each, which begins with the option's name."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        return "; ".join(self.problems)


def adapted_modules(adaptable: AdaptableModules, lora: LoraConfig) -> list[str]:
    """Return the names of the linears that get an A and a B, in the model's order.

    Raises:
        LoraConfigError: an option matches nothing, or does not fit what it matches.
    """
    problems: list[str] = []
    try:
        modules = adaptable.select(lora.target_modules)
    except ValueError as error:
        problems.append(str(error))
        modules = list(adaptable.linears)  # what else is wrong is told too
    if lora.layers_to_transform is not None:
        layers = {name: layer_of(name) for name in modules}
        absent = sorted(set(lora.layers_to_transform) - set(layers.values()))
        if absent:
            known = sorted({layer for layer in layers.values() if layer is not None})
            problems.append(
                f"layers_to_transform: no adapted module lies in layer {', '.join(map(str, absent))}; the layers are"
                f" {', '.join(map(str, known)) or 'not numbered'}"
            )
        modules = [name for name in modules if layers[name] in lora.layers_to_transform] or modules
    problems += _unused_keys("rank_pattern", lora.rank_pattern, modules)
    problems += _unused_keys("alpha_pattern", lora.alpha_pattern, modules)
    if lora.init_lora_weights == "pissa":
        problems += _ranks_above_a_weights(adaptable, lora, modules)
    if problems:
        raise LoraConfigError(problems)
    return modules


def init_adapter(adaptable: AdaptableModules, lora: LoraConfig, seed: int) -> Adapter:
    """Make a fresh adapter, without gradients, whose product is zero at the start (with PiSSA by its residual).

    The random stream depends on the seed and the module's name alone, so that every rank, and every choice of other
    target modules, starts from the same numbers.

    Raises:
        LoraConfigError: `lora` does not fit the model.
    """
    modules = adapted_modules(adaptable, lora)
    shapes = adaptable.shapes
    scale, a, b = {name: lora.scale_of(name) for name in modules}, {}, {}
    for name in modules:
        (fan_in, fan_out), rank = shapes[name], lora.rank_of(name)
        if lora.init_lora_weights == "pissa":
            a[name], b[name] = _pissa(adaptable.modules[name], rank, scale[name])
            continue
        stream = torch.Generator().manual_seed(key_of(f"{seed}:{name}") & (2**63 - 1))
        a[name], b[name] = torch.empty(rank, fan_in), torch.zeros(fan_out, rank)
        if lora.init_lora_weights == "gaussian":
            a[name].normal_(std=1 / rank, generator=stream)
        else:
            a[name].uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=stream)
    residual = None
    if lora.init_lora_weights == "pissa":
        residual = Adapter(scale, a, {name: -weight for name, weight in b.items()})
    return _with_magnitude(Adapter(scale, a, b, lora.lora_dropout, residual=residual), adaptable, lora)


def continued_adapter(adaptable: AdaptableModules, lora: LoraConfig, given: Adapter) -> Adapter:
    """Make an adapter of `lora` that computes what `given`, from `read_adapter`, does: A is the same, and B takes up
    what the two scales differ by.

    Raises:
        LoraConfigError: `lora` does not fit the model, or wants other modules or ranks than `given` has.
    """
    assert given.residual is None
    modules, problems = adapted_modules(adaptable, lora), []
    if lora.init_lora_weights is not True:
        problems.append("init_lora_weights: leave it out, since init_adapter says where A and B start")
    more, less = sorted(given.a.keys() - set(modules)), sorted(set(modules) - given.a.keys())
    if more or less:
        what = f"it also adapts {more[0]}" if more else f"it does not adapt {less[0]}"
        problems.append(f"init_adapter: {what}, so set target_modules and layers_to_transform to its modules")
    scale, a, b = {name: lora.scale_of(name) for name in modules}, {}, {}
    for name in (name for name in modules if name in given.a):
        a[name], b[name] = _without_zero_ranks(given.a[name], given.b[name])
        b[name] = b[name] * (given.scale[name] / scale[name])
    other = [name for name in a if a[name].shape[0] != lora.rank_of(name)]
    if other:
        problems.append(
            f"init_adapter: its rank is {a[other[0]].shape[0]} in {other[0]}, and this job's is"
            f" {lora.rank_of(other[0])}; set r and rank_pattern to its ranks"
        )
    if given.magnitude and not lora.use_dora:
        problems.append("init_adapter: it was trained with DoRA, so set use_dora")
    if problems:
        raise LoraConfigError(problems)
    return _with_magnitude(Adapter(scale, a, b, lora.lora_dropout, magnitude=given.magnitude), adaptable, lora)


def _with_magnitude(adapter: Adapter, adaptable: AdaptableModules, lora: LoraConfig) -> Adapter:
    """Give it DoRA's m, if `lora` wants it: the row norms of the weights, which change nothing, where it has none yet.

    A copy to or from a device waits for all that the device was given to do before, up to a step of those that train:
    so the common case has one, of all norms.
    """
    if lora.use_dora and not adapter.magnitude:
        norms, b = adaptable.row_norms, adapter.b
        found = [norms.of(n, *adapter.folded(n)) if b[n].any() else norms.of_base(n, b[n].dtype) for n in b]
        host = torch.cat(found).cpu()
        adapter.magnitude = dict(zip(b, host.split([len(norm) for norm in found]), strict=True))
    return adapter


def _without_zero_ranks(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the zeros that pad a published adapter to its largest rank: where A and B are both zero, neither learns."""
    used = a.any(dim=1) | b.any(dim=0)
    rank = int(used.nonzero().max()) + 1 if used.any() else 0
    return a[:rank], b[:, :rank]


@torch.no_grad()
def _pissa(linear: torch.nn.Module, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return A and B in host memory: `scale B A` is the part of the weight in its `rank` largest singular vectors. A
    singular vector's sign is free; the largest entry of each row of A is positive, so that ranks on different machines
    agree.
    """
    weight = weight_of(linear)
    u, s, vh = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
    u, s, vh = u[:, :rank], (s[:rank] / scale).sqrt(), vh[:rank]
    sign = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()
    return (s[:, None] * vh * sign).cpu(), (u * s * sign[:, 0]).cpu()


def _unused_keys(option: str, pattern: dict[str, int] | dict[str, float], modules: Sequence[str]) -> list[str]:
    used = {pattern_key(pattern, name) for name in modules}
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
    problems = []
    for key in pattern:
        if not any(pattern_key({key: None}, name) for name in modules):
            problems.append(f"{option}: {key!r} matches no adapted module; choose from {leaves}, or leave it out")
        elif key not in used:
            problems.append(f"{option}: {key!r} never counts, as earlier keys match all its modules; put it first")
    return problems


def _ranks_above_a_weights(adaptable: AdaptableModules, lora: LoraConfig, modules: Sequence[str]) -> list[str]:
    shapes = adaptable.shapes
    return [
        f"init_lora_weights: {name} has {min(shapes[name])} singular vectors, and pissa was asked to train"
        f" {lora.rank_of(name)}; lower r or rank_pattern"
        for name in modules
        if lora.rank_of(name) > min(shapes[name])
    ]
