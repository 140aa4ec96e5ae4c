"""An adapter's weights end to end in one vector, of which A, B and m are views: all A in the model's order, then all B,
then DoRA's m, so that each kind is one slice.

Every tensor starts at a multiple of 8 numbers, as vector loads want; what lies between stays zero. Where the base
computes in bf16, a bf16 copy of the vector is what products use; it is made anew after each step. A base in fp64 makes
all of it fp64.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.kernels.transfer import to_host

ALIGNMENT = 8
"""Numbers: 16 bytes of bf16."""


class Layout:
    """Where the weights of an adapter lie in its vector of `length` numbers; B begins at `size_a`."""

    def __init__(self, like: Adapter) -> None:
        weights, count = like.trained, len(like.a)
        offsets = [0, *accumulate(-(-weight.numel() // ALIGNMENT) * ALIGNMENT for weight in weights)]
        self.size_a, self.length = offsets[count], offsets[-1]
        self._parts = list(zip(offsets, [weight.shape for weight in weights], strict=False))
        self._b_indices = range(count, 2 * count)

    def views(self, vector: Tensor) -> list[Tensor]:
        """Every A, then every B, then every m, in a vector of this layout. B lies transposed, `[r, out]`, which is how
        the decoder's kernels read it fastest (`kernels/low_rank_triton.py`).
        """
        views = []
        for index, (offset, shape) in enumerate(self._parts):
            part = vector[offset : offset + shape.numel()]
            is_b = index in self._b_indices
            views.append(part.view(shape[1], shape[0]).t() if is_b else part.view(shape))
        return views

    def viewed(self, adapter: Adapter, vector: Tensor) -> Adapter:
        """The adapter with its weights in this vector, and without its residual, which is a vector of its own."""
        views, count = self.views(vector), len(adapter.a)
        return replace(
            adapter,
            a=dict(zip(adapter.a, views[:count], strict=True)),
            b=dict(zip(adapter.b, views[count : 2 * count], strict=True)),
            magnitude=dict(zip(adapter.magnitude, views[2 * count :], strict=True)),
            residual=None,
        )


class HostAdapter:
    """A copy of an adapter's A, B and m on one vector in host memory, which the device gets in one piece: a copy a
    weight would hold up a live session. `adapter` has views into it.
    """

    def __init__(self, start: Adapter, wide: torch.dtype, pinned: bool) -> None:
        self.layout = Layout(start)
        # A begins in host memory, or on the meta device.
        device = start.trained[0].device
        self.vector = torch.zeros(self.layout.length, dtype=wide, device=device, pin_memory=pinned)
        for view, weight in zip(self.layout.views(self.vector), start.trained, strict=True):
            view.copy_(weight.detach())
        self.adapter = self.layout.viewed(start, self.vector)


class FlatAdapter:
    """The same on the device, with the vector in the dtype that the base computes in besides."""

    def __init__(self, host: HostAdapter, device: torch.device, dtype: torch.dtype) -> None:
        self.layout = host.layout
        self.vector = host.vector.to(device)  # where that is the host, it is the same
        self.cast = self.vector.to(dtype)  # the vector itself where the dtype is its own
        adapter, casts, count = host.adapter, self.layout.views(self.cast), len(host.adapter.a)
        pairs = zip(casts[:count], casts[count : 2 * count], strict=True)
        adapter = replace(adapter, cast=dict(zip(adapter.a, pairs, strict=True)))
        self.adapter = self.layout.viewed(adapter, self.vector)

    def on_host(self) -> Adapter:
        """A copy of what it is now, which arrives as that of `to_host` does."""
        return replace(self.layout.viewed(self.adapter, to_host(self.vector)), cast=None)
