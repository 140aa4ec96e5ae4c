"""The elementwise parts of a decoder layer, forward and backward, each joined with the low-rank update of the frozen
product that it reads: `y + h B^T` and `dx + dh A` are never written for themselves.

    norm_forward      x + y + h B^T -> x', RMSNorm(x') * weight          (Zhang and Sennrich 2019)
    norm_backward     its input gradient, plus what flows around it, and the shrink of that for the product before
    rope_forward_     rotary positions on q and k (Su et al. 2021), in place; before it RMSNorm of each head (Qwen3)
    rope_backward     the inverse rotation, on the gradients of q and k; after it the norm's input gradient
    swiglu_forward    silu(gate) * up                                     (Shazeer 2020)
    swiglu_backward_  gradients of gate and up in their place, the activation in the gradient's

Sums run in fp32 (fp64 for fp64); results are rounded once to the dtype of the batch.

The norm's backward pass needs the sum over a row of dn n, n the normed row and dn its whole gradient. With y = W n and
dn = dy W (W with its adapters) that is the sum of dy y: `products`. Where dy is made, y is at hand, and the norm's
kernel need not read its row twice.

With DoRA in the batch (`low_rank.dora`) y is `scale (W n + h B^T)` plus bias. The gradients that rope's and SwiGLU's
backward passes return are then those of what is in brackets, and m's are added; see `dora.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.kernels import dispatch
from lora_core.kernels.dora import apply_dora_scales_, dora_backward_
from lora_core.kernels.low_rank import expand_, shrink_gradient
from lora_core.kernels.masked_low_rank import expand_gradient_, shrink
from lora_core.kernels.operands import EXACT_DTYPES, LowRank, Rope


def norm_forward(
    x: Tensor, y: Tensor | None, h: Tensor | None, low_rank: LowRank, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x, y `[T, H]` -> (x + y + h B^T, its RMSNorm, fp32 `[T]` reciprocal root mean squares).

    y None: x itself is normed and returned. y is used up; with DoRA, whose `dora_backward` needs it, it is what was
    added to x.
    """
    if dispatch.runs_in_triton(x):
        from lora_core.kernels import layer_ops_triton

        return layer_ops_triton.norm_forward(x, y, h, low_rank, weight, eps)
    if y is not None:
        x = x + _updated_(y, h, low_rank)
    normed, rstd = _rms_norm(x, weight, eps)
    return x, normed, rstd


def norm_backward(
    dn: Tensor,
    dh: Tensor | None,
    low_rank: LowRank,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    products: Tensor | None,
    below: LowRank,
) -> tuple[Tensor, Tensor | None]:
    """Gradient with respect to x `[T, H]`: of the norm, whose output's is dn + dh A, plus `residual`; dn is used up.
    Also its shrink for the product that x is a sum with, `[T, width]` (None where nothing adapts it, and with DoRA).

    `products` fp32 `[T]`: sums of dn n, if they are known; CPUs make them here.
    """
    if dispatch.runs_in_triton(x):
        from lora_core.kernels import layer_ops_triton

        return layer_ops_triton.norm_backward(dn, dh, low_rank, x, rstd, weight, residual, products, below)
    if dh is not None:
        expand_gradient_(dn, dh, low_rank)
    dx = _rms_norm_gradient(dn, x, rstd[:, None], weight)
    dx = (dx if residual is None else dx.add_(residual)).to(x.dtype)
    return dx, shrink_gradient(dx, below) if below.width and not below.dora else None


