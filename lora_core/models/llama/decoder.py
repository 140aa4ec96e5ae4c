"""A decoder of the Llama family with many adapters on it, its forward and backward passes written out.

    for layer in layers:                                        saved for the backward pass
        x  += down-projection of the layer before               x
        qkv = frozen(norm(x)) + h B^T, rotated by positions     qkv, h
              (Qwen3: each head of q and k is normed before)    q and k before that
        x  += output projection of attention(q, k, v)           attention, h, x
        act = silu(gate) * up  of  frozen(norm(x)) + h B^T      gate and up, h
    losses = cross entropy of the head's logits, slice by slice

With DoRA in a batch, `frozen(n) + h B^T` is multiplied by its rows' DoRA scales, and what the projections add
to x is saved, too, for the gradients of their magnitudes (`kernels/dora.py`).

There is no autograd in it but for attention: what is saved, what is recomputed and where memory is reused is on this
page, and the same on each step, so that the peak is known before a base is loaded. Linears that share an input
are one frozen product and one low-rank one. Rows of different adapters meet only in frozen products, whose rows do not
touch; every sum over tokens runs over one adapter's own (`kernels/low_rank.py`).

Only the weights come from transformers: this file computes what its Llama, Mistral, Qwen2 and Qwen3 do
(https://github.com/huggingface/transformers), and `BaseModel` compares the two when a base is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.kernels import dispatch
from lora_core.kernels.dora import dora_backward
from lora_core.kernels.layer_ops import (
    norm_backward,
    norm_forward,
    recomputed_gate_up,
    rope_backward,
    rope_forward_,
    swiglu_backward_,
    swiglu_forward,
)
from lora_core.kernels.low_rank import add_b_gradients, shrink_gradient
from lora_core.kernels.masked_low_rank import add_a_gradients, expand_gradient_, shrink
from lora_core.kernels.operands import LowRank, Norm, Rope, Segments, ServedSegments
from lora_core.kernels.transfer import to_device
from lora_core.models.attention import Backward, LayerAttention
from lora_core.models.llama.adapters import KernelArgs, stacked_tables
from lora_core.models.llama.head import Labels, head_losses
from lora_core.models.llama.stacks import StacksByGroup
from lora_core.models.llama.weights import DOWN, GATE_UP, QKV, DecoderWeights, Layer, O
from lora_core.models.precision import FrozenWeight

Checkpointing = Literal["none", "selective", "full"]
"""What the backward pass recomputes: the norms alone, gate and up as well, or the whole layer."""

Pending = tuple[Tensor, Tensor | None, LowRank]
"""A frozen product, its h, and the adapters to go with it: added to x by the norm that comes next."""

Gradient = tuple[Tensor, Tensor | None]
"""Of what a layer returns, `[T, H]`, and its shrink for the down-projection that ends the layer."""


@dataclass(frozen=True)
class DecoderInput:
    """Tokens end to end: ids and positions int64 `[T]`, and segments of them as (index of their adapter or
    `NO_ADAPTER`, tokens).

    `dropout_keys` int64 `[T]`, of the tokens whose adapters have dropout, as `Segment` has them (of others, any
    numbers); None outside training, and where no adapter has dropout.
    """

    ids: Tensor
    positions: Tensor
    segments: Sequence[tuple[int, int]]
    dropout_keys: Tensor | None = None


@dataclass
class _SavedLayer:
    """What the backward pass of one layer needs; of a layer that is recomputed, x alone. With DoRA on the
    down-projection also what that adds to x.
    """

    x: Tensor
    down: Tensor | None
    tensors: _SavedTensors | None = None


@dataclass
class _SavedTensors:
    rstd: Tensor
    h: list[Tensor | None]
    qkv: Tensor
    unnormed: Tensor | None
    attended: Tensor
    attention_backward: Backward
    o: Tensor | None
    middle: Tensor
    middle_rstd: Tensor
    gate_up: Tensor | None


def rounded_width(widths: Iterable[int]) -> int:
    """Columns of h for adapters of these widths: a multiple of 16, as Triton compiles once more for other numbers."""
    return -(-max(widths) // 16) * 16


class Decoder(DecoderWeights):
    """A base with its passes over many adapters."""

    def kernel_args(self, adapter: Adapter) -> KernelArgs:
        """The adapter as `forward_backward` takes it; it follows every change of the weights."""
        return KernelArgs(adapter, self.groups, self.embedding.device)

    @torch.no_grad()
    def batch(
        self,
        inputs: DecoderInput,
        adapters: Sequence[KernelArgs],
        attention: LayerAttention,
        serving: bool = False,
        stacks: StacksByGroup | None = None,
    ) -> DecoderBatch:
        """What the passes take, with all of it on the device: it can be made while another one is computed. One that is
        `serving` never goes backward; on CPU `stacks` are its adapters.
        """
        return DecoderBatch(self, inputs, adapters, attention, serving, stacks)

    @property
    def scaling(self) -> float:
        """What attention multiplies q k^T with."""
        return float(self.head_size**-0.5)

    @torch.no_grad()
    def forward_backward(
        self,
        batch: DecoderBatch,
        labels: Labels,
        checkpointing: Checkpointing = "none",
        weights: Tensor | None = None,
    ) -> Tensor:
        """Add the gradients of every adapter, those of each chunk times its weight where there are `weights`; returns
        the summed token loss of each chunk of `labels`.
        """
        batch.refresh_dora_scales()
        x, pending, saved = F.embedding(batch.ids, self.embedding), None, []
        for index in range(len(self.layers)):
            layer, x, pending = batch.forward(index, x, pending, checkpointing)
            saved.append(layer)
        x, normed, rstd = batch.add_and_norm(x, pending, self.final_norm)
        losses, _, dn = head_losses(self.head, normed, labels, with_gradient=True, weights=weights)
        assert dn is not None
        below = batch.low_rank(len(self.groups) - 1)
        gradient: Gradient | None = norm_backward(
            dn, None, batch.low_rank(0), x, rstd, self.final_norm, None, None, below
        )
        for index in reversed(range(len(self.layers))):
            assert gradient is not None
            gradient = batch.backward(index, saved.pop(), *gradient)
        return losses

    @torch.no_grad()
    def evaluate(self, batch: DecoderBatch, labels: Labels) -> tuple[Tensor, Tensor]:
        """(summed token loss, number of labels that have the largest logit) of each chunk of `labels`."""
        losses, correct, _ = head_losses(self.head, self.hidden(batch), labels, with_gradient=False)
        return losses, correct

    @torch.no_grad()
    def hidden(self, batch: DecoderBatch) -> Tensor:
        """Last hidden states `[T, H]`, normed."""
        batch.refresh_dora_scales()
        x, pending = F.embedding(batch.ids, self.embedding), None
        for index in range(len(self.layers)):
            _, x, pending = batch.forward(index, x, pending, "full")
        return batch.add_and_norm(x, pending, self.final_norm)[1]


class DecoderBatch:
    """The layers on one batch."""

    def __init__(
        self,
        decoder: Decoder,
        inputs: DecoderInput,
        adapters: Sequence[KernelArgs],
        attention: LayerAttention,
        serving: bool,
        stacks: StacksByGroup | None,
    ) -> None:
        self._decoder, self._adapters, self._attention, self._serving = decoder, adapters, attention, serving
        self.ids, device = inputs.ids, inputs.ids.device
        self._segments = (ServedSegments if serving else Segments)(inputs.segments, device)
        self._stacks = stacks
        on_gpu = dispatch.device_type(device) == "cuda"
        if on_gpu and adapters:  # made here, and not between the first kernels
            _ = self._segments.tiles, self._segments.narrow_tiles, self._segments.spans
        self._dropout_keys = inputs.dropout_keys
        self._table = stacked_tables(adapters, len(decoder.groups), device) if on_gpu else None
        self._widths = [rounded_width(widths) for widths in zip(*(a.widths for a in adapters), strict=True)]
        self._ranks = [max(ranks) for ranks in zip(*(a.ranks for a in adapters), strict=True)]
        self._dora = [any(dora) for dora in zip(*(a.dora for a in adapters), strict=True)]
        cos, sin = decoder.rotary(decoder.embedding[:1], inputs.positions[None])
        half = decoder.head_size // 2
        self._cos, self._sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        self._low_ranks: dict[int, LowRank] = {}

    def low_rank(self, index: int) -> LowRank:
        """The adapters on group `index`."""
        if index not in self._low_ranks:
            self._low_ranks[index] = self._low_rank(index)
        return self._low_ranks[index]

    def _low_rank(self, index: int) -> LowRank:
        group = self._decoder.groups[index]
        adapters = [adapter.groups[index] for adapter in self._adapters]
        width, rank, dora = (self._widths[index], self._ranks[index], self._dora[index]) if adapters else (0, 0, False)
        drops = any(adapter is not None and adapter.dropout > 0 for adapter in adapters)
        keys = self._dropout_keys if drops else None
        stacks = None if self._stacks is None else self._stacks[index]
        width = width if stacks is None or stacks else 0
        return LowRank(group, adapters, self._segments, width, rank, self._table, keys, dora, stacks)

    def refresh_dora_scales(self) -> None:
        """DoRA's norms change with A and B, and so with each optimizer step; until the next they are what they are."""
        dirty = {index: adapter for index, adapter in enumerate(self._adapters) if adapter.dirty}
        if dirty and dispatch.runs_in_triton(self._decoder.embedding):
            self._refresh_in_triton(dirty)
        else:
            for adapter in dirty.values():
                adapter.refresh(self._decoder.row_norms)
        for adapter in dirty.values():
            adapter.mark_fresh()

    def _refresh_in_triton(self, dirty: Mapping[int, KernelArgs]) -> None:
        from lora_core.kernels.dora_triton import rows_in_stack, update_dora_scales

        decoder = self._decoder
        groups = [group for group in decoder.groups if any(args.dora[group.index] for args in dirty.values())]
        low_ranks = [self.low_rank(group.index) for group in groups]
        starts = torch.tensor([rows_in_stack(low_rank.adapters, dirty) for low_rank in low_ranks], dtype=torch.int32)
        for group, low_rank, row_offsets in zip(groups, low_ranks, to_device(starts, self.ids.device), strict=True):
            weights = decoder.weights_of(group)
            named = zip(group.names, weights, strict=True)
            squares = [decoder.row_norms.squares(name, torch.float32, weight) for name, weight in named]
            update_dora_scales(weights, squares, low_rank, dirty, row_offsets)

    def add_and_norm(self, x: Tensor, pending: Pending | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x + pending, its norm, its reciprocal root mean squares)."""
        y, h, low_rank = pending or (None, None, self.low_rank(0))
        return norm_forward(x, y, h, low_rank, weight, self._decoder.eps)

    def forward(
        self, index: int, x: Tensor, pending: Pending | None, checkpointing: Checkpointing
    ) -> tuple[_SavedLayer, Tensor, Pending]:
        """One layer: (what its backward pass needs, x, what is to be added to it)."""
        layer = self._decoder.layers[index]
        x, normed, rstd = self.add_and_norm(x, pending, layer.norms[0])
        tensors, activation = self._activation(index, x, normed, rstd, with_backward=checkpointing != "full")
        if checkpointing == "selective":
            tensors.gate_up = None
        down, low_rank = self._product(layer.weights[DOWN], activation), self.low_rank(4 * index + DOWN)
        saved = _SavedLayer(x, down if low_rank.dora else None, None if checkpointing == "full" else tensors)
        return saved, tensors.middle, (down, tensors.h[DOWN], low_rank)

    def _activation(
        self, index: int, x: Tensor, normed: Tensor, rstd: Tensor, with_backward: bool
    ) -> tuple[_SavedTensors, Tensor]:
        """A layer from its normed input up to what the down-projection takes: all that its backward pass needs."""
        layer = self._decoder.layers[index]
        low_ranks = [self.low_rank(4 * index + kind) for kind in range(4)]
        h: list[Tensor | None] = []

        def product(kind: int, source: Tensor) -> Tensor:
            h.append(shrink(source, low_ranks[kind]) if low_ranks[kind].width else None)
            return self._product(layer.weights[kind], source)

        qkv, unnormed = rope_forward_(
            product(QKV, normed), h[QKV], low_ranks[QKV], self._rope(layer), with_backward=with_backward
        )
        attended, attention_backward = self._attention(index, *self._split(qkv), with_backward=with_backward)
        o = product(O, attended)
        middle, middle_normed, middle_rstd = norm_forward(x, o, h[O], low_ranks[O], layer.norms[1], self._decoder.eps)
        gate_up = product(GATE_UP, middle_normed)
        activation, h_down = swiglu_forward(gate_up, h[GATE_UP], low_ranks[GATE_UP], low_ranks[DOWN])
        h.append(h_down)
        saved_o = o if low_ranks[O].dora else None
        tensors = _SavedTensors(
            rstd, h, qkv, unnormed, attended, attention_backward, saved_o, middle, middle_rstd, gate_up
        )
        return tensors, activation

    def backward(self, index: int, saved: _SavedLayer, dx: Tensor, dh: Tensor | None) -> Gradient | None:
        """The `Gradient` of a layer's output -> of its input (None for the first), adding to the adapters'."""
        tensors, layer = saved.tensors, self._decoder.layers[index]
        if tensors is None:
            _, normed, rstd = self.add_and_norm(saved.x, None, layer.norms[0])
            tensors = self._activation(index, saved.x, normed, rstd, with_backward=True)[0]
            del normed
        low_ranks = [self.low_rank(4 * index + kind) for kind in range(4)]

        def add_gradients(kind: int, source: Tensor, dy: Tensor, dh: Tensor | None, norm: Norm | None = None) -> None:
            h = tensors.h[kind]
            if dh is not None and h is not None:
                add_a_gradients(source, dh, low_ranks[kind], norm)
                add_b_gradients(dy, h, low_ranks[kind])

        def product_gradient(kind: int, dy: Tensor, dh: Tensor | None, y: Tensor | None) -> Gradient:
            if y is None:
                return dy, dh
            dv = dora_backward(dy, y, low_ranks[kind])
            return dv, shrink_gradient(dv, low_ranks[kind])

        ddown, dh = product_gradient(DOWN, dx, dh, saved.down)
        gate_up, h = tensors.gate_up, tensors.h[GATE_UP]
        norm = Norm(tensors.middle_rstd, layer.norms[1])
        if gate_up is None:
            weight = layer.weights[GATE_UP]
            gate_up = recomputed_gate_up(weight.forward(norm.of(tensors.middle)), h, low_ranks[GATE_UP])
        activation = layer.weights[DOWN].input_gradient(ddown)
        gate_up_dh, products = swiglu_backward_(activation, dh, low_ranks[DOWN], gate_up, h, low_ranks[GATE_UP])
        add_gradients(DOWN, activation, ddown, dh)
        del activation, ddown

        dh = gate_up_dh
        add_gradients(GATE_UP, tensors.middle, gate_up, dh, norm)
        dn = layer.weights[GATE_UP].input_gradient(gate_up)
        del gate_up
        dmiddle, dh = norm_backward(
            dn, dh, low_ranks[GATE_UP], tensors.middle, norm.rstd, norm.weight, dx, products, low_ranks[O]
        )

        do, dh = product_gradient(O, dmiddle, dh, tensors.o)
        dattended = layer.weights[O].input_gradient(do)
        if dh is not None:
            expand_gradient_(dattended, dh, low_ranks[O])
        add_gradients(O, tensors.attended, do, dh)
        del do

        dqkv, products = rope_backward(
            *tensors.attention_backward(dattended), tensors.qkv, tensors.unnormed, low_ranks[QKV], self._rope(layer)
        )
        dh = shrink_gradient(dqkv, low_ranks[QKV]) if low_ranks[QKV].width else None
        norm = Norm(tensors.rstd, layer.norms[0])
        add_gradients(QKV, saved.x, dqkv, dh, norm)
        if index == 0:
            return None
        dn = layer.weights[QKV].input_gradient(dqkv)
        below = self.low_rank(4 * index - 4 + DOWN)
        return norm_backward(dn, dh, low_ranks[QKV], saved.x, norm.rstd, norm.weight, dmiddle, products, below)

    def _product(self, weight: FrozenWeight, x: Tensor) -> Tensor:
        return weight.serve(x) if self._serving else weight.forward(x)

    def _rope(self, layer: Layer) -> Rope:
        decoder = self._decoder
        rotated = decoder.heads + decoder.kv_heads
        return Rope(self._cos, self._sin, decoder.head_size, rotated, layer.bias, layer.head_norm)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[T, heads, d]` of rows that hold them side by side."""
        decoder = self._decoder
        sizes = [heads * decoder.head_size for heads in (decoder.heads, decoder.kv_heads, decoder.kv_heads)]
        q, k, v = (part.unflatten(1, (-1, decoder.head_size)) for part in qkv.split(sizes, dim=1))
        return q, k, v
