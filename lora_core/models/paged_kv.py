"""Keys and values of many sequences in pages of a GPU's memory (vLLM, Kwon et al. 2023), and attention over them.

    k, v of a layer    [pages, kv heads, PAGE_TOKENS, d]    dtype of the base
    table              [slots, most pages of a sequence]    which pages are a slot's, in the order of its tokens

Which page is whose is decided in `inference/paged_kv_cache.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.kernels.operands import PagedLayer
from lora_core.kernels.transfer import to_device
from lora_core.models.attention import AttentionSpec, causal_varlen

PAGE_TOKENS = 16


class PagedKV:
    """The memory of `pages` pages for a model of these heads."""

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        pages: int,
        slots: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (pages, kv_heads, PAGE_TOKENS, head_size)
        self.device, self.context, self._heads = device, context, heads
        self.table = torch.zeros(slots, -(-context // PAGE_TOKENS), dtype=torch.int64, device=device)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]

    def assign(self, slot: int, pages: Sequence[int]) -> None:
        """Make these the pages of a slot."""
        self.table[slot, : len(pages)] = to_device(torch.tensor(pages), self.device)

    def layer(self, index: int) -> PagedLayer:
        """What kernels take of one layer."""
        return PagedLayer(self.keys[index], self.values[index], self.table, self._heads)


class Stretch(NamedTuple):
    """`tokens` of the sequence in `slot`, from position `start` on."""

    slot: int
    start: int
    tokens: int

    @property
    def end(self) -> int:
        return self.start + self.tokens


class PagedAttention:
    """The attention of one step over stretches of sequences, end to end: writes their keys and values into their pages,
    and attends from each token to all that it follows, by flash attention of variable lengths.
    """

    def __init__(self, kv: PagedKV, stretches: Sequence[Stretch]) -> None:
        self.kv, self.stretches = kv, stretches

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """See `Attend`."""
        assert spec.sliding_window is None and spec.softcap is None
        pages, own = self.kv.layer(layer), self._own
        q, k, v = (part[0].transpose(0, 1) for part in (q, k, v))
        pages.keys[own.page, :, own.offset] = k
        pages.values[own.page, :, own.offset] = v
        if (seen := self._seen) is not None:
            k, v = (memory[seen.page, :, seen.offset] for memory in (pages.keys, pages.values))
        q_ends, k_ends = self._ends
        longest, most_seen = (max(sizes) for sizes in zip(*((of.tokens, of.end) for of in self.stretches), strict=True))
        return causal_varlen(q, k, v, q_ends, k_ends, longest, most_seen, spec.scaling).transpose(0, 1)[None]

    @cached_property
    def _own(self) -> _Places:
        """Of the step's tokens."""
        return self._places([(of.slot, of.start, of.tokens) for of in self.stretches])

    @cached_property
    def _seen(self) -> _Places | None:
        """Of all that they see, if some of it is in the pages alone."""
        if all(of.start == 0 for of in self.stretches):
            return None
        return self._places([(of.slot, 0, of.end) for of in self.stretches])

    @cached_property
    def _ends(self) -> Tensor:
        """int32 `[2, stretches + 1]`: where the queries of each end, and what they see."""
        lengths = torch.tensor([[0, *(of.tokens for of in self.stretches)], [0, *(of.end for of in self.stretches)]])
        return to_device(lengths.cumsum(1).to(torch.int32), self.kv.device)

    def _places(self, stretches: Sequence[tuple[int, int, int]]) -> _Places:
        """Of the tokens of (slot, first position, tokens) each."""
        slots = torch.tensor([slot for slot, _, _ in stretches])
        positions = torch.cat([torch.arange(start, start + tokens) for _, start, tokens in stretches])
        of_tokens = slots.repeat_interleave(torch.tensor([tokens for _, _, tokens in stretches]))
        slot, position = to_device(torch.stack([of_tokens, positions]), self.kv.device)
        return _Places(self.kv.table[slot, position // PAGE_TOKENS], position % PAGE_TOKENS)


class _Places(NamedTuple):
    """The page of each token, and its place there; int64."""

    page: Tensor
    offset: Tensor