def rope_forward_(
    y: Tensor, h: Tensor | None, low_rank: LowRank, rope: Rope, with_backward: bool
) -> tuple[Tensor, Tensor | None]:
    """y `[T, q + k + v]`, in place: plus h B^T and bias, its first `rotated_heads` heads normed if there is a norm, and
    rotated by their positions. Also q and k `[T, q + k]` before the norm, if its backward pass is to come.

    They are saved because the rotated ones do not tell them: where the norm's weight is small in one half of a head and
    large in the other, the small numbers are lost in rounding.
    """
    if dispatch.runs_in_triton(y):
        from lora_core.kernels import rope_triton

        return rope_triton.rope_forward_(y, h, low_rank, rope, with_backward)
    _updated_(y, h, low_rank)
    if rope.bias is not None:
        y += rope.bias
    heads, unnormed = _rotated_heads(y, rope), None
    if rope.norm is not None:
        unnormed = heads.flatten(1).clone() if with_backward else None
        heads.copy_(_rms_norm(heads, rope.norm.weight, rope.norm.eps)[0])
    _rotate_(heads, rope, 1.0)
    return y, unnormed


def rope_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, y: Tensor, unnormed: Tensor | None, low_rank: LowRank, rope: Rope
) -> tuple[Tensor, Tensor | None]:
    """dq, dk, dv `[T, heads, d]` of the rotated q and k -> the gradient of q, k, v side by side, `[T, q + k + v]`, and
    on CUDA the `products` for the norm before. y and `unnormed` are what `rope_forward_` returned.
    """
    if dispatch.runs_in_triton(dq):
        from lora_core.kernels import rope_triton

        return rope_triton.rope_backward(dq, dk, dv, y, unnormed, low_rank, rope)
    dy = torch.cat([part.reshape(part.shape[0], -1) for part in (dq, dk, dv)], dim=1)
    heads = _rotated_heads(dy, rope)
    _rotate_(heads, rope, -1.0)
    if rope.norm is not None:
        assert unnormed is not None
        x = unnormed.view_as(heads)
        heads.copy_(_rms_norm_gradient(heads, x, _rstd(x.to(_wide(x)), rope.norm.eps), rope.norm.weight))
    if low_rank.dora:
        y = y.clone()
        if unnormed is not None:
            _rotated_heads(y, rope).copy_(unnormed.view_as(heads))
        else:
            _rotate_back_(_rotated_heads(y, rope), rope)
        return dora_backward_(dy, y if rope.bias is None else y.sub_(rope.bias), low_rank), None
    return dy, None


def swiglu_forward(y: Tensor, h: Tensor | None, low_rank: LowRank, down: LowRank) -> tuple[Tensor, Tensor | None]:
    """y `[T, 2 I]`, the frozen gate and up side by side -> `silu(gate) * up` `[T, I]` of the updated ones, and its
    shrink for the next product, `[T, width]` (None where nothing adapts it).

    On CPU y is updated in place, on CUDA it stays; `swiglu_backward_` knows.
    """
    if dispatch.runs_in_triton(y):
        from lora_core.kernels import swiglu_triton

        return swiglu_triton.swiglu_forward(y, h, low_rank, down)
    _updated_(y, h, low_rank)
    gate, up = y.chunk(2, dim=1)
    activation = _silu(gate, low_rank).mul_(up)
    return activation, shrink(activation, down) if down.width else None


def recomputed_gate_up(y: Tensor, h: Tensor | None, low_rank: LowRank) -> Tensor:
    """y as `swiglu_forward` left it, where its frozen product was made again."""
    return y if dispatch.runs_in_triton(y) else _updated_(y, h, low_rank)


