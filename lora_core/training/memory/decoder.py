"""Memory of one micro-batch through the written-out decoder, from shapes alone.

`_Pass` is `llama/decoder.py` once more, name by name, with a `Held` for every tensor. It counts for as long as somebody
refers to it, as a tensor does: what Python frees there, it frees here. What kernels take for themselves is in
`kernels.py` here. With T rows in bf16, the 8B shape of Llama keeps of each layer

    x, middle                   2 T 4,096 each           full: x alone
    qkv, attended               2 T 6,144, 2 T 4,096
    gate_up                     2 T 28,672               selective: without it
    h of four groups            2 T x the sum of ranks, rounded up to 16, each
    q and k before their norm   not in Llama; in the 8B shape of Qwen3 2 T 5,120
    with DoRA on o and down     what they add to x: 2 T 4,096 each; full: that of down alone

and takes the most at the head (a slice of logits), or in the first layer that goes backward (attention's fp32 sums).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_core.kernels.operands import NF4_BLOCK, LinearGroup
from lora_core.models.llama.decoder import Checkpointing, Decoder, rounded_width
from lora_core.models.llama.head import CPU_HEAD_ROWS, HEAD_ROWS
from lora_core.models.llama.weights import DOWN, GATE_UP, QKV, O
from lora_core.models.precision import quantised_layers
from lora_core.training.memory.footprint import Footprint, Footprints
from lora_core.training.memory.kernels import Held, Ledger, TorchKernels, TritonKernels

CUBLAS_WORKSPACES = 2 * 2**25
"""32 MiB each of cuBLAS and cuBLASLt on Hopper, which torch takes from its allocator."""


def linear_bytes(groups: Sequence[LinearGroup], itemsize: int, quantised: str | None) -> int:
    """Of the layers' linears: dense, or in fp8 (W and its transpose, a scale for each row of both) or nf4."""
    total, in_few_bits = 0, quantised_layers(len(groups) // 4, quantised) if quantised else range(0)
    for group in groups:
        rows, columns = sum(group.outputs), group.inputs
        if group.index // 4 not in in_few_bits:
            total += rows * columns * itemsize
        elif quantised == "fp8":
            total += 2 * rows * columns + 4 * (rows + columns)
        else:
            total += rows * columns // 2 + 4 * rows * columns // NF4_BLOCK
    return total


@dataclass
class DecoderActivations:
    """Of the written-out decoder on `device`, whose linears may be `quantised`; the model is on the meta device."""

    footprints: Footprints
    device: str
    quantised: str | None = None
    _known: dict[Footprint, tuple[list[int], list[int], list[bool]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.decoder = Decoder(self.footprints.model)
        places = {name: place for place, name in enumerate(self.footprints.modules)}
        self._places = [[places[name] for name in group.names] for group in self.decoder.groups]

    def peak_bytes(self, kinds: Sequence[Footprint], tokens: int, longest: int, checkpointing: Checkpointing) -> int:
        """While `tokens`, all of them supervised, go forward and backward."""
        libraries = CUBLAS_WORKSPACES if self.device == "cuda" else 0
        return self.trace(kinds, tokens, longest, checkpointing).peak + libraries

    def trace(self, kinds: Sequence[Footprint], tokens: int, longest: int, checkpointing: Checkpointing) -> Ledger:
        """The whole pass, counted."""
        sums, ranks, doras = zip(*map(self._of_groups, kinds), strict=True)
        widths = [rounded_width(of_group) for of_group in zip(*sums, strict=True)]
        largest = [max(of_group) for of_group in zip(*ranks, strict=True)]
        dora = [any(of_group) for of_group in zip(*doras, strict=True)]
        kind = TritonKernels if self.device == "cuda" else TorchKernels
        head_rows = HEAD_ROWS if self.device == "cuda" else CPU_HEAD_ROWS
        kernels = kind(Ledger(), self.footprints.model.dtype.itemsize, tokens, min(longest, tokens), self.quantised)
        _Pass(self.decoder, kernels, widths, largest, dora, head_rows).forward_backward(checkpointing)
        return kernels.ledger

    def _of_groups(self, footprint: Footprint) -> tuple[list[int], list[int], list[bool]]:
        """The sum and the largest of the ranks in every group, 0 where none is adapted, and whether it has DoRA."""
        if footprint not in self._known:
            groups = [[footprint.ranks[place] for place in group] for group in self._places]
            dora = [footprint.dora and any(ranks) for ranks in groups]
            self._known[footprint] = [sum(ranks) for ranks in groups], [max(ranks) for ranks in groups], dora
        return self._known[footprint]


@dataclass
class _Kept:
    """`decoder._SavedTensors`; `rest` is what is only kept here: both rstd, h, and what the backward passes of rope and
    attention refer to.
    """

    o: Held | None
    middle: Held
    gate_up: Held | None
    rest: list[object]


@dataclass
class _Saved:
    x: Held
    down: Held | None
    kept: _Kept | None = None


class _Pass:
    """`Decoder.forward_backward` and its `Batch`."""

    def __init__(
        self,
        decoder: Decoder,
        kernels: TritonKernels,
        widths: Sequence[int],
        ranks: Sequence[int],
        dora: Sequence[bool],
        head_rows: int,
    ) -> None:
        self._head_rows = head_rows
        self._kernels, self._widths, self._ranks, self._dora = kernels, widths, ranks, dora
        self._groups, self._layers = decoder.groups, len(decoder.layers)
        self._vocabulary, self._hidden = decoder.head.shape
        self._heads = decoder.heads, decoder.kv_heads, decoder.head_size
        self._head_norm = decoder.layers[0].head_norm is not None
        # ids, positions, dropout keys, labels and their rows, all int64; cos and sin of half a head each.
        self._batch = [kernels.rows(5, 8), kernels.rows(decoder.head_size)]

    def forward_backward(self, checkpointing: Checkpointing) -> None:
        kernels = self._kernels
        for group, dora, width in zip(self._groups, self._dora, self._widths, strict=True):
            if dora:
                kernels.refresh_dora_scales(group.inputs, group.outputs, width)
        x, pending, saved = kernels.rows(self._hidden), None, []
        for place in range(self._layers):
            layer, x, pending = self.forward(place, x, pending, checkpointing)
            saved.append(layer)
        x, *normed_and_rstd = kernels.norm_forward(x, pending and pending[0], self._hidden, dora=self._dora[-1])
        kernels.ledger.saved = kernels.ledger.live
        dn = self._head_losses()
        gradient: tuple[Held, Held | None] | None
        gradient = kernels.norm_backward(self._hidden, self._shrunk_at_once(self._layers - 1, DOWN))
        for place in reversed(range(self._layers)):
            assert gradient is not None
            gradient = self.backward(place, saved.pop(), *gradient)
        del x, normed_and_rstd, pending, dn  # they were there all the time

    def _head_losses(self) -> Held:
        """Logits by slices, each of which becomes its own gradient; their memory stays to the end."""
        kernels = self._kernels
        picked, dpicked = kernels.rows(self._hidden), kernels.rows(self._hidden)
        losses = kernels.rows(1, 4)
        slice_rows = min(self._head_rows, kernels.tokens)
        memory = Held(kernels.ledger, slice_rows * self._vocabulary * kernels.itemsize)
        kernels.cross_entropy(slice_rows, self._vocabulary)
        dn = kernels.rows(self._hidden)
        del picked, dpicked, losses, memory
        return dn

    def forward(
        self, place: int, x: Held, pending: tuple[Held, Held | None] | None, checkpointing: Checkpointing
    ) -> tuple[_Saved, Held, tuple[Held, Held | None]]:
        added = pending and pending[0]
        x, normed, rstd = self._kernels.norm_forward(x, added, self._hidden, dora=self._has_dora(place - 1, DOWN))
        kept, h_down, activation = self._activation(place, rstd, with_backward=checkpointing != "full")
        if checkpointing == "selective":
            kept.gate_up = None
        down = self._product(DOWN)
        down_kept = down if self._has_dora(place, DOWN) else None
        saved = _Saved(x, down_kept, None if checkpointing == "full" else kept)
        del activation, normed, added  # not before: the function's end is what frees them
        return saved, kept.middle, (down, h_down)

    def _activation(self, place: int, rstd: Held, with_backward: bool) -> tuple[_Kept, Held | None, Held]:
        kernels, h = self._kernels, []

        def product(kind: int) -> Held:
            h.append(kernels.shrink(self._width(place, kind)))
            return self._product(kind)

        qkv = product(QKV)
        unnormed = kernels.rope_forward(self._turned, normed=self._head_norm, with_backward=with_backward)
        attended, for_backward = kernels.attention(*self._heads, with_backward=with_backward)
        o, dora = product(O), self._has_dora(place, O)
        middle, middle_normed, middle_rstd = kernels.norm_forward(qkv, o, self._hidden, dora=dora)
        gate_up = product(GATE_UP)
        activation, h_down = kernels.swiglu_forward(self._groups[DOWN].inputs, self._width(place, DOWN))
        h.append(h_down)
        rest = [rstd, middle_rstd, h, qkv, unnormed, attended, for_backward]
        kept = _Kept(o if dora else None, middle, gate_up, rest)
        del middle_normed, o  # not before: the function's end is what frees them
        return kept, h_down, activation

    def backward(self, place: int, saved: _Saved, dx: Held, dh: Held | None) -> tuple[Held, Held | None] | None:
        kernels, kept = self._kernels, saved.kept
        if kept is None:
            _, normed, rstd = kernels.norm_forward(saved.x, None, self._hidden)
            kept = self._activation(place, rstd, with_backward=True)[0]
            del normed

        def of_product(kind: int, dh: Held | None, y: Held | None) -> tuple[Held | None, Held | None]:
            if y is None:
                return None, dh
            return kernels.dora_backward(self._hidden), kernels.shrink(self._width(place, kind))

        ddown, dh = of_product(DOWN, dh, saved.down)
        gate_up = kept.gate_up
        if gate_up is None:
            kernels.norm_again(self._hidden)
            normed = kernels.rows(self._hidden)
            gate_up = self._product(GATE_UP)
            del normed
        activation = self._input_gradient(DOWN)
        columns, width, rank = self._groups[DOWN].inputs, self._width(place, GATE_UP), self._rank(place, GATE_UP)
        gate_up_dh, products = kernels.swiglu_backward(columns, width, rank, dora=self._has_dora(place, GATE_UP))
        del activation, ddown

        dh = gate_up_dh
        kernels.add_a_gradients_of_norm(self._hidden)
        dn = self._input_gradient(GATE_UP)
        del gate_up
        dmiddle, dh = kernels.norm_backward(self._hidden, self._shrunk_at_once(place, O))

        do, dh = of_product(O, dh, kept.o)
        dattended = self._input_gradient(O)
        del do
        gradients = kernels.attention_backward(*self._heads)
        columns = sum(self._groups[QKV].outputs)
        dqkv, products = kernels.rope_backward(
            columns,
            self._turned,
            columns // self._heads[2],
            normed=self._head_norm,
            dora=self._has_dora(place, QKV),
        )
        del gradients
        dh = kernels.shrink(self._width(place, QKV))
        kernels.add_a_gradients_of_norm(self._hidden)
        if place == 0:
            return None
        dn = self._input_gradient(QKV)
        before = kernels.norm_backward(self._hidden, self._shrunk_at_once(place - 1, DOWN))
        del dh, gate_up_dh, dattended, dqkv, dn, dmiddle, products  # not before: the function's end is what frees them
        return before

    def _product(self, kind: int) -> Held:
        group = self._groups[kind]
        return self._kernels.product(group.inputs, group.outputs)

    def _input_gradient(self, kind: int) -> Held:
        group = self._groups[kind]
        return self._kernels.input_gradient(group.inputs, group.outputs)

    @property
    def _turned(self) -> int:
        """Columns of q and k."""
        heads, kv_heads, size = self._heads
        return (heads + kv_heads) * size

    def _has_dora(self, place: int, kind: int) -> bool:
        return place >= 0 and self._dora[4 * place + kind]

    def _shrunk_at_once(self, place: int, kind: int) -> int:
        """Columns of h that the norm's backward pass makes; DoRA needs its scales first."""
        return 0 if self._has_dora(place, kind) else self._width(place, kind)

    def _width(self, place: int, kind: int) -> int:
        return self._widths[4 * place + kind]

    def _rank(self, place: int, kind: int) -> int:
        return self._ranks[4 * place + kind]
