"""Eight- and four-bit numbers: fp8 by rows, for products on Hopper's matrix units, and nf4 by blocks, for memory.

fp8   x_ij = s_i q_ij,  s_i = max_j |x_ij| / 448,  q in float8_e4m3fn       (Micikevicius et al. 2022)
nf4   w_k  = s_b t[c_k], s_b = max over a block of 64 of |w|, c four bits   (QLoRA, Dettmers et al. 2023)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_core.kernels import dispatch
from lora_core.kernels.operands import FP8_MAX, FP8_TINY, NF4_BLOCK, NF4_LEVELS, Nf4


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[n, k]` -> (float8_e4m3fn `[n, k]`, fp32 scales `[n, 1]`)."""
    if dispatch.runs_in_triton(x):
        from lora_core.kernels import quantize_triton

        return quantize_triton.quantize_rows(x)
    scales = x.abs().amax(-1, keepdim=True).float().clamp(min=FP8_TINY) / FP8_MAX
    return (x.float() / scales).to(torch.float8_e4m3fn), scales


def quantize_nf4(weight: Tensor) -> Nf4:
    """weight `[out, in]` of a multiple of 64 elements -> its nearest levels, block by block along the rows."""
    blocks = weight.reshape(-1, NF4_BLOCK)
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    borders = (levels[1:] + levels[:-1]) / 2
    codes = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(blocks.shape[0], device=weight.device)
    for first in range(0, blocks.shape[0], 1 << 16):  # a slice at a time: int64 indices of a whole matrix are 16 x it
        part = blocks[first : first + (1 << 16)].float()
        largest = part.abs().amax(-1)
        scaled = part / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        index = torch.bucketize(scaled, borders).to(torch.uint8).view(-1, 2)
        start = first * NF4_BLOCK // 2
        codes[start : start + index.shape[0]] = (index[:, 0] << 4) | index[:, 1]
        scales[first : first + part.shape[0]] = largest
    return Nf4(codes, scales, (weight.shape[0], weight.shape[1]))


def dequantize_nf4(packed: Nf4, dtype: torch.dtype) -> Tensor:
    """Return the matrix again, `[out, in]` in `dtype`."""
    if dispatch.runs_in_triton(packed.codes):
        from lora_core.kernels import quantize_triton

        return quantize_triton.dequantize_nf4(packed, dtype)
    levels = torch.tensor(NF4_LEVELS, device=packed.codes.device)
    # Both numbers of a byte by one look-up of eight bytes: 2.8 ns an element on one core, one by one 7.9.
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1).view(torch.int64).flatten()
    values = pairs.index_select(0, packed.codes.int()).view(torch.float32).view(-1, NF4_BLOCK)
    return values.mul_(packed.scales[:, None]).to(dtype).view(packed.shape)
