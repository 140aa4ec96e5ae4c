"""LoRA dropout: a mask of its own for every job, step, example, token and module, whatever lies beside."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_core.adapters.dropout import dropout_mask
from lora_core.config import LoraConfig, TrainConfig
from lora_core.data.packing import Chunk, pack
from lora_core.models.hooks.bank import AdapterBank, Segment
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob
from tests.support.models import documents, random_adapter, tiny_base, tiny_model

DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_share_of_dropped_features(p: float) -> None:
    keys = torch.arange(4000)
    mask = dropout_mask(203, p, keys, module_key=99)
    assert mask.shape == (4000, 203)
    assert float(mask.float().mean()) == pytest.approx(1 - p, abs=4 * math.sqrt(p * (1 - p) / mask.numel()))
    assert float(mask.float().mean(0).std()) < 0.02  # no feature is dropped more often than another
    assert float(mask.float().mean(1).std()) < 1.2 * math.sqrt(p * (1 - p) / 203)  # nor any row


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-4), (torch.bfloat16, 6e-4)])
def test_dropout_keeps_the_expectation(dtype: torch.dtype, limit: float) -> None:
    """Averaged over many masks the update is that without dropout; a factor rounded to bf16 would be 0.16 % off."""
    base = tiny_base("llama", dtype=dtype)
    bank = AdapterBank(base.model)
    rows = 2**16
    x = (torch.rand(1, rows, 172, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    module = bank.linears[DOWN]
    adapter = random_adapter(bank, 1, 1, dropout=0.1)
    adapter.a[DOWN].fill_(1.0)
    adapter.b[DOWN].fill_(1.0)
    plain = module(x)[0].double()
    with bank.routed([Segment(adapter, rows)]):
        whole = module(x)[0].double() - plain
    with bank.routed([Segment(adapter, rows, torch.arange(rows))]):
        dropped = module(x)[0].double() - plain
    assert float(dropped.mean() / whole.mean()) == pytest.approx(1.0, abs=limit)
    assert float(dropped.std() / whole.mean()) > 0.01


def dropped_update(x: Tensor, keys: Tensor | None, module: str = DOWN, p: float = 0.5, seed: int = 1) -> Tensor:
    bank = AdapterBank(tiny_model("llama"))
    adapter = random_adapter(bank, seed, dropout=p)
    with torch.no_grad(), bank.routed([Segment(adapter, x.shape[1], keys)]):
        updated: Tensor = bank.linears[module](x)
    return updated


def test_dropout_acts_in_training_only_and_on_the_update_only() -> None:
    x = torch.randn(1, 8, 172)
    assert torch.equal(dropped_update(x, None), dropped_update(x, None, p=0.0))
    assert not torch.equal(dropped_update(x, torch.arange(8)), dropped_update(x, None))
    bank = AdapterBank(tiny_model("llama"))
    adapter = random_adapter(bank, 1, 4, dropout=0.5)
    for b in adapter.b.values():
        b.zero_()
    with torch.no_grad(), bank.routed([Segment(adapter, 8, torch.arange(8))]):
        assert torch.equal(bank.linears[DOWN](x), tiny_model("llama").get_submodule(DOWN)(x))


def test_mask_depends_on_row_key_and_module_and_nothing_else() -> None:
    keys = torch.randint(-(2**62), 2**62, (64,))
    mask = dropout_mask(172, 0.5, keys, module_key=1)
    assert torch.equal(dropout_mask(172, 0.5, keys[10:20], 1), mask[10:20])
    assert torch.equal(dropout_mask(172, 0.5, keys.flip(0), 1), mask.flip(0))
    assert torch.equal(dropout_mask(60, 0.5, keys, 1), mask[:, :60])
    for other in (
        dropout_mask(172, 0.5, keys, 2),
        dropout_mask(172, 0.5, keys + 1, 1),
        mask.roll(1, 0),
        mask.roll(1, 1),
    ):
        assert float((mask == other).float().mean()) == pytest.approx(0.5, abs=0.03)


def keys_of(batch_order: list[int], *, step: int = 0, seed: int = 5, beside: int = 0) -> dict[int, Tensor]:
    """Dropout keys of each example of a step, packed in some order with some neighbours, by the example's place."""
    examples = documents(4, seed=0)
    job = EngineJob("job", LoraConfig(lora_dropout=0.1), TrainConfig(seed=seed), examples)
    live = TrainEngine(tiny_base("llama")).add(job)
    neighbours = [Chunk("other", ((0, example),), step) for example in documents(beside, seed=9)]
    batch = pack(
        [*neighbours, Chunk("job", tuple((place, examples[place]) for place in batch_order), step)],
        torch.device("cpu"),
    )
    packed = batch.chunks[-1]
    keys = live.dropout_keys(packed)
    assert keys is not None
    assert keys.shape == (packed.padded_tokens,)
    lengths = [len(examples[place].ids) for place in batch_order]
    return dict(zip(batch_order, keys[: sum(lengths)].split(lengths), strict=True))


def test_keys_are_of_seed_step_example_and_token_wherever_they_are_packed() -> None:
    together = keys_of([0, 1, 2, 3])
    for other in (keys_of([3, 1]), keys_of([1, 3], beside=3), keys_of([3, 2, 1, 0], beside=1)):
        assert all(torch.equal(keys, together[place]) for place, keys in other.items())
    everything = torch.cat(
        [*together.values(), *keys_of([0, 1, 2, 3], step=1).values(), *keys_of([0, 1, 2, 3], seed=6).values()]
    )
    assert len(everything.unique()) == len(everything)


def test_dropout_differs_between_modules_of_one_step() -> None:
    x = torch.randn(1, 8, 64)
    keys = torch.arange(8)
    bank = AdapterBank(tiny_model("llama"))
    adapter = random_adapter(bank, 1, 4, dropout=0.5)
    q, k = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    adapter.a[k], adapter.b[k] = adapter.a[q], adapter.b[q]
    with torch.no_grad():
        bases = [bank.linears[name](x) for name in (q, k)]
        with bank.routed([Segment(adapter, 8, keys)]):
            updates = [bank.linears[name](x) - base for name, base in zip((q, k), bases, strict=True)]
    assert not torch.allclose(updates[0], updates[1], atol=1e-3)
