"""One attention function for training, prefill and decoding, registered with transformers under the name `lora`.

A model that is loaded with `attn_implementation="lora"` computes q, k and v as always and then calls the object that
the caller passed as `model(..., attend=...)`. `PackedAttention` is that object for documents that lie end to end in one
row of tokens; the generator passes one that reads and writes its key-value cache (`kv_cache.py`).
"""

from __future__ import annotations

import inspect
import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_core.kernels.dispatch import device_type
from lora_core.kernels.operands import EXACT_DTYPES
from lora_core.kernels.transfer import to_device
from lora_core.models.attention_cpu import EqualDocuments
from lora_core.models.attention_meta import fused_attention

ATTENTION_NAME = "lora"

SHORT_DOCUMENT = 256
"""On CPU in bf16, torch's fused attention takes 1.2 ms forward and backward for 75 tokens (9 heads of 64), two products
0.4 ms; at 256 tokens they are even, and at 1,024 the fused one is four times as fast.
"""

HALF = (torch.bfloat16, torch.float16)
"""What fused kernels take on a GPU."""


class AttentionSpec(NamedTuple):
    """What a layer asks of its attention: `scaling` of q k^T, how far back a token sees, and Gemma's tanh cap on the
    scores.
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None


Backward = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class Attend(Protocol):
    """q `[batch, heads, tokens, d]`, k and v `[batch, kv heads, tokens, d]` -> `[batch, heads, tokens, d]`."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor: ...


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None) -> Tensor:
    """Attention of q `[b, h, n, d]` over k, v `[b, kv, m, d]`.

    `mask` is boolean `[b or 1, 1, n, m]`, or without a softcap what is added to the scores, or None for causal (n = m).
    """
    if spec.softcap is None and q.is_meta and (q.dtype in HALF or device_type(q.device) == "cpu"):
        return fused_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    if spec.softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=spec.scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    return plain_attention(q, k, v, spec, mask)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None) -> Tensor:
    """The same by two products and a softmax, with the cap between them where there is one."""
    batch, heads, n, d = q.shape
    groups = heads // k.shape[1]  # query heads that share a key head lie below each other in one matrix
    scores = (q.reshape(batch, -1, groups * n, d) @ k.transpose(-1, -2)).view(batch, heads, n, -1) * spec.scaling
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    if mask is None:
        mask = _seen(n, None, q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1, dtype=wide).to(q.dtype)
    return (weights.view(batch, -1, groups * n, k.shape[2]) @ v).view(batch, heads, n, -1)


class PackedAttention:
    """Causal attention inside each of the documents that lie end to end in a `[1, tokens]` row; none across them.

    Each document is one call on its own slice: what is packed beside it, NaN included, cannot reach it.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._masks: dict[tuple[int, int | None], Tensor] = {}  # every layer asks for the same few
        self._added: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        documents = zip(q.split(self.lengths, 2), k.split(self.lengths, 2), v.split(self.lengths, 2), strict=True)
        outputs = [self._document(*qkv, spec) for qkv in documents]
        if len(outputs) == 1:
            return outputs[0]
        # Joined as [1, tokens, heads, d], which is how the model goes on with it: that saves a copy.
        return torch.cat([output.transpose(1, 2) for output in outputs], dim=1).transpose(1, 2)

    def _document(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        tokens, window = q.shape[2], spec.sliding_window
        window = None if window is None or tokens <= window else window
        on_cpu = device_type(q.device) == "cpu"
        short = on_cpu and q.requires_grad and q.dtype == torch.bfloat16 and tokens <= SHORT_DOCUMENT
        if short or spec.softcap is not None:
            return plain_attention(q, k, v, spec, self._mask(tokens, window, q.device))
        return scaled_dot_product(q, k, v, spec, None if window is None else self._added_mask(tokens, window, q))

    def _added_mask(self, tokens: int, window: int, q: Tensor) -> Tensor:
        """Zeros, and -inf where nothing is seen: of a boolean mask torch makes one of these for every layer, and keeps
        it.
        """
        key = tokens, window, q.dtype
        if key not in self._added:
            seen = _seen(tokens, window, q.device)
            self._added[key] = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
        return self._added[key]

    def _mask(self, tokens: int, window: int | None, device: torch.device) -> Tensor:
        if (tokens, window) not in self._masks:
            self._masks[tokens, window] = _seen(tokens, window, device)
        return self._masks[tokens, window]


class LayerAttention(Protocol):
    """q `[T, heads, d]`, k and v `[T, kv heads, d]` -> (attended `[T, heads * d]`, its gradient -> those of q, k and
    v).
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, with_backward: bool) -> tuple[Tensor, Backward]: ...


class StepAttention:
    """An `Attend` as `LayerAttention`, without a backward pass."""

    def __init__(self, attend: Attend, scaling: float) -> None:
        self._attend, self._spec = attend, AttentionSpec(scaling)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, with_backward: bool) -> tuple[Tensor, Backward]:
        """See `LayerAttention`."""
        assert not with_backward
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        out = self._attend(layer, q, k, v, self._spec)
        return out[0].transpose(0, 1).flatten(1), _no_backward


