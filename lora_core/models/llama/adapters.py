"""An adapter as the decoder's kernels take it: views of its memory, group by group, and a table of their addresses.

One that is only served is one piece of memory, and on a GPU its table is that of another of its kind moved to there:
views of hundreds of matrices are milliseconds of the process that queues a step every few.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.dora import RowNorms
from lora_core.kernels.dispatch import device_type
from lora_core.kernels.operands import FusedLinearAdapter, LinearAdapter, LinearGroup, Magnitude
from lora_core.kernels.transfer import to_device


class KernelArgs:
    """An adapter's weights and gradients (of one that is served: weights) as the kernels take them, group by group:
    the same memory. With DoRA, norms and scales of its own; `dirty` says that they are not of the weights as they are.
    """

    def __init__(self, adapter: Adapter, groups: Sequence[LinearGroup], device: torch.device) -> None:
        self.adapter = adapter
        self.magnitudes = _magnitudes(adapter, groups)
        scales = _scales(adapter, groups, device)
        self.groups = [_fused_linear_adapter(adapter, group, scales[group.index], self.magnitudes) for group in groups]
        self.widths = [0 if group is None else group.width for group in self.groups]
        self.ranks = [0 if group is None else group.largest_rank for group in self.groups]
        self.dora = [group is not None and group.dora for group in self.groups]
        self.table: Tensor | None = None
        if device_type(device) == "cuda":
            self.table = torch.from_numpy(_table(self.groups, groups)).to(device)

    @property
    def args(self) -> KernelArgs:
        return self

    @property
    def modules(self) -> Collection[str]:
        """Names of those that are adapted."""
        return self.adapter.a.keys()

    @property
    def address(self) -> int:
        """That of the table."""
        assert self.table is not None
        return self.table.data_ptr()

    @cached_property
    def by_kind(self) -> list[tuple[int, int, bool]]:
        """Of each of the four groups of a layer: the largest width, the largest rank, whether one has DoRA."""
        of_kinds = [(self.widths[kind::4], self.ranks[kind::4], self.dora[kind::4]) for kind in range(4)]
        return [(max(widths), max(ranks), any(dora)) for widths, ranks, dora in of_kinds]

    @property
    def memory(self) -> list[Tensor]:
        """A tensor in each piece of memory that kernels read of an adapter that is served."""
        scales = next((group.scales for group in self.groups if group is not None), None)
        magnitudes = [tensor for of in self.magnitudes.values() for tensor in (of.m, of.norm)]
        pieces = [next(iter(self.adapter.a.values())), scales, self.table, *magnitudes]
        return [piece for piece in pieces if piece is not None]

    @property
    def dirty(self) -> bool:
        first = next(iter(self.magnitudes), None)  # whoever changes weights forgets all norms together
        return first is not None and self.adapter.norm.get(first) is not self.magnitudes[first].norm

    def mark_fresh(self) -> None:
        """Norms and scales are now those of the weights."""
        self.adapter.norm.update({name: magnitude.norm for name, magnitude in self.magnitudes.items()})

    def take_norms(self, norms: Mapping[str, Tensor]) -> None:
        """Copy norms that somebody has computed of the weights as they are, of all modules or of none."""
        if self.magnitudes.keys() <= norms.keys():
            for name, magnitude in self.magnitudes.items():
                magnitude.norm.copy_(norms[name])
                torch.div(magnitude.m, magnitude.norm, out=magnitude.scale)
            self.mark_fresh()

    def refresh(self, norms: RowNorms) -> None:
        """Compute norms and scales, on CPU."""
        for name, magnitude in self.magnitudes.items():
            magnitude.norm.copy_(norms.of(name, *self.adapter.folded(name)))
            torch.div(magnitude.m, magnitude.norm, out=magnitude.scale)


@dataclass(kw_only=True)
class StagedAdapter(Adapter):
    """One in host memory that goes to a device in one piece: `memory` has A of all modules, then B of all, transposed
    as kernels read it fastest, end to end.
    """

    memory: Tensor

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """What those have in common whose tables differ in addresses alone."""
        return tuple((name, len(a), self.scale[name]) for name, a in self.a.items())


class ServedAdapter:
    """An adapter on a GPU as graphs take it, by address; all others take `args`."""

    dirty = False  # it has no DoRA

    def __init__(self, layout: AdapterLayout, memory: Tensor, table: Tensor) -> None:
        self._layout, self.memory, self.address = layout, [memory, table, *layout.scales], table.data_ptr()
        self.by_kind, self.modules = layout.by_kind, layout.modules

    @cached_property
    def args(self) -> KernelArgs:
        return self._layout.args_at(self.memory[0])


ServableAdapter = KernelArgs | ServedAdapter


class AdapterLayout:
    """Where kernels find what in the memory of all adapters that are of a kind with this one, which has no DoRA."""

    def __init__(self, like: StagedAdapter, groups: Sequence[LinearGroup], device: torch.device) -> None:
        from lora_core.kernels.low_rank_triton import ADDRESSES, FIELDS, SCALES

        host = torch.device("cpu")
        here = KernelArgs(on_device(like, like.memory, host), groups, host)
        self._groups, self._device = groups, device
        self._like = Adapter(like.scale, _on_meta(like.a), _on_meta(like.b))
        self.by_kind, self.modules = here.by_kind, self._like.a.keys()
        scales_of = _scales(like, groups, device)
        self.scales = [scales for scales in scales_of if len(scales)][:1]  # all are in one piece
        table = _table(here.groups, groups).reshape(-1, FIELDS)
        addresses = np.zeros_like(table)
        addresses[:, ADDRESSES] = table[:, ADDRESSES] != 0
        for row, scales in zip(table, scales_of, strict=True):
            row[SCALES] = scales.data_ptr() if len(scales) else 0
        self._table, self._is_address = table - addresses * like.memory.data_ptr(), addresses

    def table_at(self, memory: Tensor) -> np.ndarray:
        """That of one with this memory, int64 `[groups, FIELDS]`."""
        moved: np.ndarray = self._table + self._is_address * memory.data_ptr()
        return moved

    def adapter_at(self, memory: Tensor) -> ServedAdapter:
        """The one with this memory on the device."""
        return ServedAdapter(self, memory, to_device(torch.from_numpy(self.table_at(memory)), self._device))

    def args_at(self, memory: Tensor) -> KernelArgs:
        return KernelArgs(on_device(self._like, memory, self._device), self._groups, self._device)


def staged(adapter: Adapter, dtype: torch.dtype, *, pinned: bool) -> StagedAdapter:
    """A copy in host memory and this dtype."""
    assert adapter.residual is None
    weights = _in_order(adapter)
    memory = torch.empty(sum(weight.numel() for weight in weights), dtype=dtype, pin_memory=pinned)
    copy = StagedAdapter(adapter.scale, *_views(adapter, memory), magnitude=adapter.magnitude, memory=memory)
    copy.norm.update(adapter.norm)
    for part, weight in zip(_in_order(copy), weights, strict=True):
        part.copy_(weight)
    return copy


def on_device(adapter: Adapter, memory: Tensor, device: torch.device) -> Adapter:
    """An adapter with this memory where the base computes, as `KernelArgs` wants it; without norms."""
    a, b = _views(adapter, memory.to(device, non_blocking=True))
    magnitude = {name: m.to(device) for name, m in adapter.magnitude.items()}
    return Adapter(adapter.scale, a, b, cast={name: (a[name], b[name]) for name in a}, magnitude=magnitude)


def _in_order(adapter: Adapter) -> list[Tensor]:
    return [weight.detach() for weight in (*adapter.a.values(), *(b.t() for b in adapter.b.values()))]


def _views(like: Adapter, memory: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The A and B of one of these shapes in this memory."""
    weights = _in_order(like)
    parts = memory.split([weight.numel() for weight in weights])
    views = iter([part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)])
    return {name: next(views) for name in like.a}, {name: next(views).t() for name in like.b}


