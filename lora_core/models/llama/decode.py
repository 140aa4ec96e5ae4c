"""A step of few tokens on a GPU, one of each sequence that is being answered and stretches of prompts beside them: the
decoder's layers once more, captured in CUDA graphs.

A step's kernels take microseconds each, less than it takes to launch them. So the launches of a whole step are recorded
once for each shape, and replayed: numbers of rows, of tiles of adapters and of their ranks are rounded up, and all that
differs between steps of a shape lies in one buffer that is copied to the GPU before. A step without adapters is a shape
of its own, which pays nothing for them.

The frozen products are those of `precision.py`; `kernels/decode_triton.py` has what lies between them.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels.operands import NARROW_ROWS, Rope, UnscaledProduct
from lora_core.models.attention import StepAttention
from lora_core.models.llama.adapters import ServableAdapter
from lora_core.models.llama.decoder import Decoder, DecoderInput
from lora_core.models.llama.weights import DOWN, GATE_UP, QKV, O
from lora_core.models.paged_kv import PagedAttention, PagedKV
from lora_core.models.precision import FrozenWeight
from lora_core.models.step import Step

if TYPE_CHECKING:  # Triton is not there on every system
    from lora_core.kernels.decode_triton import StepAdapters

log = logging.getLogger("lora.engine")

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512)
"""Numbers of tokens that there are graphs for; steps of more are bound by their products, and not by launches."""

MIXED_ROWS = (8, 16, 32, 64, 128, 192, 256, 320, 384, 512)
"""The same for steps that read prompts, which are longer than their launches: fewer, as they differ in more."""

MIXED_WANTED = (8, 64)
"""Of their tokens, those whose logits are made: so many, or all."""

LONG_CONTEXT = 2048
"""Tokens of the longest sequence from which on several programs read one."""

BUSY_PROGRAMS = 512
"""Programs of attention that keep a GPU busy: fewer sequences are read by more programs each."""

TILE_TOKENS = 8
"""Tokens that follow each other for one program of attention."""


CUBLASLT_ROWS = range(24, 97)
"""Rows of a step whose products cuBLASLt makes sooner than cuBLAS: of the 8B shape's four, 64 rows, 121 us for 127."""


class _Shape(NamedTuple):
    """What a graph is captured for: `rows` of tokens, `wanted` of whose logits are asked for (0: all), `attending`
    tiles of tokens that follow each other (0: each is by itself), `widths` and `ranks` of h by kind of group, 0 where
    nobody adapts it.
    """

    rows: int
    wanted: int
    attending: int
    tiles: int
    splits: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    dora: tuple[bool, ...]


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    hidden: Tensor
    logits: Tensor


