"""Many adapters on one base: whose rows are whose, and the gradients of each."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lora_core.adapters.init import init_adapter
from lora_core.config import LoraConfig
from lora_core.models.attention import PackedAttention
from lora_core.models.base import BaseModel
from lora_core.models.hooks.bank import AdapterBank, Segment
from tests.support.models import VOCABULARY, random_adapter, threads, tiny_base, tiny_model

DOWN = "model.layers.1.mlp.down_proj"


# --- whose rows ------------------------------------------------------------------------------------------------------


def deltas(model: PreTrainedModel, segments: Sequence[Segment], names: list[str]) -> dict[str, Tensor]:
    """What each module's output should be, by hand from its input, as `name` and `name.seen`."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        module = model.get_submodule(name)

        def compare(_: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0][0]
            expected = module.forward(args[0])[0].clone()
            start = 0
            for segment in segments:
                rows = slice(start, start + segment.tokens)
                if segment.adapter is not None and name in segment.adapter.a:
                    a, b = segment.adapter.a[name].to(x.dtype), segment.adapter.b[name].to(x.dtype)
                    expected[rows] += segment.adapter.scale[name] * (x[rows] @ a.t()) @ b.t()
                start = rows.stop
            found[name], found[name + ".seen"] = expected, output[0]

        model.get_submodule(name).register_forward_hook(compare)

    for name in names:
        watch(name)
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_rows_get_their_own_adapter_and_no_other(kind: str) -> None:
    base = tiny_base(kind, dtype=torch.float64)
    bank = AdapterBank(base.model)
    some = ["c_fc"] if kind == "gpt2" else ["q_proj", "down_proj"]
    one, two = random_adapter(bank, 1, 3), random_adapter(bank, 2, 8, targets=some)
    segments = [Segment(one, 5), Segment(None, 4), Segment(two, 6), Segment(one, 1), Segment(two, 0), Segment(two, 8)]
    checks = deltas(base.model, segments, list(bank.linears))
    ids, lengths = torch.randint(3, VOCABULARY, (1, 24)), [5, 4, 6, 1, 8]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with bank.routed(segments):
        adapted = base.hidden(ids, positions, PackedAttention(lengths))
    for name in bank.linears:
        torch.testing.assert_close(checks[name + ".seen"], checks[name], rtol=1e-12, atol=1e-12)
    plain = base.hidden(ids, positions, PackedAttention(lengths))
    torch.testing.assert_close(adapted[0, 5:9], plain[0, 5:9], rtol=1e-12, atol=1e-12)
    assert all(not torch.equal(adapted[0, row], plain[0, row]) for row in (0, 9, 15, 16))


@torch.no_grad()
def test_decoding_rows_are_the_batch() -> None:
    """`[n, 1]` tokens of n requests, as the generator sends them."""
    base = tiny_base("llama", dtype=torch.float64)
    bank = AdapterBank(base.model)
    adapters = [random_adapter(bank, seed, 4) for seed in (1, 2)]
    ids, positions = torch.randint(3, VOCABULARY, (3, 1)), torch.zeros(3, 1, dtype=torch.int64)
    with bank.routed([Segment(adapters[0], 2), Segment(adapters[1], 1)]):
        together = base.hidden(ids, positions, PackedAttention([1]))
    for row, adapter in enumerate((adapters[0], adapters[0], adapters[1])):
        with bank.routed([Segment(adapter, 1)]):
            alone = base.hidden(ids[row, None], positions[:1], PackedAttention([1]))
        torch.testing.assert_close(together[row], alone[0], rtol=1e-12, atol=1e-12)


def test_closed_bank_and_unrouted_pass_leave_the_base_alone() -> None:
    base = tiny_base("llama")
    ids, positions = torch.randint(3, VOCABULARY, (1, 8)), torch.arange(8)[None]
    plain = base.hidden(ids, positions, PackedAttention([8]))
    bank = AdapterBank(base.model)
    adapter = random_adapter(bank, 1, 4)
    with bank.routed([Segment(adapter, 8)]):
        assert not torch.equal(base.hidden(ids, positions, PackedAttention([8])), plain)
    assert torch.equal(base.hidden(ids, positions, PackedAttention([8])), plain)
    assert set(base.model.state_dict()) == set(tiny_model("llama").state_dict())
    bank.close()
    with bank.routed([Segment(adapter, 8)]):
        assert torch.equal(base.hidden(ids, positions, PackedAttention([8])), plain)


