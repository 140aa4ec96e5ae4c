"""What `kernels_gpu` times: each Triton function of the decoder beside its definition in torch, with operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from lora_core.adapters.dora import RowNorms
from lora_core.kernels import (
    cross_entropy,
    cross_entropy_triton,
    dora,
    dora_triton,
    layer_ops,
    layer_ops_triton,
    low_rank,
    low_rank_triton,
    masked_low_rank,
    masked_low_rank_triton,
    quantize,
    quantize_triton,
    rope_triton,
    swiglu_triton,
)
from lora_core.kernels.operands import LowRank, Norm
from lora_core.models.llama.head import HEAD_ROWS
from tests.bench.kernel_operands import (
    RANK,
    Case,
    Modules,
    Operands,
    Side,
    all_a,
    all_b,
    all_magnitudes,
    for_torch,
    present,
)

DROPOUT = 0.1
INTERPRETED_FP8_TOLERANCE = 0.1  # Triton's interpreter rounds some fp8 numbers the wrong way

LAYER_OPS = layer_ops_triton, layer_ops
ROPE = rope_triton, layer_ops
SWIGLU = swiglu_triton, layer_ops
LOW_RANK = low_rank_triton, low_rank
MASKED = masked_low_rank_triton, masked_low_rank
DORA = dora_triton, dora
QUANTIZE = quantize_triton, quantize


def norm_forward(o: Operands) -> Case:
    low, y = o.low_rank(o.down), o.rows(o.hidden)
    arguments = (o.rows(o.hidden), y, o.rows(low.width), low, o.random(o.hidden), 1e-5)
    return o.case("norm_forward", LAYER_OPS, arguments, written=(y,), matrices=all_b(low))


def norm_backward(o: Operands) -> Case:
    """The kernel is given each row's sum of dn n, which those of SwiGLU and rope make; the definition sums itself."""
    low, below, dn, dh = o.low_rank(o.qkv), o.low_rank(o.o), o.rows(o.hidden), o.rows(3 * RANK)
    x, rstd, weight = o.rows(o.hidden), o.rows().float().abs(), o.random(o.hidden)
    whole = low_rank.expand_gradient_(dn.clone(), dh, low)
    sums = (whole.float() * x.float() * weight.float()).sum(1) * rstd
    arguments = (dn, dh, low, x, rstd, weight, o.rows(o.hidden), sums, below)
    return o.case("norm_backward", LAYER_OPS, arguments, written=(dn,), matrices=all_a(low) + all_b(below))


def rope_forward(o: Operands) -> Case:
    low, y = o.low_rank(o.qkv), o.rows(sum(o.qkv.outputs))
    arguments = (y, o.rows(low.width), low, o.rope(), True)
    return o.case("rope_forward_", ROPE, arguments, written=(y,), matrices=all_b(low))


def rope_backward(o: Operands) -> Case:
    parts = (o.rows(heads, o.head_size) for heads in (o.heads, o.kv_heads, o.kv_heads))
    arguments = (*parts, o.rows(sum(o.qkv.outputs)), None, o.low_rank(o.qkv), o.rope())
    return o.case("rope_backward", ROPE, arguments)


def swiglu_forward(o: Operands) -> Case:
    """The definition also writes the updated gate and up, which its backward pass reads."""
    low, down, y = o.low_rank(o.gate_up), o.low_rank(o.down), o.rows(2 * o.intermediate)
    arguments = (y, o.rows(low.width), low, down)
    return o.case("swiglu_forward", SWIGLU, arguments, written=(y,), matrices=all_b(low) + all_a(down))


def swiglu_backward(o: Operands) -> Case:
    """The definition finds gate and up updated, as its forward pass leaves them."""
    low, down, dact = o.low_rank(o.gate_up), o.low_rank(o.down), o.rows(o.intermediate)
    y, h, dh_down = o.rows(2 * o.intermediate), o.rows(low.width), o.rows(down.width)
    updated = low_rank.expand_(y.clone(), h, low)
    ours, reference = (
        Side(module.swiglu_backward_, (dact, dh_down, down, memory, h, low), (memory, dact), (memory, dact))
        for module, memory in zip(SWIGLU, (y, updated), strict=True)
    )
    reference = replace(reference, arguments=for_torch(reference.arguments))
    return Case("swiglu_backward_", o.jobs, ours, reference, all_a(down) + 2 * all_b(low), o.tokens)


def shrink(o: Operands, prefix: str = "", modules: Modules = LOW_RANK, dropout: float = 0.0) -> Case:
    low = o.low_rank(o.qkv, dropout)
    return o.case(f"{prefix}shrink", modules, (o.rows(o.hidden), low), matrices=all_a(low))


def shrink_gradient(o: Operands) -> Case:
    low = o.low_rank(o.qkv)
    return o.case("shrink_gradient", LOW_RANK, (o.rows(sum(o.qkv.outputs)), low), matrices=all_b(low))


def add_a_gradients(o: Operands, prefix: str = "", modules: Modules = LOW_RANK, dropout: float = 0.0) -> Case:
    """Of what a norm has made, which is not in memory."""
    low = o.low_rank(o.qkv, dropout)
    sums = tuple(adapter.a_gradient for adapter in present(low))
    norm = Norm(o.rows().float().abs(), o.random(o.hidden))
    arguments = (o.rows(o.hidden), o.rows(low.width), low, norm)
    return o.case(f"{prefix}add_a_gradients", modules, arguments, written=sums, compared=sums, matrices=sums)


