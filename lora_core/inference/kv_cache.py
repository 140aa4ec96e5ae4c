"""Keys and values of the sequences that are being generated, behind one interface (`KVCache`): in pages where a GPU
serves a Llama in bf16 (`paged_kv_cache.py`), elsewhere in static slots, allocated once.

    k, v of a layer    [slots, kv heads, context, d]   dtype of the base

A sequence owns one slot from its first token to its last; what it leaves there is known by its tokens and its adapter's
digest until another takes the slot, and a prompt that begins like it is read from where they part. `attend` is the
attention of one step over any number of sequences, each with one token or a stretch of its prompt. A slot's memory is
touched only as far as sequences reach (on CPU the rest is never resident).

In fp32 and fp64 a token has the same bits whatever is computed beside it and however its prompt was cut: each row sums
over keys in blocks of `KEY_BLOCK`, and what is masked adds zeros.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lora_core.inference.paged_kv_cache import PagedKVCache
from lora_core.inference.scheduler import Run
from lora_core.models.attention import HALF, Attend, AttentionSpec
from lora_core.models.forward import Forward
from lora_core.models.paged_kv import PAGE_TOKENS, PagedKV
from lora_core.models.step import Step

KEY_BLOCK = 128
"""Keys over which one product sums: MKL splits longer sums by how long they are."""

KEY_STEP = 64
"""Lengths are rounded up to it, so that torch's sums over a row take their terms in the same order for all lengths."""

QUERY_ROWS = 4
"""Rows of one matrix of queries at least: MKL on AMD computes up to three otherwise than many."""

MOST_SLOTS = 32

MOST_PAGED_SLOTS = 256
"""Sequences that share pages: the rows of the largest of the decoder's graphs."""

GPU_SHARE = 0.25
"""Of what is free on a GPU when a base has been loaded: a rank of training has its share of it, too."""

MIN_SHARED_TOKENS = 8
"""A shorter beginning is not worth copying."""


@dataclass
class _Slot:
    """Whose tokens are in a slot. The numbers up to `finite` are finite: attention reads past a sequence's end, where
    what another left behind, or uninitialised memory, would come through the mask, as 0 x NaN is NaN.
    """

    owner: str | None = None
    tokens: list[int] = field(default_factory=list)  # that are known
    computed: int = 0
    taken: bool = False
    used_at: int = 0
    finite: int = 0


class KVCache(Protocol):
    """Slots of sequences, and attention over what is in them."""

    @property
    def slots(self) -> int:
        """How many sequences there may be at a time."""
        ...

    def take(
        self, prompt: Sequence[int], owner: str | None, most_tokens: int, *, share: bool = True
    ) -> tuple[int, int] | None:
        """(slot, tokens of `prompt` that are in it already) for a new sequence of at most `most_tokens`; None where
        there is no room for it now.

        `owner` is the digest of what computes it; None shares nothing. The last token is never shared: its logits are
        asked for. Without `share` all are read, but others may share them.
        """
        ...

    def release(self, slot: int) -> None:
        """The sequence in this slot is over; what it has computed may serve another."""
        ...

    def step(self, runs: Sequence[Run], ids: Sequence[Sequence[int]]) -> Attend:
        """Attend in a forward pass over `[1, tokens]`, the tokens of these runs end to end. `ids` are what has become
        known of each sequence: with these tokens all, but for those that are not read yet.
        """
        ...

    def take_back(self, slot: int) -> None:
        """The token in this slot that was computed last, which nobody knew, is computed again."""
        ...


