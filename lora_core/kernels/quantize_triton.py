"""`quantize.py` in Triton: one pass over memory each (torch's own operators take four and six)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.dispatch import launch
from lora_core.kernels.operands import FP8_MAX, FP8_TINY, NF4_BLOCK, NF4_LEVELS, Nf4


@triton.jit
def _quantize_rows(x, q, scales, K, TINY: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    values = tl.load(x + i * K + k, mask=k < K, other=0.0).to(tl.float32)
    # NaN must stay: a row's largest number is NaN where any is (`tl.max` alone would drop it).
    poisoned = tl.sum((values != values).to(tl.int32)) > 0
    largest = tl.where(poisoned, float("nan"), tl.max(tl.abs(values)))
    scale = tl.where(largest < TINY, TINY, largest) / MAX
    tl.store(scales + i, scale)
    tl.store(q + i * K + k, (values / scale).to(q.dtype.element_ty), mask=k < K)


@triton.jit
def _dequantize_nf4(codes, scales, levels, out, BLOCK: tl.constexpr, SCALE_OF: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(codes + i // 2)
    code = tl.where(i % 2 == 0, code >> 4, code & 15).to(tl.int32)
    value = tl.load(levels + code) * tl.load(scales + i // SCALE_OF)
    tl.store(out + i, value.to(out.dtype.element_ty))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `quantize.quantize_rows`."""
    rows, width = x.shape
    q = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, device=x.device)
    block = triton.next_power_of_2(width)
    warps = 4 if block <= 4096 else 16
    launch(_quantize_rows, (rows,), x, q, scales, width, TINY=FP8_TINY, MAX=FP8_MAX, BLOCK=block, num_warps=warps)
    return q, scales


_levels: dict[torch.device, Tensor] = {}


def dequantize_nf4(packed: Nf4, dtype: torch.dtype) -> Tensor:
    """See `quantize.dequantize_nf4`."""
    device = packed.codes.device
    if device not in _levels:
        _levels[device] = torch.tensor(NF4_LEVELS, device=device)
    out = torch.empty(packed.shape, dtype=dtype, device=device)
    block = 1024 if out.numel() % 1024 == 0 else NF4_BLOCK
    launch(
        _dequantize_nf4, (out.numel() // block,),
        packed.codes, packed.scales, _levels[device], out, BLOCK=block, SCALE_OF=NF4_BLOCK, num_warps=4,
    )  # fmt: skip
    return out