def swiglu_backward_(
    dact: Tensor, dh_down: Tensor | None, down: LowRank, y: Tensor, h: Tensor | None, low_rank: LowRank
) -> tuple[Tensor | None, Tensor | None]:
    """dact + dh A `[T, I]` is the activation's gradient; afterwards y `[T, 2 I]` holds that of gate and up, and dact
    holds the activation itself, which the gradient of the next product's A needs. Returns the shrunk gradient of gate
    and up, `[T, width]`, and on CUDA the `products` for the norm before.
    """
    if dispatch.runs_in_triton(dact):
        from lora_core.kernels import swiglu_triton

        return swiglu_triton.swiglu_backward_(dact, dh_down, down, y, h, low_rank)
    if dh_down is not None:
        expand_gradient_(dact, dh_down, down)
    updated = y.clone() if low_rank.dora else None
    gate, up = y.chunk(2, dim=1)
    silu, dsilu = _silu(gate, low_rank), dact * up
    dup = dact * silu
    torch.mul(silu, up, out=dact)
    up.copy_(dup)
    for own, own_gate in zip(_by_segment(dsilu, low_rank), _by_segment(gate, low_rank), strict=True):
        torch.ops.aten.silu_backward.grad_input(own, own_gate, grad_input=own_gate)
    if updated is not None:
        dora_backward_(y, updated, low_rank)
    return shrink_gradient(y, low_rank) if low_rank.width else None, None


def _silu(gate: Tensor, low_rank: LowRank) -> Tensor:
    silu = gate.new_empty(gate.shape)
    for own, target in zip(_by_segment(gate, low_rank), _by_segment(silu, low_rank), strict=True):
        torch.ops.aten.silu.out(own, out=target)
    return silu


def _by_segment(x: Tensor, low_rank: LowRank) -> Sequence[Tensor]:
    """x split for SiLU, which torch computes in vectors, and the last few elements of each thread's share one at a time
    with another rounding. In one call it would depend on the neighbours which elements those are (seen with two threads
    at 172 features, with three at 11,008); in bf16, which promises no bits, it is one call.
    """
    return low_rank.segments.split(x) if x.dtype in EXACT_DTYPES else (x,)


def _updated_(y: Tensor, h: Tensor | None, low_rank: LowRank) -> Tensor:
    """A frozen product with all that its adapters add, on CPU."""
    if h is not None:
        expand_(y, h, low_rank)
    return apply_dora_scales_(y, low_rank) if low_rank.dora else y


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x over its root mean square along the last dimension, times weight; the reciprocal of that root `[...]`."""
    wide = x.to(_wide(x))
    rstd = _rstd(wide, eps)
    scaled = wide * rstd if wide is x else wide.mul_(rstd)
    return scaled.to(x.dtype).mul_(weight), rstd.squeeze(-1)


def _rms_norm_gradient(dn: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """With g = dn * weight and n = rstd x: rstd (g - n mean(g n)), in fp32; dn is used up."""
    g, wide = dn.to(_wide(x)).mul_(weight.to(_wide(x))), x.to(_wide(x))
    along_x = (g * wide).mean(-1, keepdim=True).mul_(rstd.pow(3))
    return g.mul_(rstd).addcmul_(wide, along_x, value=-1)


def _rstd(wide: Tensor, eps: float) -> Tensor:
    """By a norm, which is one pass over `wide`: squares and their mean would be two."""
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd: Tensor = norm.square_().div_(wide.shape[-1]).add_(eps).rsqrt_()
    return rstd


def _rotated_heads(y: Tensor, rope: Rope) -> Tensor:
    """`[T, heads, d]`: a view of y's q and k."""
    return y[:, : rope.rotated_heads * rope.head_size].view(-1, rope.rotated_heads, rope.head_size)


def _rotate_(heads: Tensor, rope: Rope, direction: float) -> None:
    first, second = heads.chunk(2, dim=-1)
    across = torch.cat([second, first], dim=-1)
    sin = rope.sin * direction
    cos, sin = (torch.cat(halves, dim=1)[:, None].to(heads.dtype) for halves in ([rope.cos, rope.cos], [-sin, sin]))
    heads.mul_(cos).addcmul_(across, sin)


def _rotate_back_(heads: Tensor, rope: Rope) -> None:
    """As they were before `_rotate_`. With rounded cos and sin the inverse is not quite the transpose."""
    _rotate_(heads, rope, -1.0)
    squares = rope.cos.to(_wide(heads)).square() + rope.sin.to(_wide(heads)).square()
    heads /= torch.cat([squares, squares], dim=1)[:, None]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
