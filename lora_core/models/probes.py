"""What training leaves for serving to check: losses of a few short examples, all computed in one pass."""

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
    chunks = [Chunk("probe", ((index, example),), None) for index, example in enumerate(examples)]
    batch = pack(chunks, forward.device)
    losses, _ = forward.evaluate(forward.ready(batch, [adapter] * len(chunks), [None] * len(chunks)))
    return [float(loss) for loss in losses]
