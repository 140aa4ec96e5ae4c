"""Each Triton kernel against its definition in torch: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no build for this system")

from lora_core.adapters.dropout import dropout_mask, key_of
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
from lora_core.kernels.operands import (
    NO_ADAPTER,
    FusedLinearAdapter,
    HeadNorm,
    LinearAdapter,
    LinearGroup,
    LowRank,
    Magnitude,
    Norm,
    Rope,
    Segments,
)
from lora_core.training.memory.dry_run import Meter

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS = [(0, 70), (NO_ADAPTER, 5), (1, 3), (2, 41), (0, 9)]
"""Stretches longer and shorter than a tile, of one adapter twice, and of none."""

T = sum(rows for _, rows in RUNS)
POISONED, CLEAN = 1, [0, 2]
NO_DROPOUT, DROPOUT = (0.0, 0.0, 0.0), (0.3, 0.0, 0.6)
"""Of the three adapters."""

KEYS = torch.randint(-(2**63), 2**63 - 1, (T,), generator=torch.Generator().manual_seed(1))

Adapters = Sequence[FusedLinearAdapter | None]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def adapter_on(
    group: LinearGroup, ranks: Sequence[int | None], seed: int, dropout: float = 0.0, dora: bool = False
) -> FusedLinearAdapter:
    """An adapter with these ranks (None: that linear is not adapted) and a scale of its own on each. With DoRA, one
    of its magnitudes is 0.
    """
    width = sum(rank or 0 for rank in ranks)
    scales = torch.cat([torch.full((rank or 0,), 0.5 + place) for place, rank in enumerate(ranks)])
    parts: list[LinearAdapter | None] = []
    offset = 0
    for name, rank, size in zip(group.names, ranks, group.outputs, strict=True):
        b = None if rank is None else randn(rank, size, seed=seed).t()
        magnitude = magnitude_of(size, seed) if dora else None
        parts.append(None if b is None else LinearAdapter(b, torch.zeros_like(b), offset, key_of(name), magnitude))
        offset += rank or 0
    a = randn(width, group.inputs, seed=seed)
    return FusedLinearAdapter(a, torch.zeros_like(a), scales, tuple(parts), dropout)


def magnitude_of(size: int, seed: int) -> Magnitude:
    m, norm = randn(size, seed=seed), randn(size, seed=seed + 1).abs() + 0.1
    m[3] = 0.0
    return Magnitude(m, torch.zeros(size), norm, m / norm)


GROUPS = {
    "qkv": (LinearGroup(0, ("q", "k", "v"), 96, (64, 32, 32)), [(4, 4, 4), (16, None, 70), (None, 3, None)]),
    "o": (LinearGroup(0, ("o",), 64, (96,)), [(4,), (70,), (1,)]),
    "gate_up": (LinearGroup(0, ("gate", "up"), 96, (80, 80)), [(4, 8), (70, 3), (None, 2)]),
    "down": (LinearGroup(0, ("down",), 80, (96,)), [(8,), (70,), (5,)]),
    "gate_up_small": (LinearGroup(0, ("gate", "up"), 96, (80, 80)), [(4, 8), (3, 16), (None, 2)]),
    "down_small": (LinearGroup(0, ("down",), 80, (96,)), [(8,), (17,), (5,)]),
}


def low_rank_on(
    kind: str, device: torch.device = CPU, dropouts: Sequence[float] = NO_DROPOUT, dora: bool = False
) -> LowRank:
    """Three adapters on a group, with the table that Triton reads; the first two have DoRA, or none."""
    group, ranks = GROUPS[kind]
    adapters = [
        moved(adapter_on(group, of_one, seed, dropout, dora and seed < 2), device)
        for seed, (of_one, dropout) in enumerate(zip(ranks, dropouts, strict=True))
    ]
    rows = [low_rank_triton.table_row(adapter, group) for adapter in (*adapters, None)]
    width = -(-max(adapter.width for adapter in adapters) // 8) * 8
    rank = max(adapter.largest_rank for adapter in adapters)
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    keys = KEYS.to(device) if any(dropouts) else None
    return LowRank(group, adapters, Segments(RUNS, device), width, rank, table, keys, dora)


def moved(adapter: FusedLinearAdapter, device: torch.device) -> FusedLinearAdapter:
    def moved_part(part: LinearAdapter) -> LinearAdapter:
        magnitude = part.magnitude
        if magnitude is not None:
            fields = (magnitude.m, magnitude.gradient, magnitude.norm, magnitude.scale)
            magnitude = Magnitude(*(vector.to(device) for vector in fields))
        return replace(part, b=part.b.to(device), b_gradient=part.b_gradient.to(device), magnitude=magnitude)

    parts = [part and moved_part(part) for part in adapter.parts]
    a, a_gradient, scales = (tensor.to(device) for tensor in (adapter.a, adapter.a_gradient, adapter.scales))
    return FusedLinearAdapter(a, a_gradient, scales, tuple(parts), adapter.dropout)


def gradients(low: LowRank) -> list[Tensor]:
    found = []
    for adapter in low.adapters:
        assert adapter is not None
        found += [adapter.a_gradient, *(part.b_gradient for part in adapter.parts if part is not None)]
    return [gradient.cpu() for gradient in found]


def magnitudes(low: LowRank) -> list[Magnitude]:
    found = [part.magnitude for adapter in low.adapters if adapter for part in adapter.parts if part is not None]
    return [magnitude for magnitude in found if magnitude is not None]


def same_magnitude_gradients(ours: LowRank, reference: LowRank) -> None:
    for one, other in zip(magnitudes(ours), magnitudes(reference), strict=True):
        close(one.gradient, other.gradient)
        assert one.gradient[3] == 0.0


def close(ours: Tensor, reference: Tensor) -> None:
    assert torch.isfinite(ours).all()
    assert float((ours.cpu() - reference).norm() / reference.norm()) < 1e-5


def own(h: Tensor, low: LowRank) -> Tensor:
    """h with zeros where no adapter has a rank: there the kernels write nothing."""
    kept = torch.zeros_like(h)
    for adapter, rows in low.present():
        kept[rows, : adapter.width] = h[rows, : adapter.width]
    return kept


def kernels(low: LowRank) -> ModuleType:
    """The Triton kernels of the products that dropout changes."""
    return low_rank_triton if low.dropout_keys is None else masked_low_rank_triton


# Three linears, one and two; ranks that fit into one block of a kernel, and that do not; one stripe of a row, or two.
every_kind = pytest.mark.parametrize("kind", ["qkv", "o", "gate_up_small", "down"])
with_and_without_dora = pytest.mark.parametrize("dora", [False, True])
with_and_without_dropout = pytest.mark.parametrize("dropouts", [NO_DROPOUT, DROPOUT])


def all_of_any_three(choices: dict[str, tuple[Any, Any]]) -> pytest.MarkDecorator:
    """Cases in which any three of these choices of two meet in all their combinations, of four to six choices; `blocks`
    are one stripe or two of a row, which is 96 or 80 numbers here (a block of the kernels in fp32 is 64).
    """
    free = 3 if len(choices) == 4 else 4
    cases = []
    for bits in itertools.product((0, 1), repeat=free):
        made = [bits[0] ^ bits[1] ^ bits[2], bits[1] ^ bits[2] ^ bits[-1]]
        cases.append([pair[bit] for pair, bit in zip(choices.values(), (*bits, *made), strict=False)])
    return pytest.mark.parametrize(list(choices), cases)


@with_and_without_dropout
@every_kind
def test_shrink(kind: str, dropouts: Sequence[float]) -> None:
    here, there = low_rank_on(kind, CPU, dropouts), low_rank_on(kind, DEVICE, dropouts)
    x = randn(T, here.group.inputs)
    close(own(kernels(there).shrink(x.to(DEVICE), there), there), masked_low_rank.shrink(x, here))


@every_kind
def test_shrink_gradient(kind: str) -> None:
    here, there = low_rank_on(kind), low_rank_on(kind, DEVICE)
    dy = randn(T, sum(here.group.outputs))
    close(own(low_rank_triton.shrink_gradient(dy.to(DEVICE), there), there), low_rank.shrink_gradient(dy, here))


def norms(width: int) -> tuple[Norm, Norm]:
    """On the CPU and on the device."""
    rstd, weight = randn(T).abs() + 0.1, randn(width)
    return Norm(rstd, weight), Norm(rstd.to(DEVICE), weight.to(DEVICE))


@with_and_without_dropout
@pytest.mark.parametrize("with_norm", [True, False])
@every_kind
def test_weight_gradients_are_added(kind: str, with_norm: bool, dropouts: Sequence[float]) -> None:
    here, there = low_rank_on(kind, CPU, dropouts), low_rank_on(kind, DEVICE, dropouts)
    x, h, dy, dh = (randn(T, width) for width in (here.group.inputs, here.width, sum(here.group.outputs), here.width))
    norm, norm_there = norms(here.group.inputs) if with_norm else (None, None)
    for _ in range(2):
        masked_low_rank.add_a_gradients(x if norm is None else norm.of(x), dh, here)
        low_rank.add_b_gradients(dy, h, here)
        kernels(there).add_a_gradients(x.to(DEVICE), dh.to(DEVICE), there, norm_there)
        low_rank_triton.add_b_gradients(dy.to(DEVICE), h.to(DEVICE), there)
    for ours, reference in zip(gradients(there), gradients(here), strict=True):
        close(ours, reference)


@with_and_without_dropout
@every_kind
def test_expand_gradient(kind: str, dropouts: Sequence[float]) -> None:
    here, there = low_rank_on(kind, CPU, dropouts), low_rank_on(kind, DEVICE, dropouts)
    dx, dh = randn(T, here.group.inputs), randn(T, here.width)
    ours = kernels(there).expand_gradient_(dx.to(DEVICE, copy=True), dh.to(DEVICE), there)
    close(ours, masked_low_rank.expand_gradient_(dx.clone(), dh, here))


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize(("p", "module_key"), [(0.1, key_of("one")), (0.5, -(2**63)), (0.999, 0)])
def test_masks_are_bit_equal(p: float, module_key: int, triton: bool) -> None:
    """A, dh and x are such that each product shows its mask; more features than any kernel takes at a time."""
    ours, place = (masked_low_rank_triton, DEVICE) if triton else (masked_low_rank, CPU)
    size = 136
    group, eye, ones = LinearGroup(0, ("one",), size, (16,)), torch.eye(size), torch.ones(size, size)
    keys = KEYS.repeat(2)[:size]
    keys[:5] = torch.tensor([0, -1, 1, 2**63 - 1, -(2**63)])
    part = LinearAdapter(randn(size, 16).t(), torch.zeros(size, 16).t(), 0, module_key)
    adapter = moved(FusedLinearAdapter(eye, torch.zeros(size, size), torch.ones(size), (part,), p), place)
    table = torch.tensor([low_rank_triton.table_row(one, group) for one in (adapter, None)], device=place)
    low = LowRank(group, [adapter], Segments([(0, size)], place), size, size, table, keys.to(place))
    h = ours.shrink(ones.to(place), low)
    ours.add_a_gradients(ones.to(place), eye.to(place), low)
    dx = ours.expand_gradient_(torch.zeros(size, size, device=place), ones.to(place), low)
    mask = dropout_mask(size, p, keys, module_key)
    for shown in (h.cpu(), adapter.a_gradient.cpu(), dx.cpu()):
        assert torch.equal(shown != 0, mask)
        torch.testing.assert_close(shown, mask / (1 - int(p * 2**16) / 2**16))


def test_a_cpu_makes_masks_of_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> list[Tensor]:
        low = low_rank_on("qkv", CPU, DROPOUT)
        x, dh = randn(T, 96), randn(T, low.width)
        masked_low_rank.add_a_gradients(x, dh, low)
        summed = [adapter.a_gradient for adapter in low.adapters if adapter is not None]
        return [masked_low_rank.shrink(x, low), *summed, masked_low_rank.expand_gradient_(x, dh, low)]

    at_once = results()
    monkeypatch.setattr(masked_low_rank, "MASK_ROWS", 32)
    for one, other in zip(results(), at_once, strict=True):
        close(one, other)


def test_without_numbers_as_much_memory_is_taken_by_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first few rows, as by all of them, a few at a time."""
    monkeypatch.setattr(masked_low_rank, "MASK_ROWS", 16)
    peaks = []
    for device in (CPU, torch.device("meta")):
        low, x = low_rank_on("qkv", device, DROPOUT), randn(T, 96).to(device)
        dh = randn(T, low.width).to(device)
        with Meter() as meter:
            masked_low_rank.shrink(x, low)
            masked_low_rank.add_a_gradients(x, dh, low)
            masked_low_rank.expand_gradient_(x, dh, low)
        peaks.append(meter.peak)
    assert peaks[0] == peaks[1] > 0


