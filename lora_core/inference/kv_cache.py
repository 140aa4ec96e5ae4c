"""Keys and values of the sequences that are being generated: static slots, allocated once.

    k, v of a layer    [slots, kv heads, max_len, d]   dtype of the base

A sequence owns one slot from its first token to its last. Two objects implement `Attend` (attention.py): one reads a
prompt into a slot, the other takes one token of several slots at once and is a single attention call per layer. The
memory of a slot is touched only as far as its sequence grows (on CPU the rest is never resident).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.models.attention import Attend, AttentionSpec, PackedAttention, scaled_dot_product
from lora_core.models.forward import Forward

_CLEAR_TOKENS = 256  # cleared ahead of a growing sequence at a time


class KVCache:
    """`slots` sequences of at most `max_len` tokens each."""

    def __init__(self, forward: Forward, *, slots: int, max_len: int) -> None:
        self.slots, self.max_len = slots, max_len
        shapes, device = _shapes_of_layers(forward), forward.device
        self.keys = [torch.empty(slots, k[0], max_len, k[1], dtype=d, device=device) for k, _, d in shapes]
        self.values = [torch.empty(slots, v[0], max_len, v[1], dtype=d, device=device) for _, v, d in shapes]
        # A slot's numbers are finite up to here. Decoding reads all slots as far as the longest one reaches, and what a
        # sequence with NaN left behind, or uninitialised memory, would come through the mask: 0 x NaN is NaN.
        self._finite = [0] * slots

    def prefill(self, slot: int, tokens: int) -> Attend:
        """Attend in a forward pass over `[1, tokens]`, the prompt that starts a new sequence in `slot`."""
        assert 0 < tokens <= self.max_len
        self._finite[slot] = tokens
        return _Prefill(self, slot, tokens)

    def decode(self, slots: Sequence[int], positions: Sequence[int]) -> Attend:
        """Attend in a forward pass over `[n, 1]`: token i is at `positions[i]` of the sequence in `slots[i]`."""
        length = max(positions) + 1
        assert length <= self.max_len and len(set(slots)) == len(slots)
        for slot in slots:
            self._clear(slot, length)
        return _Decode(self, slots, positions, length)

    def _clear(self, slot: int, length: int) -> None:
        start = self._finite[slot]
        if start >= length:
            return
        end = min(self.max_len, -(-length // _CLEAR_TOKENS) * _CLEAR_TOKENS)
        for memory in (*self.keys, *self.values):
            memory[slot, :, start:end].zero_()
        self._finite[slot] = end


class _Prefill:
    """Causal attention over a prompt; its k and v stay in the slot."""

    def __init__(self, cache: KVCache, slot: int, tokens: int) -> None:
        self._cache, self._slot, self._tokens = cache, slot, tokens
        self._attention = PackedAttention([tokens])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        self._cache.keys[layer][self._slot, :, : self._tokens] = k[0]
        self._cache.values[layer][self._slot, :, : self._tokens] = v[0]
        return self._attention(layer, q, k, v, spec)


class _Decode:
    """One token of several sequences against all that each of them has seen.

    Rows come in the order of the requests (by adapter), memory lies in the order of the slots: the queries, one token
    each, are moved to their slots, since moving keys and values would copy the whole cache. A slot without a row
    attends to its first position, and nobody reads the result.

    The query heads that share a key head become rows of one small matrix, `[slots, kv heads, heads per kv head, d]`: on
    CPU in bf16 that was measured 5 to 8 times as fast as `enable_gqa` (8 slots of 128 to 2,048 tokens).
    """

    def __init__(self, cache: KVCache, slots: Sequence[int], positions: Sequence[int], length: int) -> None:
        device = cache.keys[0].device
        self._cache, self._length, self._used = cache, length, max(slots) + 1
        self._slots = torch.tensor(slots, device=device)
        self._positions = torch.tensor(positions, device=device)
        self._slot_positions = torch.zeros(self._used, dtype=torch.int64, device=device)
        self._slot_positions[self._slots] = self._positions
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self._slots, :, self._positions] = k[:, :, 0]
        values[self._slots, :, self._positions] = v[:, :, 0]
        rows, heads, _, d = q.shape
        by_slot = q.new_zeros(self._used, heads, d)
        by_slot[self._slots] = q[:, :, 0]
        out = scaled_dot_product(
            by_slot.view(self._used, k.shape[1], heads // k.shape[1], d),
            keys[: self._used, :, : self._length],
            values[: self._used, :, : self._length],
            spec,
            self._mask(spec.sliding_window),
        )
        return out.reshape(self._used, heads, -1)[self._slots].view(rows, heads, 1, -1)

    def _mask(self, window: int | None) -> Tensor:
        """Make a mask `[slots, 1, 1, length]` of each token itself and the `window - 1` tokens before it."""
        if window not in self._masks:
            seen = torch.arange(self._length, device=self._slots.device)
            mask = seen <= self._slot_positions[:, None]
            if window is not None:
                mask &= seen > self._slot_positions[:, None] - window
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


_LayerShape = tuple[tuple[int, int], tuple[int, int], torch.dtype]


@torch.inference_mode()
def _shapes_of_layers(forward: Forward) -> list[_LayerShape]:
    """Ask the model for (kv heads, d) of k and of v and their dtype by layer: configs name them in many ways."""
    shapes: dict[int, _LayerShape] = {}

    def record(layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        shapes[layer] = ((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3]), k.dtype)
        return q.new_zeros(*q.shape[:-1], v.shape[-1])

    forward.prefill(torch.zeros(1, dtype=torch.int64, device=forward.device), None, record)
    return [shapes[layer] for layer in range(len(shapes))]