class DecodeGraphs:
    """The steps of one decoder over one cache. `head` is the frozen weight of its head."""

    def __init__(self, decoder: Decoder, head: FrozenWeight, kv: PagedKV) -> None:
        self._decoder, self._head, self.kv = decoder, head, kv
        self._graphs: dict[_Shape, _Graph] = {}
        device = kv.device
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(11, ROWS[-1], dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._inputs = torch.zeros(11, ROWS[-1], dtype=torch.int64, device=device)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._no_adapter = torch.zeros(len(decoder.groups) * _fields(), dtype=torch.int64, device=device)
        cos, sin = decoder.rotary(decoder.embedding[:1], torch.arange(kv.context, device=device)[None])
        half = decoder.head_size // 2
        self._cos, self._sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    @torch.no_grad()
    def step(self, step: Step, attend: PagedAttention) -> tuple[Tensor, Tensor]:
        """Last hidden states `[n, H]` and logits `[n, vocabulary]` of what is asked for; both are overwritten by the
        next step.
        """
        self._refresh({id(adapter): adapter for adapter, _ in step.runs if adapter is not None and adapter.dirty})
        tiles = _tiles([(id(adapter), tokens) for adapter, tokens in step.runs], NARROW_ROWS)
        attending, reads_prompts = [], len(step.ids) > min(len(step.runs), len(step.logits_of))
        if reads_prompts:
            attending = _tiles([(index, tokens) for index, (_, tokens) in enumerate(step.runs)], TILE_TOKENS)
        shape = self._shape(step, attend, len(tiles), reads_prompts)
        self._fill(shape, step, attend, tiles, attending)
        self.last_shape = shape
        hidden, logits = self._run(shape)
        return hidden[: len(step.logits_of)], logits[: len(step.logits_of)]

    def _run(self, shape: _Shape) -> tuple[Tensor, Tensor]:
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(shape)
        captured = self._graphs[shape]
        captured.graph.replay()
        return captured.hidden, captured.logits

    def _refresh(self, dirty: Mapping[int, ServableAdapter]) -> None:
        """Make the DoRA scales of adapters that have none yet."""
        if dirty:
            segments = [(index, 1) for index in range(len(dirty))]
            zeros = torch.zeros(len(dirty), dtype=torch.int64, device=self.kv.device)
            inputs = DecoderInput(zeros, zeros, segments)
            attention = StepAttention(PagedAttention(self.kv, []), self._decoder.scaling)  # nobody attends
            self._decoder.batch(
                inputs, [adapter.args for adapter in dirty.values()], attention, serving=True
            ).refresh_dora_scales()

    def _shape(self, step: Step, attend: PagedAttention, tiles: int, reads_prompts: bool) -> _Shape:
        kinds = [adapter.by_kind for adapter in {id(a): a for a, _ in step.runs}.values() if adapter is not None]
        kinds = kinds or [[(0, 0, False)] * 4]
        widths, ranks, dora = ([max(of[kind][size] for of in kinds) for kind in range(4)] for size in range(3))
        of_adapters = _rounded(widths), _rounded(ranks), tuple(map(bool, dora))
        if reads_prompts:
            rows = _bucket(len(step.ids), MIXED_ROWS)
            wanted = _bucket(len(step.logits_of), (*MIXED_WANTED, rows))
            return _Shape(rows, min(wanted, rows), rows, rows if tiles > rows // 2 else rows // 2, 1, *of_adapters)
        rows = _bucket(len(step.ids), ROWS)
        longest = max(stretch.end for stretch in attend.stretches)
        splits = 1
        if longest > LONG_CONTEXT or rows * self._decoder.kv_heads < BUSY_PROGRAMS // 4:
            splits = min(16, max(2, BUSY_PROGRAMS // (rows * self._decoder.kv_heads)))
            splits = 1 << splits.bit_length() - 1
        return _Shape(rows, 0, 0, rows if tiles > rows // 4 else max(1, rows // 4), splits, *of_adapters)

    def _fill(
        self,
        shape: _Shape,
        step: Step,
        attend: PagedAttention,
        tiles: Sequence[tuple[int, int]],
        attending: Sequence[tuple[int, int]],
    ) -> None:
        """Copy to the GPU what is this step's: rows past its own are at position -1. The last step's copy may not have
        begun; that of the one before has, since its tokens have been read.
        """
        rows, none = len(step.ids), self._no_adapter.data_ptr()
        self._hosts.reverse()
        host = self._hosts[0].numpy()
        counts = [tokens for _, tokens in step.runs]
        addresses = [none if adapter is None else adapter.address for adapter, _ in step.runs]
        host[:3, :rows] = (
            step.ids.numpy(),
            step.positions.numpy(),
            np.repeat([of.slot for of in attend.stretches], counts),
        )
        host[:3, rows : shape.rows] = [[0], [-1], [0]]
        host[3, :rows] = np.repeat(np.array(addresses, dtype=np.int64), counts)
        host[3, rows : shape.rows] = none
        host[4, : shape.wanted] = 0
        host[4, : len(step.logits_of)] = step.logits_of
        for section, pieces, count in ((host[5:7], tiles, shape.tiles), (host[7:9], attending, shape.attending)):
            flat = section.reshape(-1, 2)
            flat[len(pieces) : count] = 0
            if pieces:
                flat[: len(pieces)] = pieces
        if step.unread is not None:
            count = len(step.unread.places)
            host[9:, :count] = step.unread.places.numpy(), step.unread.rows.numpy()
        self._inputs.copy_(self._hosts[0], non_blocking=True)
        if step.unread is not None:
            places, of_tokens = self._inputs[9:, :count]
            self._inputs[0].index_copy_(0, places, step.unread.tokens[of_tokens])

    def _capture(self, shape: _Shape) -> _Graph:
        began = time.monotonic()
        pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
        side = torch.cuda.Stream(self.kv.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # whatever is made at a first call, Triton's kernels too, must not be captured
            self._layers(shape)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with (
            _products_by("cublaslt" if shape.rows in CUBLASLT_ROWS else "cublas"),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            hidden, logits = self._layers(shape)
        log.info("event=graph_captured shape=%s seconds=%.2f", tuple(shape), time.monotonic() - began)
        return _Graph(graph, hidden, logits)

    def _layers(self, shape: _Shape) -> tuple[Tensor, Tensor]:
        """Launch a whole step."""
        from lora_core.kernels.decode_triton import StepAdapters, add, swiglu
        from lora_core.kernels.paged_attention_triton import paged_attention
        from lora_core.kernels.rope_to_pages_triton import rope_to_pages

        decoder, rows = self._decoder, shape.rows
        ids, positions, slots, tables = self._inputs[:4, :rows]
        wanted, tiles = self._inputs[4, : shape.wanted], self._inputs[5:7].view(-1, 2)[: shape.tiles]
        attending = self._inputs[7:9].view(-1, 2)[: shape.attending] if shape.attending else None
        follow = TILE_TOKENS if shape.attending else 1

        def adapters(layer: int, kind: int) -> StepAdapters:
            group = decoder.groups[4 * layer + kind]
            return StepAdapters(group, tables, tiles, shape.widths[kind], shape.ranks[kind], shape.dora[kind])

        x = F.embedding(ids, decoder.embedding)
        y: UnscaledProduct | None = None
        h: Tensor | None = None
        of_last = adapters(0, DOWN)
        rotated = decoder.heads + decoder.kv_heads
        for index, layer in enumerate(decoder.layers):
            qkv, o, gate_up, down = (adapters(index, kind) for kind in (QKV, O, GATE_UP, DOWN))
            normed = add(x, y, h, of_last, layer.norms[0], decoder.eps)
            h, y = self._products(layer.weights[QKV], normed.scaled, qkv)
            rope = Rope(self._cos, self._sin, decoder.head_size, rotated, layer.bias, layer.head_norm)
            pages = self.kv.layer(index)
            rope_to_pages(y, normed, h, qkv, rope, positions, slots, pages)
            attended = paged_attention(
                y.values, pages, positions, slots, decoder.scaling, tiles=attending, tokens=follow, splits=shape.splits
            )
            h, y = self._products(layer.weights[O], attended, o)
            normed = add(x, y, h, o, layer.norms[1], decoder.eps)
            h, y = self._products(layer.weights[GATE_UP], normed.scaled, gate_up)
            activation = swiglu(y, normed, h, gate_up)
            h, y = self._products(layer.weights[DOWN], activation, down)
            of_last = down
        hidden = add(x, y, h, of_last, decoder.final_norm, decoder.eps).whole()
        if shape.wanted:
            hidden = hidden[wanted]
        return hidden, self._head.serve(hidden)

    def _products(
        self, weight: FrozenWeight, x: Tensor, adapters: StepAdapters
    ) -> tuple[Tensor | None, UnscaledProduct]:
        """(h, the frozen product), beside each other: neither fills a GPU. The programs of few adapters come second, or
        those of the product would wait for their places; many would then end too late.
        """
        from lora_core.kernels.decode_triton import shrink

        if adapters.width == 0 or self._side is None:
            return shrink(x, adapters), weight.unscaled(x)
        main = torch.cuda.current_stream()
        begun = main.record_event()
        y = weight.unscaled(x) if adapters.are_few else None
        self._side.wait_event(begun)
        with torch.cuda.stream(self._side):
            h = shrink(x, adapters)
        y = y or weight.unscaled(x)
        main.wait_stream(self._side)
        return h, y


def _tiles(runs: Sequence[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """(first row, rows) of pieces of at most `most` rows of (whose, rows), those of one side by side together."""
    tiles, start = [], 0
    for _, of_one in itertools.groupby(runs, key=lambda run: run[0]):
        end = start + sum(rows for _, rows in of_one)
        tiles += [(first, min(most, end - first)) for first in range(start, end, most)]
        start = end
    return tiles


@contextmanager
def _products_by(library: str) -> Iterator[None]:
    """Of what is launched meanwhile."""
    usual = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(usual)


def _bucket(number: int, buckets: Sequence[int]) -> int:
    return next(most for most in buckets if most >= number)


def _rounded(sizes: Sequence[int]) -> tuple[int, ...]:
    """Up to 16, 32 and 64, and from there on to multiples of 64; 0 stays."""
    return tuple(size and next((most for most in (16, 32, 64) if most >= size), -(-size // 64) * 64) for size in sizes)


def _fields() -> int:
    from lora_core.kernels.low_rank_triton import FIELDS

    return FIELDS