@with_and_without_dora
@pytest.mark.parametrize("with_update", [True, False])
@pytest.mark.parametrize("with_sum", [True, False])
def test_norm_forward(with_sum: bool, with_update: bool, dora: bool) -> None:
    """With DoRA, what is added stays in y."""
    here, there = low_rank_on("down", dora=dora), low_rank_on("down", DEVICE, dora=dora)
    x, y, h, weight = randn(T, 96), randn(T, 96, seed=1), randn(T, here.width), randn(96)
    given: Sequence[Tensor | None] = [x, y if with_sum else None, h if with_sum and with_update else None]
    given_here, given_there = copies(given), copies(given, DEVICE)
    reference = layer_ops.norm_forward(*given_here, here, weight, 1e-5)  # type: ignore[arg-type]
    ours = layer_ops_triton.norm_forward(*given_there, there, weight.to(DEVICE), 1e-5)  # type: ignore[arg-type]
    for one, other in zip(ours, reference, strict=True):
        close(one, other)
    added, added_there = given_here[1], given_there[1]
    if dora and added is not None and added_there is not None:
        close(added_there, added)
        close(added + x, reference[0])


BACKWARD = {
    "with_update": (True, False), "with_residual": (True, False), "with_products": (True, False),
    "below_kind": ("o", "down_small"), "blocks": (16, 1), "dropouts": (DROPOUT, NO_DROPOUT),
}  # fmt: skip


