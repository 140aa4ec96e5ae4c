"""What training leaves for serving to check: losses of a few examples, each computed alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lora_core.data.dataset import Example
from lora_core.data.packing import Chunk, pack
from lora_core.models.forward import Forward
from lora_core.models.step import Bound


@torch.no_grad()
def probe_losses(forward: Forward, adapter: Bound | None, examples: Iterable[Example]) -> list[float]:
    """Summed loss of each example's labels under `adapter` (None: the base), without dropout."""
    losses = []
    for index, example in enumerate(examples):
        batch = pack([Chunk("probe", ((index, example),), None)], forward.device)
        loss, _ = forward.evaluate(forward.ready(batch, [adapter], [None]))
        losses.append(float(loss[0]))
    return losses
