"""Where a kernel runs: in Triton, or as its definition in torch."""

from __future__ import annotations

from torch import Tensor


def runs_in_triton(x: Tensor) -> bool:
    """Say whether Triton's version takes x: on CUDA, but where `tests/bench/kernels_gpu.py` times the definitions."""
    return x.is_cuda
