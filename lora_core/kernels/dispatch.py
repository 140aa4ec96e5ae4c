"""Where a kernel runs: in Triton, or as its definition in torch; and what becomes of both in a dry run.

Tensors on the meta device have shapes and no numbers. What is computed with them takes the memory that it would take on
the kind of device that they stand for: the same code makes the same tensors, and launches nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_meta_stands_for = ContextVar("device type that the meta device stands for", default="cpu")


@contextmanager
def meta_stands_for(device_type: str) -> Iterator[None]:
    """Within it, and on this thread alone, the meta device is taken for one of this type."""
    token = _meta_stands_for.set(device_type)
    try:
        yield
    finally:
        _meta_stands_for.reset(token)


def device_type(device: torch.device) -> str:
    """The type of a device, or of what it stands for."""
    return _meta_stands_for.get() if device.type == "meta" else device.type


def runs_in_triton(x: Tensor) -> bool:
    """Say whether Triton's version takes x: on CUDA, but where `tests/bench/kernels_gpu.py` times the definitions."""
    return x.is_cuda or (x.is_meta and _meta_stands_for.get() == "cuda")


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *arguments: object, **options: object) -> None:
    """Launch one of Triton's kernels, which takes x first; on the meta device nothing is to be computed."""
    if not x.is_meta:
        kernel[grid](x, *arguments, **options)