class DocumentAttention:
    """Causal attention inside each of the documents that lie end to end in `[T, heads, d]`, with its own backward pass.

    On CUDA it is one variable-length flash attention over all of them (Dao 2023), or one of cuDNN's where they have one
    length. On CPU (`attention_cpu.py`) those of one length that lie side by side are one product; in fp32 and fp64 only
    those of one of the `segments`, whose tokens are given.
    """

    def __init__(self, lengths: Sequence[int], segments: Sequence[int], scaling: float, device: torch.device) -> None:
        self._scaling, self._lengths, self._segments = scaling, list(lengths), list(segments)
        self._longest = max(self._lengths)
        ends = torch.tensor([0, *itertools.accumulate(self._lengths)], dtype=torch.int32)
        self._ends = to_device(ends, device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, with_backward: bool) -> tuple[Tensor, Backward]:
        """See `LayerAttention`."""
        if device_type(q.device) != "cuda":
            return self._on_cpu(q, k, v, with_backward)
        if not with_backward:
            return self._attend(q, k, v).flatten(1), _no_backward
        with torch.enable_grad():
            leaves = tuple(part.detach().requires_grad_() for part in (q, k, v))
            out = self._attend(*leaves)
        heads = out.shape[1]

        def backward(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dq, dk, dv = torch.autograd.grad(out, leaves, gradient.unflatten(1, (heads, -1)))
            return dq, dk, dv

        return out.detach().flatten(1), backward

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half = q.dtype in HALF
        if half and q.is_meta:
            return fused_attention(q, k, v)
        if half and len(set(self._lengths)) == 1:
            return _dense_attention(q, k, v, len(self._lengths), self._scaling)
        if half:
            return causal_varlen(q, k, v, self._ends, self._ends, self._longest, self._longest, self._scaling)
        packed = PackedAttention(self._lengths)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        return packed(0, q, k, v, AttentionSpec(self._scaling))[0].transpose(0, 1)

    def _on_cpu(self, q: Tensor, k: Tensor, v: Tensor, with_backward: bool) -> tuple[Tensor, Backward]:
        output, runs, start = q.new_empty(q.shape), [], 0
        for length, documents in self._equal_documents(exact=q.dtype in EXACT_DTYPES):
            rows = slice(start, start + documents * length)
            runs.append((rows, EqualDocuments(q[rows], k[rows], v[rows], documents, self._scaling, output[rows])))
            start = rows.stop

        def backward(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dq, dk, dv = (part.new_empty(part.shape) for part in (q, k, v))
            for rows, run in runs:
                run.backward(gradient.view_as(output)[rows], dq[rows], dk[rows], dv[rows])
            return dq, dk, dv

        return output.flatten(1), backward if with_backward else _no_backward

    def _equal_documents(self, exact: bool) -> Iterator[tuple[int, int]]:
        """(length, number of documents) of each product."""
        ends = list(itertools.accumulate(self._segments)) if exact else []
        segment_of = [bisect_left(ends, end) for end in itertools.accumulate(self._lengths)]
        for (_, length), documents in itertools.groupby(zip(segment_of, self._lengths, strict=True)):
            yield length, len(list(documents))


def _no_backward(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise AssertionError("this pass was made without a backward pass")


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, documents: int, scaling: float) -> Tensor:
    """Documents of one length, such as texts cut at `max_seq_len`: cuDNN takes half of flash attention's time."""
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (part.unflatten(0, (documents, -1)).transpose(1, 2) for part in (q, k, v))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


def causal_varlen(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, longest_q: int, longest_k: int, scaling: float
) -> Tensor:
    """Flash attention of documents that lie end to end, q `[T, heads, d]`, over their own k and v `[T', kv heads, d]`:
    the last query sees all keys, each before it one less. `ends` int32 `[documents + 1]` are sums of lengths.
    """
    # torch 2.11 takes grouped queries as they come, later versions by a flag.
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    out: Any = varlen_attn(q, k, v, q_ends, k_ends, longest_q, longest_k, scale=scaling, window_size=(-1, 0), **grouped)
    assert isinstance(out, Tensor)
    return out


def _seen(tokens: int, window: int | None, device: torch.device) -> Tensor:
    """bool `[1, 1, tokens, tokens]`: itself and what came before, of it the last `window - 1` where there is a
    window.
    """
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return (causal if window is None else causal.triu(1 - window))[None, None]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attend: Attend,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The signature that transformers calls; see `transformers/integrations/sdpa_attention.py` for its conventions."""
    assert attention_mask is None
    layer = module.layer_idx
    assert isinstance(layer, int)
    out = attend(layer, query, key, value, AttentionSpec(scaling, sliding_window, softcap))
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)
