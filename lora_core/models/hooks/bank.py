"""Many adapters on one frozen base: `y = x W^T + scale * (x A^T) B^T`, where every row of x names its own A and B.

    x       [1, tokens, in]     tokens of several jobs or requests, each job's contiguous (a `Segment`)
    A       [r, in]   fp32      B [out, r]   fp32        PEFT's layout; cast down to the dtype of x for the product
    y       [1, tokens, out]

The base is shared and never changes: an adapter is added by a forward hook on the linear, so names, weights and state
dict of the model stay those of the checkpoint. Each segment is computed on its own slice of rows. On CPU in eager fp32
that makes an adapter trained beside others equal, bit for bit, to the same adapter trained alone, and it is the wall
against a neighbour's NaN: a mask is not one, since 0 x NaN is NaN.

Backward, for each segment, with h = dropout(x) A^T:

    dh = scale * dy B        dx += dropout(dh A)        A.grad += dh^T dropout(x)        B.grad += scale * dy^T h

With DoRA (`dora.py`), v = x W^T + scale * h B^T and y = g * v + bias: dy is g * dy in the line above and for the base's
own output, and m.grad += sum over rows of dy * v / ||W + scale B A||.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.dora import RowNorms
from lora_core.adapters.dropout import dropout_mask, keep_probability
from lora_core.adapters.targets import AdaptableModules
from lora_core.kernels.low_rank import add_product


@dataclass(frozen=True)
class Segment:
    """`tokens` consecutive tokens that belong to `adapter` (None: the base alone).

    `dropout_keys` is int64 `[tokens]`, one number for each (job seed, optimizer step, example in the step, token in the
    document); None outside training.
    """

    adapter: Adapter | None
    tokens: int
    dropout_keys: Tensor | None = None


class AdapterBank(AdaptableModules):
    """Hooks on a frozen model's linears, through which the tokens of `routed` segments get their adapter's update."""

    def __init__(self, model: PreTrainedModel, row_norms: RowNorms | None = None) -> None:
        super().__init__(model, row_norms)
        self.segments: Sequence[Segment] = ()
        self._residual_segments: Sequence[Segment] = ()  # the same tokens, by the residuals of their adapters
        self._hooks = [module.register_forward_hook(self._hook_for(name)) for name, module in self.modules.items()]
        self._hooks += [
            module.register_forward_hook(self._activate_by_segment)
            for module in model.modules()
            if _is_activation(module)
        ]

    @contextmanager
    def routed(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Within it, forward passes over `[1, sum of tokens]` add each segment's adapter to its tokens."""
        before = self.segments, self._residual_segments
        self.segments, self._residual_segments = [segment for segment in segments if segment.tokens], ()
        residuals = [segment.adapter and segment.adapter.residual for segment in self.segments]
        if any(residuals):
            self._residual_segments = [
                Segment(residual, segment.tokens) for residual, segment in zip(residuals, self.segments, strict=True)
            ]
        try:
            yield
        finally:
            self.segments, self._residual_segments = before

    def head_weights(self, segments: Sequence[Segment]) -> list[Tensor]:
        """The trained A and B that `segments` have on the output head."""
        heads = self.modules.keys() - self.linears.keys()
        return [weight for name in heads for weight in _trained(name, segments)]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _hook_for(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def add_updates(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            for segments in filter(None, (self._residual_segments, self.segments)):
                output = added(segments, args[0], output)
            return output

        def added(segments: Sequence[Segment], x: Tensor, output: Tensor) -> Tensor:
            adapters = _adapters_on(name, segments)
            if not adapters:
                return output
            for adapter in adapters:
                self.add_norms(adapter, [name])
            # The trained weights are named as inputs so that a graph grows from the first adapted linear on.
            trained = _trained(name, segments)
            x = x.reshape(-1, x.shape[-1])
            rows = output.reshape(-1, output.shape[-1])
            bias = getattr(self.modules[name], "bias", None)
            updated: Tensor = _AddUpdates.apply(rows, x, name, bias, segments, *trained)  # type: ignore[no-untyped-call]
            return updated.view_as(output)

        return add_updates

    def _activate_by_segment(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Compute the activation once more, segment by segment, where several of fp32 or fp64 share a row.

        torch computes SiLU and GELU in vectors, and the last few elements of each thread's share one at a time with
        another rounding. In one call over all rows it depends on the neighbours which elements those are (seen with two
        threads at 172 features, with three at 11,008).
        """
        (x,) = args
        if len(self.segments) < 2 or x.shape[0] != 1 or x.dtype not in (torch.float32, torch.float64):
            return None
        parts = x.split([segment.tokens for segment in self.segments], dim=1)
        return torch.cat([module.forward(part) for part in parts], dim=1)


def _adapters_on(name: str, segments: Sequence[Segment]) -> list[Adapter]:
    return [segment.adapter for segment in segments if segment.adapter is not None and name in segment.adapter.a]


def _trained(name: str, segments: Sequence[Segment]) -> list[Tensor]:
    return [
        weight
        for adapter in _adapters_on(name, segments)
        for weight in (adapter.a[name], adapter.b[name])
        if weight.requires_grad
    ]


class _AddUpdates(torch.autograd.Function):
    """output `[tokens, out]` and x `[tokens, in]` -> output plus each segment's update.

    The gradients of A and B are added to their `.grad` here, segment after segment, and never pass through autograd: it
    would first add up the segments of one micro-batch, so that a job's sum depended on which of its chunks shared one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        module: str,
        bias: Tensor | None,
        segments: Sequence[Segment],
        *trained: Tensor,
    ) -> Tensor:
        updated = torch.empty_like(output)
        rows = [segment.tokens for segment in segments]
        saved: list[Tensor | None] = []
        for segment, x_rows, out_rows, target in zip(
            segments, x.split(rows), output.split(rows), updated.split(rows), strict=True
        ):
            adapter = segment.adapter
            if adapter is None or module not in adapter.a:
                target.copy_(out_rows)
                continue
            a, b = adapter.weights(module, x.dtype)
            keep = None
            if segment.dropout_keys is not None and adapter.dropout > 0:
                mask = dropout_mask(x.shape[1], adapter.dropout, segment.dropout_keys, adapter.module_keys[module])
                keep = mask.view(torch.uint8).to(x.dtype)  # from bool it would take eight times as long
                x_rows = _dropped(x_rows, keep, adapter.dropout)
            h = F.linear(x_rows, a)
            v = None
            if module in adapter.magnitude:
                v = _add_dora(adapter, module, F.linear(h, b), out_rows, bias, target).to(x.dtype)
            else:
                torch.addmm(out_rows, h, b.t(), alpha=adapter.scale[module], out=target)
            saved += [h, keep, v]
        ctx.save_for_backward(x, *saved)
        ctx.module, ctx.segments, ctx.trained = module, segments, len(trained)
        return updated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, *saved = ctx.saved_tensors
        module, rows = ctx.module, [segment.tokens for segment in ctx.segments]
        doutput = dy.clone() if any(v is not None for v in saved[2::3]) else dy
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        dx_parts = [None] * len(rows) if dx is None else dx.split(rows)
        for segment, x_rows, dy_rows, dx_rows in zip(
            ctx.segments, x.split(rows), doutput.split(rows), dx_parts, strict=True
        ):
            adapter = segment.adapter
            if adapter is None or module not in adapter.a:
                if dx_rows is not None:
                    dx_rows.zero_()
                continue
            (h, keep, v), saved = saved[:3], saved[3:]
            if v is not None:
                _add_magnitude_gradient(adapter, module, dy_rows, v)
                dy_rows.copy_(dy_rows * adapter.dora_scale(module))
            a, b = adapter.weights(module, x.dtype)
            dh = dy_rows @ b
            if keep is not None:
                x_rows = _dropped(x_rows, keep, adapter.dropout)
            _add_product(adapter.b[module], dy_rows.t(), h, adapter.scale[module])
            _add_product(adapter.a[module], dh.t(), x_rows, adapter.scale[module])
            if dx_rows is not None:
                torch.addmm(dx_rows, dh, a, beta=0, alpha=adapter.scale[module], out=dx_rows)
                if keep is not None:
                    dx_rows.copy_(_dropped(dx_rows, keep, adapter.dropout))
        return (doutput, dx, None, None, None, *[None] * ctx.trained)


def _add_dora(
    adapter: Adapter, module: str, update: Tensor, output: Tensor, bias: Tensor | None, target: Tensor
) -> Tensor:
    """Write y into `target`, rounded once to its dtype; returns v. One product or sum at a time, which round alike
    wherever a row lies; a fused one need not.
    """
    scale = adapter.dora_scale(module)
    v = update.to(scale.dtype).mul_(adapter.scale[module]).add_(output)
    if bias is None:
        target.copy_(v * scale)
        return v
    v.sub_(bias)
    target.copy_((v * scale).add_(bias))
    return v


def _add_magnitude_gradient(adapter: Adapter, module: str, dy: Tensor, v: Tensor) -> None:
    m = adapter.magnitude[module]
    if m.requires_grad:
        m.grad = torch.zeros_like(m) if m.grad is None else m.grad
        m.grad.add_((dy.to(m.dtype) * v).sum(0).div_(adapter.norm[module]))


def _add_product(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """`weight.grad += scale * left @ right`, where the weight is trained."""
    if weight.requires_grad:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        add_product(weight.grad, left, right, scale)


def _dropped(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """x divided by the share that is kept (a number, since a bf16 tensor of it would be 0.16 % off), times a mask of 0
    and 1.
    """
    return (x * (1.0 / keep_probability(p))).mul_(keep)


def _is_activation(module: nn.Module) -> bool:
    """SiLU, GELU and their like, by where torch and transformers keep them (torch keeps its attention there too)."""
    kept_in = type(module).__module__
    return kept_in in ("torch.nn.modules.activation", "transformers.activations") and not any(module.children())