@all_of_any_three(BACKWARD)
def test_norm_backward(
    with_update: bool,
    with_residual: bool,
    with_products: bool,
    below_kind: str,
    blocks: int,
    dropouts: Sequence[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of what the product before adds, with ranks that fit into one block of the kernel, and with one that does not."""
    monkeypatch.setitem(layer_ops_triton.NORM_BACKWARD, "BLOCKS", blocks)
    here, there = low_rank_on("qkv", CPU, dropouts), low_rank_on("qkv", DEVICE, dropouts)
    below, below_there = low_rank_on(below_kind), low_rank_on(below_kind, DEVICE)
    dn, x, rstd, weight, residual = randn(T, 96), randn(T, 96, seed=1), randn(T).abs(), randn(96), randn(T, 96, seed=2)
    dh = randn(T, here.width) if with_update else None
    whole = dn if dh is None else masked_low_rank.expand_gradient_(dn.clone(), dh, here)
    products = (whole * x * rstd[:, None] * weight).sum(1) if with_products else None
    rest = [x, rstd, weight, residual if with_residual else None, products]
    dx, shrunk = layer_ops.norm_backward(*copies([dn, dh]), here, *copies(rest), below)  # type: ignore[arg-type]
    on_device = copies([dn, dh], DEVICE), copies(rest, DEVICE)
    ours, shrunk_there = layer_ops_triton.norm_backward(*on_device[0], there, *on_device[1], below_there)  # type: ignore[arg-type]
    close(ours, dx)
    assert shrunk is not None and shrunk_there is not None
    close(own(shrunk_there, below_there), shrunk)


def test_norm_backward_leaves_the_shrink_to_what_dora_needs_first() -> None:
    given = [randn(T, 96), None, randn(T, 96, seed=1), randn(T).abs(), randn(96), None, None]
    for ops, device in ((layer_ops, CPU), (layer_ops_triton, DEVICE)):
        dn, dh, *rest = copies(given, device)
        low, below = low_rank_on("qkv", device), low_rank_on("o", device, dora=True)
        assert ops.norm_backward(dn, dh, low, *rest, below)[1] is None


@pytest.mark.parametrize("kind", ["o", "down"])
def test_dora_backward(kind: str) -> None:
    here, there = low_rank_on(kind, dora=True), low_rank_on(kind, DEVICE, dora=True)
    dy, y = randn(T, 96), randn(T, 96, seed=1)
    for _ in range(2):
        reference = dora.dora_backward(dy, y, here)
        close(dora_triton.dora_backward(dy.to(DEVICE), y.to(DEVICE), there), reference)
    same_magnitude_gradients(there, here)
    assert torch.equal(reference[70:75], dy[70:75]) and torch.equal(reference[78:119], dy[78:119])
    assert not torch.isclose(reference[:70], dy[:70]).all()


@every_kind
def test_norms_and_dora_scales(kind: str) -> None:
    """Of rows of W + s B A; one row of W and B is zero."""
    low = low_rank_on(kind, DEVICE, dora=True)
    weights = [randn(size, low.group.inputs, seed=place).to(DEVICE) for place, size in enumerate(low.group.outputs)]
    for weight in weights:
        weight[5] = 0.0
    for adapter in low.adapters:
        assert adapter is not None
        for part in filter(None, adapter.parts):
            part.b[5] = 0.0
    squares, starts = [weight.square().sum(1) for weight in weights], dora_triton.rows_in_stack(low.adapters, [0, 1])
    dora_triton.update_dora_scales(
        weights, squares, low, [0, 1], torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    )
    for adapter in low.adapters:
        assert adapter is not None
        for part, weight, scale in zip(adapter.parts, weights, adapter.part_scales, strict=True):
            if part is not None and (magnitude := part.magnitude) is not None:
                exact = (weight.double() + scale * part.b.double() @ adapter.a[part.columns].double()).norm(dim=1)
                exact[5] = torch.finfo(torch.float32).tiny ** 0.5
                torch.testing.assert_close(magnitude.norm, exact.float(), rtol=1e-6, atol=0)
                torch.testing.assert_close(magnitude.scale, magnitude.m / magnitude.norm)


def ropes(size: int, with_bias: bool, with_norm: bool) -> tuple[Rope, Rope]:
    """Of six heads of `size` that are rotated, on the CPU and on the device."""
    angle, weight = randn(T, size // 2), randn(6, size)
    given = [angle.cos(), angle.sin(), randn(128) if with_bias else None, weight if with_norm else None]

    def on(device: torch.device) -> Rope:
        cos, sin, bias, weight = copies(given, device)
        assert cos is not None and sin is not None
        return Rope(cos, sin, size, 6, bias, None if weight is None else HeadNorm(weight, 0.1))

    return on(CPU), on(DEVICE)


ROPE = {"with_update": (True, False), "with_bias": (True, False), "with_norm": (True, False), "dora": (False, True)}


@all_of_any_three(ROPE)
def test_rope(with_update: bool, with_bias: bool, with_norm: bool, dora: bool) -> None:
    here, there = low_rank_on("qkv", dora=dora), low_rank_on("qkv", DEVICE, dora=dora)
    y, h = randn(T, 128), randn(T, here.width) if with_update else None
    rope, on_device = ropes(16, with_bias, with_norm)
    reference, unnormed = layer_ops.rope_forward_(*copies([y, h]), here, rope, True)  # type: ignore[arg-type]
    ours, unnormed_there = rope_triton.rope_forward_(*copies([y, h], DEVICE), there, on_device, True)  # type: ignore[arg-type]
    close(ours, reference)
    assert (unnormed is not None) == (unnormed_there is not None) == with_norm
    if unnormed is not None and unnormed_there is not None:
        close(unnormed_there, unnormed)
    parts = [randn(T, heads, 16, seed=heads) for heads in (4, 2, 2)]
    rotated_back, _ = layer_ops.rope_backward(*parts, reference, unnormed, here, rope)
    moved_parts = [part.to(DEVICE) for part in parts]
    dy, products = rope_triton.rope_backward(*moved_parts, ours, unnormed_there, there, on_device)
    close(dy, rotated_back)
    same_magnitude_gradients(there, here)
    product = y if h is None else low_rank.expand_(y.clone(), h, here)
    close(products, (rotated_back * product).sum(1))


@pytest.mark.parametrize("with_norm", [True, False])
def test_rope_keeps_nothing_without_a_backward_pass(with_norm: bool) -> None:
    rope, on_device = ropes(16, False, with_norm)
    low = low_rank_on("qkv", DEVICE)
    assert layer_ops.rope_forward_(randn(T, 128), None, low_rank_on("qkv"), rope, False)[1] is None
    ours, kept = rope_triton.rope_forward_(randn(T, 128).to(DEVICE), None, low, on_device, False)
    assert kept is None
    close(ours, layer_ops.rope_forward_(randn(T, 128), None, low_rank_on("qkv"), rope, True)[0])


SWIGLU = {
    "kinds": (("gate_up", "down"), ("gate_up_small", "down_small")), "with_update": (True, False),
    "dora": (False, True), "dropouts": (NO_DROPOUT, DROPOUT), "blocks": (16, 1),
}  # fmt: skip


@all_of_any_three(SWIGLU)
def test_swiglu(
    kinds: tuple[str, str],
    with_update: bool,
    dora: bool,
    dropouts: Sequence[float],
    blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks that fit into one block of the kernels, and ranks that do not."""
    for config in (swiglu_triton.SWIGLU, swiglu_triton.BACKWARD_WITH_DORA):
        monkeypatch.setitem(config, "BLOCKS", blocks)
    (here, there), (down, down_there) = (
        (low_rank_on(k, CPU, dropouts, dora), low_rank_on(k, DEVICE, dropouts, dora)) for k in kinds
    )
    y, dact = randn(T, 160), randn(T, 80)
    h, dh = (randn(T, low.width) if with_update else None for low in (here, down))
    y_here, y_there = y.clone(), y.to(DEVICE, copy=True)
    reference, shrunk = layer_ops.swiglu_forward(y_here, h, here, down)
    on_device = copies([h, dh], DEVICE)
    activation, shrunk_there = swiglu_triton.swiglu_forward(y_there, on_device[0], there, down_there)
    assert shrunk is not None and shrunk_there is not None
    close(activation, reference)
    close(own(shrunk_there, down_there), shrunk)
    dact_here, dact_there = dact.clone(), dact.to(DEVICE, copy=True)
    product = y if h is None else low_rank.expand_(y.clone(), h, here)
    shrunk, _ = layer_ops.swiglu_backward_(dact_here, dh, down, y_here, h, here)
    shrunk_there, products = swiglu_triton.swiglu_backward_(
        dact_there, on_device[1], down_there, y_there, on_device[0], there
    )
    assert shrunk is not None and shrunk_there is not None
    close(own(shrunk_there, there), shrunk)
    close(y_there, y_here)
    close(products, (y_here * product).sum(1))
    close(dact_there, dact_here)
    close(dact_there, reference)  # what the next product's A needs
    same_magnitude_gradients(there, here)


def test_cross_entropy() -> None:
    logits, labels = randn(7, 10_001) * 3, torch.tensor([0, 10_000, 5, 8191, 8192, 77, 3])
    logits[2, 5] = 50.0
    ours, reference = logits.to(DEVICE, copy=True), logits.clone()
    losses = cross_entropy_triton.cross_entropy_(ours, labels.to(DEVICE))
    losses_reference = cross_entropy.cross_entropy_(reference, labels)
    close(losses, losses_reference)
    close(ours, reference)


def test_fp8_rows() -> None:
    x = randn(5, 300) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 7.0])[:, None]
    q, scales = quantize_triton.quantize_rows(x.to(DEVICE))
    q_reference, scales_reference = quantize.quantize_rows(x)
    torch.testing.assert_close(scales.cpu(), scales_reference, rtol=1e-6, atol=0)
    for numbers in (q.cpu(), q_reference):
        error = (numbers.float() * scales_reference - x).norm(dim=1) / x.norm(dim=1).clamp(min=1e-9)
        assert float(error.max()) < 0.1  # three bits of mantissa; the interpreter rounds some the wrong way


