"""The low-rank products of many adapters on one batch, one adapter to a stretch of rows (`Segments`).

    h  = scale * x A^T             shrink            [T, in]  -> [T, width]
    dh = scale * dy B              shrink_gradient   [T, out] -> [T, width]
    dA += dh^T x                   add_a_gradients
    dB += dy^T h                   add_b_gradients
    dx += dh A                     expand_gradient_

x W^T + h B^T is the layer's output and dy W + dh A its input gradient; those two sums are made in the elementwise
kernels (`layer_ops.py`), which read the frozen product anyway. Where some adapter of a batch drops features of x, the
first, third and last are those of `masked_low_rank.py`, which asks here elsewhere.
"""

from __future__ import annotations

from torch import Tensor

from lora_core.kernels import dispatch, stacked_low_rank
from lora_core.kernels.operands import LowRank, Norm


def shrink(x: Tensor, low_rank: LowRank) -> Tensor:
    """x `[T, in]` -> `scale * x A^T`, `[T, width]`; columns past an adapter's own ranks are undefined on CUDA."""
    if dispatch.runs_in_triton(x):
        from lora_core.kernels import low_rank_triton

        return low_rank_triton.shrink(x, low_rank)
    if low_rank.stacks is not None:
        return stacked_low_rank.shrink(x, low_rank.stacks)
    h = x.new_zeros(x.shape[0], low_rank.width)
    for adapter, rows in low_rank.present():
        own, scale = h[rows, : adapter.width], adapter.scale
        own.addmm_(x[rows], adapter.a.t(), beta=0, alpha=1.0 if scale is None else scale)
        if scale is None:
            own *= adapter.scales.to(x.dtype)
    return h


def shrink_gradient(dy: Tensor, low_rank: LowRank) -> Tensor:
    """dy `[T, out]` -> `scale * dy B`, `[T, width]`."""
    if dispatch.runs_in_triton(dy):
        from lora_core.kernels import low_rank_triton

        return low_rank_triton.shrink_gradient(dy, low_rank)
    dh = dy.new_zeros(dy.shape[0], low_rank.width)
    for adapter, rows in low_rank.present():
        for part, columns, scale in adapter.present(low_rank.group):
            dh[rows, part.columns].addmm_(dy[rows, columns], part.b, beta=0, alpha=scale)
    return dh


def add_a_gradients(x: Tensor, dh: Tensor, low_rank: LowRank, norm: Norm | None = None) -> None:
    """Add `dh^T x` to A's gradient of every adapter, over its own rows, in fp32. With `norm`, the group's input is that
    norm of x, which need not be in memory: on CPU it is `(dh rstd)^T x` times the norm's weight.
    """
    if dispatch.runs_in_triton(x):
        from lora_core.kernels import low_rank_triton

        low_rank_triton.add_a_gradients(x, dh, low_rank, norm)
        return
    for adapter, rows in low_rank.present():
        left, gradient = dh[rows, : adapter.width], adapter.a_gradient
        if norm is None:
            add_product(gradient, left.t(), x[rows])
        else:
            product = (left * norm.rstd[rows, None]).to(x.dtype).t() @ x[rows]
            gradient.addcmul_(product.to(gradient.dtype), norm.weight.to(gradient.dtype))


def add_b_gradients(dy: Tensor, h: Tensor, low_rank: LowRank) -> None:
    """Add `dy^T h` to B's gradient of every adapter, likewise."""
    if dispatch.runs_in_triton(dy):
        from lora_core.kernels import low_rank_triton

        low_rank_triton.add_b_gradients(dy, h, low_rank)
        return
    for adapter, rows in low_rank.present():
        for part, columns, _ in adapter.present(low_rank.group):
            add_product(part.b_gradient.t(), h[rows, part.columns].t(), dy[rows, columns])


def expand_gradient_(dx: Tensor, dh: Tensor, low_rank: LowRank) -> Tensor:
    """`dx += dh A`, in place: dx `[T, in]`."""
    if dispatch.runs_in_triton(dx):
        from lora_core.kernels import low_rank_triton

        return low_rank_triton.expand_gradient_(dx, dh, low_rank)
    for adapter, rows in low_rank.present():
        dx[rows].addmm_(dh[rows, : adapter.width], adapter.a)
    return dx


def expand_(y: Tensor, h: Tensor, low_rank: LowRank) -> Tensor:
    """`y += h B^T`, in place, on CPU: y `[T, out]`. (On CUDA the elementwise kernels do it.)"""
    if low_rank.stacks is not None:
        return stacked_low_rank.expand_(y, h, low_rank.stacks)
    for adapter, rows in low_rank.present():
        for part, columns, _ in adapter.present(low_rank.group):
            y[rows, columns].addmm_(h[rows, part.columns], part.b.t())
    return y


def add_product(gradient: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """`gradient += scale * left @ right`, in the precision of `gradient` from the product on."""
    if gradient.dtype == left.dtype:
        gradient.addmm_(left, right, alpha=scale)
    else:
        gradient.add_(left @ right, alpha=scale)
