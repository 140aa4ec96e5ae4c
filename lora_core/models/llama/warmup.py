"""Kernels are warmed up before they are needed. Triton compiles a kernel when it is first launched, and all that train
would wait for it, seconds where a newcomer's ranks, magnitudes or dropout are the first of their kind. So the thread
that prepares a newcomer sends a few tokens through the decoder with dummy adapters of its shapes, alone and beside the
others'.

Dummy adapters hold zeros and share their memory: some megabytes at 8B.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from threading import Lock

import torch
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.models.attention import DocumentAttention
from lora_core.models.llama.decoder import Checkpointing, Decoder, DecoderInput, rounded_width

log = logging.getLogger("lora.engine")

TOKENS = 16
"""Of each adapter; kernels are not specialised to their number."""


class KernelWarmup:
    """That of one decoder, once for each kind of batch."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._known: set[tuple[object, ...]] = set()
        self._lock = Lock()

    def warm_up(self, newcomer: Adapter, others: Sequence[Adapter], checkpointing: Checkpointing) -> None:
        """Launch the kernels of batches of a newcomer, beside none, each and all of the others. What goes wrong is
        logged: the kernels would then be compiled when they are needed.
        """
        with self._lock:
            for colocated in ([], *([other] for other in others), others):
                adapters = [newcomer, *colocated]
                kind = (checkpointing, *self._kernels(adapters))
                if kind in self._known:
                    continue
                self._known.add(kind)
                try:
                    with torch.no_grad(), torch.cuda.device_of(self._decoder.embedding):  # Triton's is the thread's
                        self._pass(adapters, checkpointing)
                except Exception:
                    log.exception("event=warmup_failed adapters=%d", len(adapters))

    def _kernels(self, adapters: Sequence[Adapter]) -> list[tuple[object, ...]]:
        """What the kernels of each group are specialised to."""
        from lora_core.kernels.low_rank_triton import ranks_of

        kernels: list[tuple[object, ...]] = []
        for group in self._decoder.groups:
            ranks = [[len(adapter.a[name]) for name in group.names if name in adapter.a] for adapter in adapters]
            adapted = [adapter for adapter, present in zip(adapters, ranks, strict=True) if present]
            if not adapted:
                kernels.append(())
                continue
            width, rank = rounded_width(map(sum, ranks)), max(itertools.chain(*ranks))
            drops, dora = any(adapter.dropout > 0 for adapter in adapted), any(adapter.magnitude for adapter in adapted)
            kernels.append((*ranks_of(width).values(), *ranks_of(rank).values(), drops, dora))
        return kernels

    def _pass(self, adapters: Sequence[Adapter], checkpointing: Checkpointing) -> None:
        decoder, lengths = self._decoder, [TOKENS] * len(adapters)
        device = decoder.embedding.device
        zeros = torch.zeros(sum(lengths), dtype=torch.int64, device=device)
        positions = torch.arange(TOKENS, device=device).repeat(len(lengths))
        segments, keys = list(enumerate(lengths)), zeros if any(adapter.dropout > 0 for adapter in adapters) else None
        labels = [(torch.arange(TOKENS, device=device) + index * TOKENS, zeros[:TOKENS]) for index, _ in segments]
        args = [decoder.kernel_args(self._dummy(adapter)) for adapter in adapters]
        attention = DocumentAttention(lengths, lengths, decoder.scaling, device)
        training = decoder.batch(DecoderInput(zeros, positions, segments, keys), args, attention)
        decoder.forward_backward(training, labels, checkpointing)
        decoder.evaluate(decoder.batch(DecoderInput(zeros, positions, segments), args, attention), labels)

    def _dummy(self, like: Adapter) -> Adapter:
        """An adapter as `FlatAdapter` has one, of these shapes and options."""
        dtype = self._decoder.embedding.dtype
        wide = torch.promote_types(dtype, torch.float32)
        trained = [self._with_gradients(of, wide, transposed=of is like.b) for of in (like.a, like.b, like.magnitude)]
        a, b = self._shared(like.a, dtype), self._shared(like.b, dtype, transposed=True)
        cast = {name: (a[name], b[name]) for name in a}
        return Adapter(like.scale, trained[0], trained[1], like.dropout, cast, magnitude=trained[2])

    def _with_gradients(self, of: Mapping[str, Tensor], dtype: torch.dtype, transposed: bool) -> dict[str, Tensor]:
        weights, gradients = (self._shared(of, dtype, transposed) for _ in range(2))
        for name, weight in weights.items():
            weight.requires_grad_().grad = gradients[name]
        return weights

    def _shared(self, of: Mapping[str, Tensor], dtype: torch.dtype, transposed: bool = False) -> dict[str, Tensor]:
        """Zeros of these shapes: those of a group end to end, as the decoder wants them, all groups in one memory."""
        groups = [[name for name in group.names if name in of] for group in self._decoder.groups]
        most = max(sum(of[name].numel() for name in names) for names in groups)
        memory, found = torch.zeros(most, dtype=dtype, device=self._decoder.embedding.device), {}
        for names in groups:
            sizes = [of[name].numel() for name in names]
            parts = memory.split([*sizes, most - sum(sizes)])
            for name, part in zip(names, parts, strict=False):
                shape = of[name].shape
                found[name] = part.view(shape[1], shape[0]).t() if transposed else part.view(shape)
        return found