def test_nf4_is_bit_equal() -> None:
    packed = quantize.quantize_nf4(randn(6, 192))
    on_device = quantize.Nf4(packed.codes.to(DEVICE), packed.scales.to(DEVICE), packed.shape)
    dense = quantize_triton.dequantize_nf4(on_device, torch.float32)
    assert torch.equal(dense.cpu(), quantize.dequantize_nf4(packed, torch.float32))


@with_and_without_dropout
@every_kind
def test_a_neighbours_nan_stays_with_it(kind: str, dropouts: Sequence[float]) -> None:
    """Rows, weights and gradients of one adapter NaN: nothing of the others'."""
    low = low_rank_on(kind, DEVICE, dropouts)
    poisoned = low.adapters[POISONED]
    assert poisoned is not None
    poisoned.a.fill_(torch.nan)
    rows = torch.zeros(T, dtype=torch.bool)
    for place, where in low.segments.slices():
        rows[where] = place == POISONED
    x, dy = (randn(T, width).to(DEVICE) for width in (low.group.inputs, sum(low.group.outputs)))
    x[rows] = dy[rows] = torch.nan
    h, dh = kernels(low).shrink(x, low), low_rank_triton.shrink_gradient(dy, low)
    kernels(low).add_a_gradients(x, dh, low)
    low_rank_triton.add_b_gradients(dy, h, low)
    dx = kernels(low).expand_gradient_(x.clone(), dh, low)
    for tensor in (own(h, low), own(dh, low), dx):
        assert torch.isfinite(tensor[~rows]).all()
    assert not torch.isfinite(dx[rows]).any()
    for place in CLEAN:
        adapter = low.adapters[place]
        assert adapter is not None and torch.isfinite(adapter.a_gradient).all() and adapter.a_gradient.any()
        assert all(torch.isfinite(part.b_gradient).all() for part in adapter.parts if part is not None)


def copies(tensors: Sequence[Tensor | None], device: torch.device = CPU) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(device, copy=True) for tensor in tensors]
