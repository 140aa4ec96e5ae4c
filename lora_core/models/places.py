"""What a device is called where several processes share it: the same name in all of them, on all nodes."""

from __future__ import annotations

import socket

import torch


def place_of(device: torch.device) -> str:
    """Return a GPU's name and the beginning of its UUID, or whose CPU it is."""
    if device.type != "cuda":
        return f"CPU of {socket.gethostname()}"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {str(properties.uuid)[:8]}"
