"""Memory of one micro-batch through transformers' modules with the bank's hooks, from a run without numbers.

It goes forward and backward on the meta device, where tensors have shapes alone: a meter counts the bytes of every
storage from its first tensor to its last. The fewest tokens that fill a slice of the head and the most that a
micro-batch takes are run, and the line through them is what a token costs: the peak is the highest of moments that each
grow evenly, so it is nowhere above the line in between. So whatever a family, an option or checkpointing changes is
counted here rather than known.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_core.adapters.adapter import Adapter
from lora_core.data.dataset import Example
from lora_core.data.packing import Chunk, pack
from lora_core.models.attention import SHORT_DOCUMENT, Attend, AttentionSpec, plain_attention
from lora_core.models.base import BaseModel
from lora_core.models.hooks.bank import AdapterBank, Segment
from lora_core.models.hooks.checkpointing import recomputed_layers
from lora_core.models.hooks.loss import SLICE_ROWS, batch_losses
from lora_core.models.llama.decoder import Checkpointing
from lora_core.training.memory.footprint import META, Footprint, Footprints


@dataclass
class HookActivations:
    """Of transformers' own modules with the bank's hooks, on `device`."""

    footprints: Footprints
    device: str
    largest: int  # tokens of a micro-batch
    _lines: dict[Any, tuple[float, float]] = field(default_factory=dict)

    def peak_bytes(self, kinds: Sequence[Footprint], tokens: int, longest: int, checkpointing: Checkpointing) -> int:
        """Its two dry runs, seconds long for a large base, are remembered for adapters that come to the same.

        They are done on a copy of the model, so that threads need not wait for each other's.
        """
        key = Footprint.widest(kinds), self._document(longest), checkpointing
        if key not in self._lines:
            self._lines[key] = self._line(*key)
        constant, slope = self._lines[key]
        return int(constant + slope * tokens) + self._masks(tokens, longest) + self._scratch()

    def _masks(self, tokens: int, longest: int) -> int:
        """Of documents longer than a sliding window, one each, as all may be of other lengths; layers share them."""
        window = getattr(self.footprints.model.config, "sliding_window", None)
        if window is None or longest <= window:
            return 0
        return -(-tokens // longest) * longest**2 * self.footprints.model.dtype.itemsize

    def _document(self, longest: int) -> int:
        """Tokens of a document for which attention takes the most; where it is fused they are all the same to it."""
        model = self.footprints.model
        if getattr(model.config, "attn_logit_softcapping", None) is not None:
            return longest
        return min(longest, SHORT_DOCUMENT) if self.device == "cpu" and model.dtype == torch.bfloat16 else SLICE_ROWS

    def _line(self, footprint: Footprint, document: int, checkpointing: Checkpointing) -> tuple[float, float]:
        """Bytes without tokens, and of each token."""
        # Whole documents, and at least a whole slice of logits: with less, their rows would count as every token's.
        few = -(-SLICE_ROWS // document) * document
        many = max(2 * few, -(-self.largest // document) * document)
        model, adapter = copy.deepcopy(self.footprints.model), self.footprints.adapter(footprint)
        attend = _MetaAttention(document, self.device)
        one, two = (_dry_run(model, adapter, tokens, attend, checkpointing) for tokens in (few, many))
        slope = (two - one) / (many - few)
        return one - slope * few, slope

    def _scratch(self) -> int:
        """oneDNN lays a weight out anew for a bf16 product, outside of any tensor, once forward and once backward; the
        head's is the largest.
        """
        weight = self.footprints.model.get_output_embeddings().weight
        return 2 * weight.nbytes if self.device == "cpu" and weight.dtype == torch.bfloat16 else 0


def _dry_run(
    model: PreTrainedModel, adapter: Adapter, tokens: int, attend: Attend, checkpointing: Checkpointing
) -> int:
    """Of a chunk of `tokens` tokens beside a tiny one, as activations take more where there are several (one job may
    have them, too).
    """
    bank, base = AdapterBank(model), BaseModel(model, PreTrainedTokenizerBase(), "", "", "", META)
    examples = [Example([0] * length, [False] + [True] * (length - 1)) for length in (tokens, 2)]
    batch = pack([Chunk("", ((0, example),), None) for example in examples], META)
    routed = [Segment(adapter, chunk.padded_tokens, chunk.positions) for chunk in batch.chunks]
    known = [*model.parameters(), *model.buffers(), *adapter.trained, *frozen(adapter)]
    meter = Meter([*known, *(tensor.grad for tensor in adapter.trained if tensor.grad is not None)])
    layers = recomputed_layers(model, bank) if checkpointing == "full" else nullcontext()
    with meter:
        with layers:
            losses = batch_losses(base, bank, routed, batch, attend)
        losses.sum().backward()
    bank.close()
    return meter.peak


def frozen(adapter: Adapter) -> list[Tensor]:
    return [] if adapter.residual is None else [*adapter.residual.a.values(), *adapter.residual.b.values()]


class Meter(TorchDispatchMode):
    """Bytes of the storages that come to be within it: `live` now, `peak` at most. `known` are there already."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, operation: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        return result

    def _forget(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.live -= nbytes


class _MetaAttention:
    """Takes the memory of `PackedAttention` on `device`: for meta tensors torch would choose other kernels."""

    def __init__(self, document: int, device: str) -> None:
        self._document, self._device = document, device

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        plain = self._device == "cpu" and q.dtype == torch.bfloat16
        if spec.softcap is None and not (plain and q.requires_grad):
            fused: Tensor = _FusedAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
            return fused
        document = self._document if spec.softcap is not None else min(self._document, SHORT_DOCUMENT)
        parts = zip(q.split(document, 2), k.split(document, 2), v.split(document, 2), strict=True)
        outputs = [plain_attention(q, k, v, spec, None) for q, k, v in parts]
        return torch.cat([output.transpose(1, 2) for output in outputs], dim=1).transpose(1, 2)


class _FusedAttention(torch.autograd.Function):
    """Keeps its inputs, its output and one fp32 number a row and head; its backward pass makes their gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Laid out as [1, tokens, heads, d], as PackedAttention joins its documents.
        out = torch.empty_like(q.transpose(1, 2).contiguous()).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], device=q.device, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
