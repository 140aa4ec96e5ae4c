"""Kernels before they are needed. Triton compiles a kernel when it is first launched, and all that train would wait for
it, seconds where a newcomer's ranks, magnitudes or dropout are the first of their kind. So the thread that prepares a
newcomer sends a few rows through the decoder with adapters of its shapes, alone and beside the others'.

These adapters hold zeros and share their memory: some megabytes at 8B.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from threading import Lock

import torch
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.models.attention import DocumentAttention
from lora_core.models.llama.decoder import Checkpointing, Decoder, DecoderInput, rounded_width

log = logging.getLogger("lora.engine")

ROWS = 16
"""Of each adapter; kernels are not specialised to their number."""


class Rehearsals:
    """Those of one decoder; each kind of batch is rehearsed once."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._known: set[tuple[object, ...]] = set()
        self._lock = Lock()

    def before(self, newcomer: Adapter, others: Sequence[Adapter], checkpointing: Checkpointing) -> None:
        """Launch the kernels of batches of a newcomer, beside none, each and all of the others. What goes wrong is
        logged: the kernels would then be compiled when they are needed.
        """
        with self._lock:
            for company in ([], *([other] for other in others), others):
                adapters = [newcomer, *company]
                kind = (checkpointing, *self._kernels(adapters))
                if kind in self._known:
                    continue
                self._known.add(kind)
                try:
                    with torch.no_grad(), torch.cuda.device_of(self._decoder.embedding):  # Triton's is the thread's
                        self._pass(adapters, checkpointing)
                except Exception:
                    log.exception("event=rehearsal_failed adapters=%d", len(adapters))

    def _kernels(self, adapters: Sequence[Adapter]) -> list[tuple[object, ...]]:
        """What the kernels of each group are specialised to."""
        from lora_core.kernels.low_rank_triton import ranks_of

        found: list[tuple[object, ...]] = []
        for group in self._decoder.groups:
            present = [(one, [len(one.a[name]) for name in group.names if name in one.a]) for one in adapters]
            present = [(one, ranks) for one, ranks in present if ranks]
            if not present:
                found.append(())
                continue
            width, rank = rounded_width(sum(ranks) for _, ranks in present), max(max(ranks) for _, ranks in present)
            drops, dora = any(one.dropout > 0 for one, _ in present), any(one.magnitude for one, _ in present)
            found.append((*ranks_of(width).values(), *ranks_of(rank).values(), drops, dora))
        return found

    def _pass(self, adapters: Sequence[Adapter], checkpointing: Checkpointing) -> None:
        decoder, lengths = self._decoder, [ROWS] * len(adapters)
        device = decoder.embedding.device
        zeros = torch.zeros(sum(lengths), dtype=torch.int64, device=device)
        positions = torch.arange(ROWS, device=device).repeat(len(lengths))
        segments, keys = list(enumerate(lengths)), zeros if any(adapter.dropout > 0 for adapter in adapters) else None
        labels = [(torch.arange(ROWS, device=device) + place * ROWS, zeros[:ROWS]) for place, _ in segments]
        views = [decoder.kernel_args(self._stand_in(adapter)) for adapter in adapters]
        attention = DocumentAttention(lengths, lengths, decoder.scaling, device)
        training = decoder.batch(DecoderInput(zeros, positions, segments, keys), views, attention)
        decoder.forward_backward(training, labels, checkpointing)
        decoder.evaluate(decoder.batch(DecoderInput(zeros, positions, segments), views, attention), labels)

    def _stand_in(self, like: Adapter) -> Adapter:
        """An adapter as `FlatAdapter` has one, of these shapes and options."""
        dtype = self._decoder.embedding.dtype
        wide = torch.promote_types(dtype, torch.float32)
        trained = [self._with_gradients(of, wide, turned=of is like.b) for of in (like.a, like.b, like.magnitude)]
        a, b = self._shared(like.a, dtype), self._shared(like.b, dtype, turned=True)
        cast = {name: (a[name], b[name]) for name in a}
        return Adapter(like.scale, trained[0], trained[1], like.dropout, cast, magnitude=trained[2])

    def _with_gradients(self, of: Mapping[str, Tensor], dtype: torch.dtype, turned: bool) -> dict[str, Tensor]:
        weights, gradients = (self._shared(of, dtype, turned) for _ in range(2))
        for name, weight in weights.items():
            weight.requires_grad_().grad = gradients[name]
        return weights

    def _shared(self, of: Mapping[str, Tensor], dtype: torch.dtype, turned: bool = False) -> dict[str, Tensor]:
        """Zeros of these shapes: those of a group end to end, as the decoder wants them, all groups in one memory."""
        groups = [[name for name in group.names if name in of] for group in self._decoder.groups]
        most = max(sum(of[name].numel() for name in names) for names in groups)
        memory, found = torch.zeros(most, dtype=dtype, device=self._decoder.embedding.device), {}
        for names in groups:
            sizes = [of[name].numel() for name in names]
            parts = memory.split([*sizes, most - sum(sizes)])
            for name, part in zip(names, parts, strict=False):
                shape = of[name].shape
                found[name] = part.view(shape[1], shape[0]).t() if turned else part.view(shape)
        return found