def _on_meta(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their shapes."""
    return {name: weight.detach().to("meta") for name, weight in weights.items()}


def _table(adapters: Sequence[FusedLinearAdapter | None], groups: Sequence[LinearGroup]) -> np.ndarray:
    """int64 `[groups * FIELDS]` of one adapter's parts."""
    from lora_core.kernels.low_rank_triton import table_row

    rows = [table_row(adapter, group) for adapter, group in zip(adapters, groups, strict=True)]
    return np.array(rows, dtype=np.int64).reshape(-1)


def _magnitudes(adapter: Adapter, groups: Sequence[LinearGroup]) -> dict[str, Magnitude]:
    """With room for norms and scales in one piece."""
    here = {name: m for group in groups for name in group.names if (m := adapter.magnitude.get(name)) is not None}
    if not here:
        return {}
    sizes = [len(m) for m in here.values()]
    joined = next(iter(here.values())).new_empty(2, sum(sizes), requires_grad=False)
    parts = zip(here.items(), *(row.split(sizes) for row in joined), strict=True)
    return {name: Magnitude(m.detach(), _gradient(m), norm, scale) for (name, m), norm, scale in parts}


def _scales(adapter: Adapter, groups: Sequence[LinearGroup], device: torch.device) -> Sequence[Tensor]:
    """The scale of each rank on each group, in one piece on the device."""
    ranks = [[(adapter.scale[n], len(adapter.a[n])) for n in group.names if n in adapter.a] for group in groups]
    values = [[scale for scale, rank in of_group for _ in range(rank)] for of_group in ranks]
    wide = torch.promote_types(next(iter(adapter.a.values())).dtype, torch.float32)
    joined = torch.tensor([scale for of_group in values for scale in of_group], dtype=wide).to(device)
    parts: Sequence[Tensor] = joined.split([len(of_group) for of_group in values])
    return parts


def _fused_linear_adapter(
    adapter: Adapter, group: LinearGroup, scales: Tensor, magnitudes: Mapping[str, Magnitude]
) -> FusedLinearAdapter | None:
    """None where the adapter has nothing on this group."""
    present = [name for name in group.names if name in adapter.a]
    if not present:
        return None
    assert adapter.cast is not None
    a = _stacked([adapter.cast[name][0] for name in present])
    gradients = [_gradient(adapter.a[name]) for name in present]
    a_gradient = _stacked(gradients) if gradients[0].numel() else gradients[0]
    parts: list[LinearAdapter | None] = []
    offset = 0
    for name in group.names:
        if name not in adapter.a:
            parts.append(None)
            continue
        b, gradient, key = adapter.cast[name][1], _gradient(adapter.b[name]), adapter.module_keys[name]
        parts.append(LinearAdapter(b, gradient, offset, key, magnitudes.get(name)))
        offset += adapter.a[name].shape[0]
    return FusedLinearAdapter(a, a_gradient, scales, tuple(parts), adapter.dropout)


def _gradient(weight: Tensor) -> Tensor:
    return weight.new_empty(0) if weight.grad is None else weight.grad


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """`[sum of r, in]` over matrices that lie end to end in memory: a view of all of them."""
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        assert part.data_ptr() == end and part.is_contiguous(), "the A of a group lie end to end"
        end += part.nbytes
    return first.as_strided((sum(part.shape[0] for part in parts), first.shape[1]), (first.shape[1], 1))


def stacked_tables(adapters: Sequence[KernelArgs], groups: int, device: torch.device) -> Tensor:
    """int64 `[adapters + 1, groups * FIELDS]`; the last row is that of no adapter."""
    from lora_core.kernels.low_rank_triton import FIELDS

    tables = [adapter.table for adapter in adapters if adapter.table is not None]
    none = torch.zeros(groups * FIELDS, dtype=torch.int64, device=device)
    return torch.stack([*tables, none])
