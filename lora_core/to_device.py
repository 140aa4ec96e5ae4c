"""How what the host made gets to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Queued behind what a GPU still computes: with memory that is not pinned, the host might be held up till then."""
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.numpy()[...] = tensor.numpy()  # numpy wakes no threads (see `packing.Columns`)
    return pinned.to(device, non_blocking=True)
