"""The arithmetic of `decoder.py`, kernel by kernel: each file holds the definition in torch, which CPUs run, and hands
CUDA tensors to the Triton version beside it (`*_triton.py`). Tests compare the two.
"""

from __future__ import annotations

from torch import Tensor


def runs_in_triton(x: Tensor) -> bool:
    """Whether the Triton version takes x: on CUDA, but where `tests/bench/kernels_gpu.py` times the definitions."""
    return x.is_cuda
