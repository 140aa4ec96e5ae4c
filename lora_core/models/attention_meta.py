"""The memory of fused attention, without its numbers: on the meta device torch would choose other kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_core.kernels.dispatch import device_type


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q `[..., heads, d]`, k and v `[..., kv heads, d]` -> `[..., heads, d]`, all on the meta device."""
    out: Tensor = _FusedAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return out


class _FusedAttention(torch.autograd.Function):
    """Keeps its inputs, its output and one fp32 number a row and head. On a GPU the backward pass sums dq in fp32, and
    makes dk and dv for every query head first.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, row_numbers = ctx.saved_tensors
        made = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        if device_type(q.device) == "cuda":
            before = [q.new_empty(q.shape, dtype=torch.float32), torch.empty_like(row_numbers)]
            before += [q.new_empty(q.shape) for part in (k, v) if part.shape != q.shape]
            del before  # until here all of it is there at once
        return made