# --- gradients and neighbours ----------------------------------------------------------------------------------------


def weighted_sum(base: BaseModel, bank: AdapterBank, segments: list[Segment], ids: Tensor) -> Tensor:
    lengths = [segment.tokens for segment in segments]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with bank.routed(segments):
        hidden = base.hidden(ids, positions, PackedAttention(lengths))
    return (hidden * torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)).sum()


def test_gradients_are_autograds_own() -> None:
    """Against plain tensor formulas, by finite differences in fp64, dropout included."""
    base = tiny_base("llama", dtype=torch.float64)
    bank = AdapterBank(base.model)
    one = random_adapter(bank, 1, 2, dropout=0.3, trained=True)
    two = random_adapter(bank, 2, 3, targets=["q_proj"], trained=True)
    for adapter in (one, two):
        adapter.a = {name: a.detach().double().requires_grad_() for name, a in adapter.a.items()}
        adapter.b = {name: b.detach().double().requires_grad_() for name, b in adapter.b.items()}
    ids = torch.randint(3, VOCABULARY, (1, 24))
    segments = [Segment(one, 8, torch.arange(8) * 977), Segment(two, 8), Segment(one, 8, torch.arange(8) * 31)]
    weighted_sum(base, bank, segments, ids).backward()
    stream = torch.Generator().manual_seed(0)
    for adapter in (one, two):
        for weights in (adapter.a, adapter.b):
            for weight in list(weights.values())[::3]:
                assert weight.grad is not None
                direction = torch.randn(weight.shape, generator=stream, dtype=torch.float64)
                values = []
                with torch.no_grad():
                    for sign in (1, -1, -1):
                        weight.add_(direction, alpha=sign * 1e-6)
                        values.append(float(weighted_sum(base, bank, segments, ids)))
                    weight.add_(direction, alpha=1e-6)
                slope = (values[0] - values[2]) / 2e-6
                assert slope == pytest.approx(float((weight.grad * direction).sum()), rel=1e-5, abs=1e-6)


def test_activations_round_by_run_alone() -> None:
    """The same rows give the same bits behind neighbours of any length; see `AdapterBank._activate_by_segment`."""
    base = tiny_base("llama-odd")
    bank = AdapterBank(base.model)
    activation = base.model.get_submodule("model.layers.0.mlp.act_fn")
    x = torch.randn(1, 1000, 75)
    for count in (1, 2, 3):
        with threads(count):
            alone = torch.cat([activation(part) for part in x.split(40, dim=1)], dim=1)
            with bank.routed([Segment(None, 40)] * 25):
                assert torch.equal(activation(x), alone)


# --- fresh adapters --------------------------------------------------------------------------------------------------


def test_fresh_adapter_is_bounded_zero_and_depends_on_seed_and_name_alone() -> None:
    bank = AdapterBank(tiny_model("llama"))
    everything = init_adapter(bank, LoraConfig(r=16), seed=3).a
    some = init_adapter(bank, LoraConfig(r=16, target_modules=["down_proj"]), seed=3).a
    other = init_adapter(bank, LoraConfig(r=16), seed=4).a
    for name, b in init_adapter(bank, LoraConfig(r=16), seed=3).b.items():
        fan_in, fan_out = bank.shapes[name]
        a = everything[name]
        assert (a.shape, b.shape) == ((16, fan_in), (fan_out, 16))
        assert 0.95 * fan_in**-0.5 < float(a.abs().max()) <= fan_in**-0.5
        assert not b.any()
        assert not torch.equal(a, other[name])
    assert all(torch.equal(some[name], everything[name]) for name in some)
    q, k = everything["model.layers.0.self_attn.q_proj"], everything["model.layers.1.self_attn.q_proj"]
    assert not torch.equal(q, k)
