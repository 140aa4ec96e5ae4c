"""DoRA's part of a layer (`adapters/dora.py`): y = scale v, v = x W^T + h B^T, row by row of W, for the adapters of a
batch that have magnitudes; other rows stay as they are.

    apply_dora_scales_   v -> y, after `expand_`; on CUDA the kernels that add h B^T do it
    dora_backward_       dy -> dv = scale dy, which replaces dy in all products, and m's gradient; on CUDA likewise
    dora_backward        the same where dy stays

The norm is a constant to the gradient, so m's is the sum of dy v / norm, which is that of dy y / m: y is what forward
passes keep. Where m is 0 a row's y is 0, and m's gradient is taken for 0. Training comes to such rows only where W has
zeros, and there B learns nothing either; a row whose m was set to 0 by hand stays out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_core.kernels import dispatch
from lora_core.kernels.operands import LowRank

CPU_ROWS = 128
"""Rows that are multiplied by DoRA scales at a time: torch widens all of bf16 that it multiplies by fp32."""


def apply_dora_scales_(y: Tensor, low_rank: LowRank) -> Tensor:
    """Multiply y `[T, out]` in place, on CPU, by m / norm of each adapter's rows."""
    for adapter, rows in low_rank.present():
        for part, columns, _ in adapter.present(low_rank.group):
            if part.magnitude is not None:
                for few in y[rows, columns].split(CPU_ROWS):
                    few.mul_(part.magnitude.scale)
    return y


def dora_backward_(dy: Tensor, y: Tensor, low_rank: LowRank) -> Tensor:
    """dy `[T, out]`, in place, adding to m's gradients; y `[T, out]` is without bias."""
    for adapter, rows in low_rank.present():
        for part, columns, _ in adapter.present(low_rank.group):
            if (magnitude := part.magnitude) is not None:
                own, divisor = dy[rows, columns], torch.where(magnitude.m == 0, torch.inf, magnitude.m)
                for few, of_few in zip(own.split(CPU_ROWS), y[rows, columns].split(CPU_ROWS), strict=True):
                    magnitude.gradient.add_((few.to(divisor.dtype) * of_few).sum(0) / divisor)
                    few.mul_(magnitude.scale)
    return dy


def dora_backward(dy: Tensor, y: Tensor, low_rank: LowRank) -> Tensor:
    """dy `[T, out]` -> dv, likewise."""
    if dispatch.runs_in_triton(dy):
        from lora_core.kernels import dora_triton

        return dora_triton.dora_backward(dy, y, low_rank)
    return dora_backward_(dy.clone(), y, low_rank)
