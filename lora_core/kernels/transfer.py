"""How what the host made gets to the device, and what is wanted of it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Queue a copy behind what a GPU computes: with memory that is not pinned, the host might wait for that."""
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.numpy()[...] = tensor.numpy()  # numpy wakes no threads (see `packing.TokenArrays`)
    return pinned.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Copy into host memory. From a GPU it comes beside what is queued after it, into pinned memory, and is there when
    `arrival` says so: into other memory it takes thirty times as long, and the thread that launches kernels waits.
    """
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)


def arrival(device: torch.device) -> Callable[[], object]:
    """Return what waits, when it is called, for the copies that were begun by now."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


@contextmanager
def beside_kernels(device: torch.device) -> Iterator[None]:
    """Queue what the block sends to a GPU on a stream of its own, and wait for that at the end: no kernel that others
    launch meanwhile waits for it. What it makes is for `kernels_read`.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(_uploads(device)):
        yield
    _uploads(device).synchronize()


def kernels_read(tensors: Iterable[Tensor]) -> None:
    """Say that kernels on this thread's stream read what was made `beside_kernels`: when it is let go, those that are
    queued still may, and its memory is nobody else's before they have run.
    """
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


@cache
def _uploads(device: torch.device) -> torch.cuda.Stream:
    """One for all, as torch keeps the memory of each stream apart."""
    return torch.cuda.Stream(device)