def add_b_gradients(o: Operands) -> Case:
    low = o.low_rank(o.gate_up)
    sums = tuple(part.b_gradient for adapter in present(low) for part in filter(None, adapter.parts))
    arguments = (o.rows(2 * o.intermediate), o.rows(low.width), low)
    return o.case("add_b_gradients", LOW_RANK, arguments, written=sums, compared=sums, matrices=sums)


def expand_gradient(o: Operands, prefix: str = "", modules: Modules = LOW_RANK, dropout: float = 0.0) -> Case:
    """Without dropout only the output projection's comes to this: others are part of what reads the product next."""
    low = o.low_rank(o.qkv if dropout else o.o, dropout)
    dx = o.rows(o.hidden)
    return o.case(
        f"{prefix}expand_gradient_", modules, (dx, o.rows(low.width), low), written=(dx,), matrices=all_a(low)
    )


def masked(make: Callable[..., Case]) -> Callable[[Operands], Case]:
    return lambda o: make(o, "masked_", MASKED, DROPOUT)


def dora_backward(o: Operands) -> Case:
    low = o.low_rank(o.o, dora=True)
    sums = tuple(magnitude.gradient for magnitude in all_magnitudes(low))
    arguments = (o.rows(o.hidden), o.rows(o.hidden), low)
    return o.case("dora_backward", DORA, arguments, written=sums, compared=sums, matrices=sums)


def update_dora_scales(o: Operands) -> Case:
    """Of the widest group, whose matrices are read; the definition finds the squares of W's norms known."""
    low = o.low_rank(o.gate_up, dora=True)
    linears = [nn.Linear(o.hidden, size, False, o.device, o.dtype) for size in o.gate_up.outputs]
    weights = {name: linear.weight.detach() for name, linear in zip(o.gate_up.names, linears, strict=True)}
    made = tuple(vector for one in all_magnitudes(low) for vector in (one.norm, one.scale))
    norms = RowNorms(weights.__getitem__)
    given = (
        [*weights.values()],
        [norms.squares(name, torch.float32, weight) for name, weight in weights.items()],
    )
    places = range(len(low.adapters))
    starts = torch.tensor(dora_triton.rows_in_stack(low.adapters, places), dtype=torch.int32, device=o.device)
    sides = (
        Side(dora_triton.update_dora_scales, (*given, low, places, starts), made, made),
        Side(computed_dora_scales, (norms, low), made, made),
    )
    return Case("update_dora_scales", o.jobs, *sides, (*weights.values(), *all_a(low), *all_b(low)), 0)


def computed_dora_scales(norms: RowNorms, low: LowRank) -> None:
    for adapter in present(low):
        for name, part, scale in zip(low.group.names, adapter.parts, adapter.part_scales, strict=True):
            if part is not None and (magnitude := part.magnitude) is not None:
                magnitude.norm.copy_(norms.of(name, adapter.a[part.columns].float(), part.b.float() * scale))
                torch.div(magnitude.m, magnitude.norm, out=magnitude.scale)


def cross_entropy_case(o: Operands) -> Case:
    count = min(HEAD_ROWS, o.tokens)
    logits, labels = o.random(count, o.vocabulary), torch.randint(0, o.vocabulary, (count,), device=o.device)
    modules = cross_entropy_triton, cross_entropy
    return o.case("cross_entropy_", modules, (logits, labels), written=(logits,), compared=(logits,))


def quantize_rows(o: Operands) -> Case:
    case = o.case("quantize_rows", QUANTIZE, (o.rows(o.intermediate),))
    return case if o.device.type == "cuda" else replace(case, tolerance=INTERPRETED_FP8_TOLERANCE)


def dequantize_nf4(o: Operands) -> Case:
    packed = quantize.quantize_nf4(o.random(2 * o.intermediate, o.hidden, std=0.02))
    return o.case("dequantize_nf4", QUANTIZE, (packed, o.dtype))


OF_JOBS: dict[str, Callable[[Operands], Case]] = {
    "norm_forward": norm_forward,
    "norm_backward": norm_backward,
    "rope_forward_": rope_forward,
    "rope_backward": rope_backward,
    "swiglu_forward": swiglu_forward,
    "swiglu_backward_": swiglu_backward,
    "shrink": shrink,
    "shrink_gradient": shrink_gradient,
    "add_a_gradients": add_a_gradients,
    "add_b_gradients": add_b_gradients,
    "expand_gradient_": expand_gradient,
    "dora_backward": dora_backward,
    "update_dora_scales": update_dora_scales,
    "masked_shrink": masked(shrink),
    "masked_add_a_gradients": masked(add_a_gradients),
    "masked_expand_gradient_": masked(expand_gradient),
}
"""Kernels that know of jobs, timed for one and for many."""

OF_ROWS: dict[str, Callable[[Operands], Case]] = {
    "cross_entropy_": cross_entropy_case,
    "quantize_rows": quantize_rows,
    "dequantize_nf4": dequantize_nf4,
}
"""The others."""