def open_kv_cache(forward: Forward, *, slots: int | None, context: int) -> KVCache:
    """One for at most `slots` sequences of at most `context` tokens each (None: as many as are worth it on a CPU, and
    on a GPU as many as its free memory allows).
    """
    shapes = _layer_shapes(forward)
    k, v, dtype, heads = shapes[0]
    if forward.device.type != "cuda" or forward.name != "llama" or dtype not in HALF:
        return SlotKVCache(forward, shapes, slots=slots, context=context)
    assert k == v
    page_bytes = 2 * len(shapes) * k[0] * k[1] * PAGE_TOKENS * dtype.itemsize
    of_one = -(-context // PAGE_TOKENS)
    slots = min(slots or MOST_PAGED_SLOTS, MOST_PAGED_SLOTS)
    pages = fitting(page_bytes, _free_bytes(forward.device), least=of_one, most=slots * of_one)
    kv = PagedKV(
        layers=len(shapes), heads=heads, kv_heads=k[0], head_size=k[1], pages=pages,
        slots=slots, context=context, dtype=dtype, device=forward.device,
    )  # fmt: skip
    return PagedKVCache(kv)


class SlotKVCache:
    """`KVCache` in `slots` static slots of `context` tokens each."""

    def __init__(self, forward: Forward, shapes: Sequence[_LayerShape], *, slots: int | None, context: int) -> None:
        self.context = context
        device, length = forward.device, _rounded(context)
        if slots is None and device.type == "cuda":
            slot_bytes = length * sum((k[0] * k[1] + v[0] * v[1]) * dtype.itemsize for k, v, dtype, _ in shapes)
            slots = fitting(slot_bytes, _free_bytes(device), least=1, most=MOST_SLOTS)
        slots = slots or MOST_SLOTS
        self.keys = [torch.empty(slots, k[0], length, k[1], dtype=d, device=device) for k, _, d, _ in shapes]
        self.values = [torch.empty(slots, v[0], length, v[1], dtype=d, device=device) for _, v, d, _ in shapes]
        self._slots = [_Slot() for _ in range(slots)]
        self._clock = itertools.count(1)

    @property
    def slots(self) -> int:
        """See `KVCache`."""
        return len(self._slots)

    def take(
        self, prompt: Sequence[int], owner: str | None, most_tokens: int, *, share: bool = True
    ) -> tuple[int, int] | None:
        """See `KVCache`: there is room where one of the slots is free."""
        assert most_tokens <= self.context
        free = [index for index, slot in enumerate(self._slots) if not slot.taken]
        if not free:
            return None
        source, shared = self._longest_beginning(prompt, owner) if share else (-1, 0)
        if source in free:
            index = source
        else:
            index = min(free, key=lambda index: self._slots[index].used_at)
            self._slots[index].finite = 0
            if shared:
                self._copy(source, index, shared)
        slot = self._slots[index]
        slot.owner, slot.tokens, slot.taken, slot.used_at = owner, list(prompt[:shared]), True, next(self._clock)
        slot.computed, slot.finite = shared, min(slot.finite, shared)
        return index, shared

    def release(self, slot: int) -> None:
        """The sequence in this slot is over; what it has computed may serve another."""
        self._slots[slot].taken = False
        self._slots[slot].used_at = next(self._clock)

    def step(self, runs: Sequence[Run], ids: Sequence[Sequence[int]]) -> Attend:
        """See `KVCache`."""
        for run, tokens in zip(runs, ids, strict=True):
            slot = self._slots[run.slot]
            assert run.start == slot.computed
            slot.computed += run.tokens
            slot.tokens.extend(tokens)
            assert len(slot.tokens) <= slot.computed <= self.context
            slot.finite = max(slot.finite, run.start + run.tokens)
        return _StepAttention(self, runs)

    def take_back(self, slot: int) -> None:
        """See `KVCache`."""
        self._slots[slot].computed -= 1

    def finite_to(self, slot: int, length: int) -> None:
        """Clear what lies between a sequence's end and `length`, unless it is clear."""
        start, end = self._slots[slot].finite, min(self.keys[0].shape[2], -(-length // KEY_BLOCK) * KEY_BLOCK)
        if start < length:
            for memory in (*self.keys, *self.values):
                memory[slot, :, start:end].zero_()
            self._slots[slot].finite = end

    def _longest_beginning(self, prompt: Sequence[int], owner: str | None) -> tuple[int, int]:
        best = (-1, 0)
        for index, slot in enumerate(self._slots):
            if owner is not None and slot.owner == owner:
                shared = _common(prompt[:-1], slot.tokens)
                if shared >= MIN_SHARED_TOKENS and shared > best[1]:
                    best = index, shared
        return best

    def _copy(self, source: int, target: int, tokens: int) -> None:
        for memory in (*self.keys, *self.values):
            memory[target, :, :tokens] = memory[source, :, :tokens]


def fitting(nbytes: int, free_bytes: int, *, least: int, most: int) -> int:
    """How many pieces of so many bytes there are to be in a GPU's memory."""
    return max(least, min(most, int(GPU_SHARE * free_bytes) // nbytes))


def _free_bytes(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return free


def _rounded(length: int) -> int:
    step = KEY_STEP if length <= KEY_BLOCK else KEY_BLOCK
    return -(-length // step) * step


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    equal, most = 0, min(len(one), len(other))
    for size in (256, 1):
        while equal + size <= most and one[equal : equal + size] == other[equal : equal + size]:
            equal += size
    return equal


@dataclass(frozen=True)
class _Product:
    """Sequences in neighbouring slots, `tokens` of each, that are one product over `length` keys."""

    rows: Tensor | slice  # of the step's tokens: int64 [slots * tokens], or those of a stretch as they are
    first_slot: int
    length: int
    positions: Tensor  # int64 [slots, tokens]


class _StepAttention:
    """Writes the keys and values of a step's tokens into their slots, and attends from each to all that it follows.

    Sequences that decode and lie in neighbouring slots are one product each; a stretch of a prompt is one by itself.
    The query heads that share a key head become rows of one small matrix, `[slots, kv heads, heads of each * tokens,
    d]`: on CPU in bf16 that was measured 5 to 8 times as fast as `enable_gqa` (8 slots of 128 to 2,048 tokens).
    """

    def __init__(self, cache: SlotKVCache, runs: Sequence[Run]) -> None:
        self._cache, device = cache, cache.keys[0].device
        starts = [0, *itertools.accumulate(run.tokens for run in runs)]
        positions = [position for run in runs for position in range(run.start, run.start + run.tokens)]
        _, kv_heads, context, _ = cache.keys[0].shape
        slots = [run.slot for run in runs for _ in range(run.tokens)]
        beginnings = torch.tensor(slots)[:, None] * kv_heads + torch.arange(kv_heads)
        self._tokens = len(positions)
        self._places = (beginnings * context + torch.tensor(positions)[:, None]).flatten().to(device)
        self._products = [self._product(of_product) for of_product in _side_by_side(runs, starts)]
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def _product(self, runs: Sequence[tuple[Run, int]]) -> _Product:
        (first, _), device = runs[0], self._places.device
        longest = max(run.start + run.tokens for run, _ in runs)
        length = _rounded(longest)
        for run, _ in runs:
            self._cache.finite_to(run.slot, length)
        rows = [row + token for run, row in runs for token in range(run.tokens)]
        positions = torch.tensor([range(run.start, run.start + run.tokens) for run, _ in runs], device=device)
        is_stretch = rows == list(range(rows[0], rows[0] + len(rows)))
        taken = slice(rows[0], rows[0] + len(rows)) if is_stretch else torch.tensor(rows, device=device)
        return _Product(taken, first.slot, length, positions)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        for memory, new in ((keys, k), (values, v)):  # what lies behind the tokens is padding
            by_head = new[0, :, : self._tokens].transpose(0, 1).reshape(-1, new.shape[3])
            memory.view(-1, new.shape[3]).index_copy_(0, self._places, by_head)
        by_token = q[0].transpose(0, 1)
        out = q.new_zeros(q.shape[2], q.shape[1], v.shape[3])
        for index, product in enumerate(self._products):
            shape = product.positions.shape
            slots = slice(product.first_slot, product.first_slot + shape[0])
            past = keys[slots, :, : product.length], values[slots, :, : product.length]
            queries, mask = by_token[product.rows].unflatten(0, shape), self._mask(index, spec.sliding_window)
            out[product.rows] = _attended(queries, *past, spec, mask).flatten(0, 1)
        return out.transpose(0, 1)[None]

    def _mask(self, index: int, window: int | None) -> Tensor:
        """`[slots, 1, 1, tokens, length]`: what each token does not see."""
        if (index, window) not in self._masks:
            product = self._products[index]
            positions = product.positions[:, None, None, :, None]
            keys = torch.arange(product.length, device=positions.device)
            hidden = keys > positions
            if window is not None:
                hidden |= keys <= positions - window
            self._masks[index, window] = hidden
        return self._masks[index, window]


def _side_by_side(runs: Sequence[Run], starts: Sequence[int]) -> Iterator[list[tuple[Run, int]]]:
    """Runs with their first rows, those of one token in neighbouring slots together."""
    together: list[tuple[Run, int]] = []
    for run, row in sorted(zip(runs, starts, strict=False), key=lambda of: of[0].slot):
        if together and not (run.tokens == together[-1][0].tokens == 1 and run.slot == together[-1][0].slot + 1):
            yield together
            together = []
        together.append((run, row))
    if together:
        yield together


def _attended(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, hidden: Tensor) -> Tensor:
    """q `[slots, tokens, heads, d]` over k, v `[slots, kv heads, length, d]` -> `[slots, tokens, heads, d]`."""
    slots, tokens, heads, d = q.shape
    kv_heads, length = k.shape[1:3]
    per_head = heads // kv_heads
    rows = per_head * tokens
    queries = q.new_zeros(slots, kv_heads, max(rows, QUERY_ROWS), d)
    by_head = q.unflatten(2, (kv_heads, per_head)).permute(0, 2, 3, 1, 4)
    queries[:, :, :rows].unflatten(2, (per_head, tokens)).copy_(by_head)
    scores = (queries @ k.transpose(-1, -2)).mul_(spec.scaling)
    if spec.softcap is not None:
        scores = scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
    scores[:, :, :rows].unflatten(2, (per_head, tokens)).masked_fill_(hidden, -torch.inf)
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
    out = weights[..., :KEY_BLOCK] @ v[:, :, :KEY_BLOCK]
    for start in range(KEY_BLOCK, length, KEY_BLOCK):
        out += weights[..., start : start + KEY_BLOCK] @ v[:, :, start : start + KEY_BLOCK]
    out_by_head = out[:, :, :rows].unflatten(2, (per_head, tokens))
    joined: Tensor = out_by_head.permute(0, 3, 1, 2, 4).reshape(slots, tokens, heads, -1)
    return joined


class _LayerShape(NamedTuple):
    """(heads, d) of k and of v, their dtype, and the number of query heads."""

    k: tuple[int, int]
    v: tuple[int, int]
    dtype: torch.dtype
    heads: int


@torch.inference_mode()
def _layer_shapes(forward: Forward) -> list[_LayerShape]:
    """Ask the model for the shapes of its layers: configs name them in many ways."""
    shapes: dict[int, _LayerShape] = {}

    def record(layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        shapes[layer] = _LayerShape((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3]), k.dtype, q.shape[1])
        return q.new_zeros(*q.shape[:-1], v.shape[-1])

    zero = torch.zeros(1, dtype=torch.int64)
    forward.step(Step(zero, zero, [(None, 1)], record, [0]))
    return [shapes[layer] for layer in range(len(shapes))]
