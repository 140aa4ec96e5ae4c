"""Activation checkpointing: the same bits from less memory."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lora_core.config import LoraConfig, TrainConfig
from lora_core.models.hooks.checkpointing import decoder_layers
from lora_core.models.llama.decoder import Checkpointing
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob
from tests.support.models import FAMILIES, documents, next_chunks, threads, tiny_base

CAPACITY = 256


def job(number: int) -> EngineJob:
    """Jobs of different ranks, batches and seeds, the even ones with dropout."""
    lora = LoraConfig(r=2 + number, lora_dropout=0.3 * (number % 2 == 0))
    train = TrainConfig(batch_size=3 + number, epochs=50, learning_rate=5e-3, max_seq_len=64, seed=number)
    return EngineJob(f"job{number}", lora, train, documents(9, seed=number, longest=60))


def engine_of(kind: str, checkpointing: Checkpointing, jobs: int = 3) -> TrainEngine:
    engine = TrainEngine(tiny_base(kind), capacity=CAPACITY, checkpointing=checkpointing)
    for number in range(jobs):
        engine.add(job(number))
    return engine


def saved_bytes(engine: TrainEngine) -> int:
    """Bytes that a micro-batch's forward pass keeps for its backward pass, weights aside, each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in engine.base.model.parameters()}
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.forward_backward(engine.ready(next_chunks(engine.live.values())))
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


@pytest.mark.parametrize("kind", FAMILIES)
def test_recomputed_layers_train_the_same_bits(kind: str) -> None:
    """Dropout on, three jobs in one micro-batch, two threads: A, B and moments after five steps."""
    plain, recomputed = engine_of(kind, "none"), engine_of(kind, "full")
    with threads(2):
        for _ in range(5):
            assert plain.step() == recomputed.step()
    for name in plain.live:
        assert plain.live[name].snapshot().dump() == recomputed.live[name].snapshot().dump()


@pytest.mark.parametrize("kind", FAMILIES)
def test_recomputed_layers_keep_only_their_inputs(kind: str) -> None:
    engine = engine_of(kind, "full")
    kept = saved_bytes(engine)
    tokens = sum(-(-chunk.tokens // 8) * 8 for chunk in next_chunks(engine.live.values()))
    inputs = (len(decoder_layers(engine.base.model)) + 2) * tokens * engine.base.model.config.hidden_size * 4
    assert kept < 2.5 * inputs
    assert saved_bytes(engine_of(kind, "none")) > 5 * kept


def test_layers_are_the_models_own_again_after_a_step() -> None:
    engine = engine_of("llama", "full")
    engine.step()
    assert all("forward" not in vars(layer) for layer in decoder_layers(engine.base.model))
    assert engine.forward.modules.segments == ()
