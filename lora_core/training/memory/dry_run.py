"""Memory of one micro-batch, from a run of the very code without numbers.

It goes forward and backward on the meta device, where tensors have shapes alone, as if that were the device to train
on: a meter counts the bytes of every storage from its first tensor to its last. It is done for the tokens that fill a
slice of the head, for twice as many, and for the most that a micro-batch takes: the peak is the highest of moments that
each grow evenly, so it is nowhere above the lines between. Whatever a family, an option, a kernel or checkpointing
changes is counted here rather than known.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_core.config import TrainConfig
from lora_core.data.dataset import Example
from lora_core.data.packing import Chunk, pack
from lora_core.kernels.dispatch import meta_stands_for
from lora_core.models.attention import SHORT_DOCUMENT
from lora_core.models.attention_cpu import KEPT_LENGTH
from lora_core.models.base import BaseModel
from lora_core.models.forward import Forward, ForwardPath
from lora_core.models.hooks.forward import HooksForward
from lora_core.models.hooks.loss import SLICE_ROWS
from lora_core.models.llama.decoder import Checkpointing, Decoder
from lora_core.models.llama.forward import LlamaBatch, LlamaForward
from lora_core.models.llama.head import CPU_HEAD_ROWS, HEAD_ROWS
from lora_core.models.precision import DenseWeight, Fp8Weight, FrozenWeight, Nf4Weight, quantised_layers
from lora_core.training.memory.adapter_shape import META, AdapterShape, AdapterShapes
from lora_core.training.optimizer import FlatAdamW, HostState

CUBLAS_WORKSPACES = 2 * 2**25
"""32 MiB each of cuBLAS and cuBLASLt on Hopper, which torch takes from its allocator."""

FEW_LAYERS = 3
"""The first one's backward pass ends early, and the last one's begins at the head: one like all others lies between."""


def _chunk(length: int, documents: int) -> Chunk:
    example = Example([0] * length, [False] + [True] * (length - 1))
    return Chunk("", ((0, example),) * documents, None)


TINY_CHUNK = _chunk(2, 1)


class Bounds(NamedTuple):
    """Bytes at most before the first layer; from there on without tokens and of each token, the highest of lines."""

    floor: int
    lines: list[tuple[float, float]]


@dataclass
class Activations:
    """What a micro-batch takes beside weights and adapters, through one path of a model on the meta device as if that
    were `device`; `frozen` are the linears of the llama path (`frozen_weights`). Any threads may ask at once.
    """

    shapes: AdapterShapes
    path: ForwardPath
    device: str
    frozen: Sequence[FrozenWeight]
    largest: int  # tokens of a micro-batch
    _known: dict[Any, Bounds] = field(default_factory=dict)

    def peak_bytes(self, kinds: Sequence[AdapterShape], tokens: int, longest: int, checkpointing: Checkpointing) -> int:
        """At most, while `tokens` of any of these adapters, in documents up to `longest`, go forward and backward. Its
        dry runs are remembered for adapters that come to the same.
        """
        key = AdapterShape.widest(kinds), self._document(longest), checkpointing
        if key not in self._known:
            self._known[key] = self._bounds(*key)
        floor, lines = self._known[key]
        peak = max(floor, *(int(constant + slope * tokens) for constant, slope in lines))
        return peak + self._masks(tokens, longest) + self._scratch()

    def _document(self, longest: int) -> int:
        """Tokens of a document for which attention takes the most; where it is fused they are all the same to it."""
        config, in_bf16 = self.shapes.model.config, self.shapes.model.dtype == torch.bfloat16
        if getattr(config, "attn_logit_softcapping", None) is not None:
            return longest
        if self.path == "llama" and self.device == "cpu":
            return min(longest, KEPT_LENGTH)
        if self.path == "llama":
            return SLICE_ROWS if in_bf16 else longest
        if self.device == "cpu" and in_bf16:
            return min(longest, SHORT_DOCUMENT)
        return min(SLICE_ROWS, getattr(config, "sliding_window", None) or SLICE_ROWS)  # what `_masks` counts stays out

    def _masks(self, tokens: int, longest: int) -> int:
        """Of documents longer than a sliding window, one each, as all may be of other lengths; layers share them."""
        window = getattr(self.shapes.model.config, "sliding_window", None)
        if self.path == "llama" or window is None or longest <= window:
            return 0
        return -(-tokens // longest) * longest**2 * self.shapes.model.dtype.itemsize

    def _scratch(self) -> int:
        """What libraries take outside of tensors. oneDNN lays a weight out anew for a bf16 product of hooks, once
        forward and once backward; the head's is the largest.
        """
        weight = self.shapes.model.get_output_embeddings().weight
        if self.path == "llama":
            return CUBLAS_WORKSPACES if self.device == "cuda" else 0
        return 2 * weight.nbytes if self.device == "cpu" and weight.dtype == torch.bfloat16 else 0

    def _bounds(self, shape: AdapterShape, document: int, checkpointing: Checkpointing) -> Bounds:
        # Whole documents, and at least a whole slice of logits: with less, their rows would count as every token's.
        head_rows = SLICE_ROWS if self.path == "hooks" else HEAD_ROWS if self.device == "cuda" else CPU_HEAD_ROWS
        few = -(-head_rows // document) * document
        many = max(3 * few, -(-self.largest // document) * document)
        sizes = few, 2 * few, many
        floors, peaks = zip(*(self.peaks(shape, size, document, checkpointing) for size in sizes), strict=True)
        lines = []
        for (less, low), (more, high) in pairwise(zip(sizes, peaks, strict=True)):
            slope = (high - low) / (more - less)
            lines.append((low - slope * (less + TINY_CHUNK.padded_tokens), slope))
        return Bounds(max(floors), lines)

    def peaks(self, shape: AdapterShape, tokens: int, document: int, checkpointing: Checkpointing) -> tuple[int, int]:
        """Those of `dry_run` with all layers. Where those of the llama path are alike, each takes as much as the last
        one of a few.
        """
        layers = len(self.frozen) // 4
        run = partial(self.dry_run, shape, tokens, document, checkpointing)
        if layers <= FEW_LAYERS or not self.shapes.layers_are_alike(shape):
            return run()
        pairs = zip(run(FEW_LAYERS), run(FEW_LAYERS - 1), strict=True)
        before, peak = (of_few + (layers - FEW_LAYERS) * (of_few - of_one_less) for of_few, of_one_less in pairs)
        return before, peak

    def dry_run(
        self,
        shape: AdapterShape,
        tokens: int,
        document: int,
        checkpointing: Checkpointing,
        layers: int | None = None,
    ) -> tuple[int, int]:
        """The peak while a micro-batch is made ready, with all that DoRA's norms take; and its own: of a chunk of whole
        documents beside a tiny one, as activations take more where there are several (one job may have them, too). On
        the llama path with the first `layers` alone.
        """
        with meta_stands_for(self.device):
            forward = self._forward(layers)
            dtype = self.shapes.model.dtype
            start = HostState(self.shapes.adapter(shape, layers), dtype)
            adapter = FlatAdamW(start, TrainConfig(), META, dtype).adapter
            bound = forward.bind(adapter)
            with Meter() as meter:
                batch = pack([_chunk(document, tokens // document), TINY_CHUNK], META)
                keys = [chunk.positions if adapter.dropout else None for chunk in batch.chunks]
                ready = forward.ready(batch, [bound, bound], keys)
                if isinstance(ready, LlamaBatch):
                    ready.batch.refresh_dora_scales()
                before, meter.peak = meter.peak, meter.live
                forward.forward_backward(ready, checkpointing)
            forward.close()
        return before, meter.peak

    def _forward(self, layers: int | None) -> Forward:
        """One for each run: hooks hang on the model, and a decoder remembers what it found of its weights."""
        model, middle = self.shapes.model, len(self.frozen) // 8
        if self.path == "llama":
            weights = cycle(self.frozen[4 * middle : 4 * middle + 4])
            decoder = Decoder(model, lambda _: next(weights))
            if layers is not None:
                del decoder.layers[layers:], decoder.groups[4 * layers :]
            return LlamaForward(decoder, self.shapes.adaptable, precision="")
        return HooksForward(BaseModel(copy.deepcopy(model), PreTrainedTokenizerBase(), "", "", "", META))


def frozen_weights(model: PreTrainedModel, device: str, quantised: str | None) -> list[FrozenWeight]:
    """The linears of a decoder on `device`, group by group, as `models/base.py` makes them from a model on the meta
    device. Those that are quantised alike are one: it takes long.
    """
    known: dict[tuple[int, int], FrozenWeight] = {}

    def of_few_bits(parts: Sequence[Tensor]) -> FrozenWeight:
        shape = sum(len(part) for part in parts), parts[0].shape[1]
        if shape not in known:
            stacked = parts[0].new_empty(shape)
            known[shape] = Fp8Weight(stacked) if quantised == "fp8" else Nf4Weight(stacked)
        return known[shape]

    def dense(parts: Sequence[Tensor]) -> FrozenWeight:
        return DenseWeight([torch.cat(list(parts))] if quantised or device == "cuda" else parts)

    stacks = Decoder.stacks(model)
    in_few_bits = quantised_layers(len(stacks), quantised) if quantised else ()
    return [
        of_few_bits(parts) if place in in_few_bits else dense(parts)
        for place, groups in enumerate(stacks)
        for parts in groups
    ]


class Meter(TorchDispatchMode):
    """Bytes of the storages that come to be within it: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result, given = operation(*args, **kwargs), (*args, *kwargs.values())
        for storage in _storages(result):
            if (key := storage._cdata) in self._seen or any(key == of_given._cdata for of_given in _storages(given)):
                continue  # memory that was there
            self._seen.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, storage.nbytes())
        return result

    def _forget(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.live -= nbytes


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Of a tensor, or of those in what an operation takes or returns."""
    if isinstance(values, Tensor):
        yield values.untyped_storage()
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _storages(value)
