"""Two hundred steps in any company: what a job learns is what it learns alone, in every mode that runs on a CPU."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from lora_core.models.llama.decoder import Checkpointing
from lora_core.training import job as engine_job
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob, JobDiverged
from tests.support.models import (
    RanksInThreads,
    decoder_base,
    documents,
    job,
    outcome_of,
    relative,
    state,
    tiny_base,
    train_to_the_end,
    train_until,
)

STEPS = 200
JOINS, LEAVES, POISONED_AT = 30, 150, 50  # micro-batches, and steps of the poisoned job


def small_job(name: str, seed: int, *, epochs: int = STEPS // 2, lora: dict[str, Any], **train: Any) -> EngineJob:
    """Two steps an epoch on a few short documents."""
    examples = documents(4 + seed % 3, seed, 3, 12)
    options = {"batch_size": len(examples) // 2 + len(examples) % 2, "max_seq_len": 12, "learning_rate": 2e-3}
    return job(name, examples=examples, epochs=epochs, lora=lora, seed=seed, **options | train)


def eight_jobs() -> dict[str, EngineJob]:
    """Ranks from 1 to 64, and no two alike in what they are or how they are trained."""
    head_and_tail = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}
    jobs = [
        small_job("plain", 0, lora={"r": 1, "rank_pattern": {"down_proj": 7}}, lr_scheduler="constant"),
        small_job("wide", 1, lora={"r": 64, "lora_dropout": 0.3}, lr_scheduler="linear", weight_decay=0.2),
        small_job("dora", 2, lora={"r": 8, "use_dora": True, "use_rslora": True}, loraplus_lr_ratio=3.0),
        small_job("pissa", 3, lora={"r": 6, "init_lora_weights": "pissa", "lora_dropout": 0.2}, warmup_ratio=0.3),
        small_job("late", 4, lora={"r": 16, "lora_dropout": 0.1, **head_and_tail}, max_grad_norm=0.05),
        small_job("early", 5, lora={"r": 2, "lora_dropout": 0.05, "alpha_pattern": {"v_proj": 30}}),
        small_job("poison", 6, lora={"r": 32, "lora_dropout": 0.1}, max_grad_norm=None),
        small_job("idle", 7, lora={"r": 5, "init_lora_weights": "gaussian"}, epochs=10),
    ]
    return {wanted.name: wanted for wanted in jobs}


def test_eight_jobs_of_200_steps_equal_their_solo_runs_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One joins late, one leaves early, one turns NaN and is left in, one is done while the others go on. Widths that
    are no multiple of a vector register; chunks and micro-batches so small that the company differs from one to the
    next.
    """
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 16)
    jobs = eight_jobs()
    engine = TrainEngine(tiny_base("llama-odd"), capacity=96)
    live = {name: engine.add(wanted) for name, wanted in jobs.items() if name != "late"}
    losses: dict[str, list[float]] = {name: [] for name in jobs}
    failures = []
    for call in range(2000):
        if call == JOINS:
            live["late"] = engine.add(jobs["late"])
        if call == LEAVES:
            engine.remove("early")
        if live["poison"].progress.step == POISONED_AT:
            live["poison"].optimizer.flat.fill_(math.nan)
        if all(one.done for name, one in live.items() if name not in ("early", "poison")) and call > LEAVES:
            break
        for name, result in engine.micro_batch().items():
            if isinstance(result, JobDiverged):
                failures.append((name, result.step))
            else:
                losses[name].append(outcome_of(result).loss)
    assert set(failures) == {("poison", POISONED_AT + 1)}
    counts = {name: len(of_one) for name, of_one in losses.items()}
    assert 20 < counts.pop("early") < STEPS
    assert counts == {name: {"poison": POISONED_AT, "idle": 20}.get(name, STEPS) for name in counts}
    for name, wanted in jobs.items():
        alone = TrainEngine(tiny_base("llama-odd"), capacity=96)
        same = alone.add(wanted)
        assert [outcome.loss for outcome in train_until(alone, name, len(losses[name]))] == losses[name], name
        if name != "poison":
            assert torch.equal(state(live[name]), state(same)), name
            assert live[name].progress == same.progress


# --- the decoder, in fp64 --------------------------------------------------------------------------------------------


def decoder_jobs() -> list[EngineJob]:
    """What the decoder adapts: plain, rank-stabilised with dropout, with magnitudes, with patterns on some modules of
    one layer.
    """
    some = {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]}
    patterns = {"rank_pattern": {"up_proj": 20}, "alpha_pattern": {"k_proj": 3}}
    return [
        small_job("plain", 1, lora={"r": 1}, lr_scheduler="constant", weight_decay=0.1),
        small_job(
            "rs", 2, lora={"r": 64, "use_rslora": True, "lora_dropout": 0.1}, lr_scheduler="linear", warmup_ratio=0.1
        ),
        small_job("dora", 5, lora={"r": 8, "lora_alpha": 9, "use_dora": True}, loraplus_lr_ratio=2.0),
        small_job("some", 3, lora={"r": 3, **some, **patterns}, max_grad_norm=0.1),
    ]


def neighbours() -> list[EngineJob]:
    """What goes through the hooks meanwhile, and what leaves the decoder early."""
    return [
        small_job("pissa", 4, lora={"r": 4, "lora_dropout": 0.2, "init_lora_weights": "pissa"}, epochs=40),
        small_job("brief", 6, lora={"r": 2, "use_dora": True}, epochs=20),
    ]


@cache
def alone_through_the_hooks() -> dict[str, Tensor]:
    found = {}
    for wanted in decoder_jobs():
        engine = TrainEngine(tiny_base("llama", dtype=torch.float64))
        live = engine.add(wanted)
        train_to_the_end(engine, wanted.name)
        found[wanted.name] = state(live)
    return found


def in_company(engine: TrainEngine, between: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """`between` is called before each micro-batch once all are there."""
    *first, last = decoder_jobs()
    lives = [engine.add(wanted) for wanted in first]
    for wanted in neighbours():
        engine.add(wanted)
    for _ in range(3):
        engine.micro_batch()
    lives.append(engine.add(last))
    assert engine.forward.name == "llama"
    while not all(live.done for live in lives):
        between()
        engine.micro_batch()
    assert {live.progress.step for live in lives} == {STEPS}
    return {live.job.name: state(live) for live in lives}


def test_the_decoder_in_company_is_the_hooks_alone_after_200_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is computed twice and cut how, which change here between any two micro-batches: many chunks packed side
    by side with all activations kept, or a document at a time, which is no packing at all. Two ranks, below, compute
    everything twice.
    """
    expected = alone_through_the_hooks()
    engine = TrainEngine(decoder_base("llama"), capacity=96, checkpointing="none")
    modes: Iterator[tuple[Checkpointing, int, int]] = itertools.cycle([("none", 96, 16), ("selective", 1, 1)])

    def change() -> None:
        engine.room.checkpointing, engine.room.capacity, chunk_tokens = next(modes)
        monkeypatch.setattr(engine_job, "CHUNK_TOKENS", chunk_tokens)

    for name, found in in_company(engine, change).items():
        assert relative(found, expected[name]) < 1e-9, name


def test_two_ranks_with_the_decoder_in_company_are_the_hooks_alone_after_200_steps() -> None:
    expected = alone_through_the_hooks()
    found: list[dict[str, Tensor]] = []
    ranks = RanksInThreads("llama", torch.float64, 96, "full", with_decoder=True)
    ranks.run(lambda engine: found.append(in_company(engine)))
    assert len(found) == 2
    for name, one in expected.items():
        assert torch.equal(found[0][name], found[1][name])
        assert relative(found[0][name], one) < 1e-9, name


# --- NaN, on either way ----------------------------------------------------------------------------------------------


def trained(engine: TrainEngine, poison: float | None) -> dict[str, Tensor]:
    """Thirty steps of three jobs beside one whose weights are spoilt after its fifth and that is then left in for three
    micro-batches, or (None) without it.
    """
    lives = [engine.add(wanted) for wanted in decoder_jobs()]
    if poison is not None:
        bad = engine.add(small_job("bad", 6, lora={"r": 32}))
        failures = []
        for _ in range(8):
            if bad.progress.step == 5:
                bad.optimizer.flat[::7] = poison
            if isinstance(result := engine.micro_batch().get("bad"), JobDiverged):
                failures.append(result)
        assert [failure.step for failure in failures] == [6] * 3
        assert bad.progress.step == 5
        engine.remove("bad")
    while min(live.progress.step for live in lives) < 30:
        engine.micro_batch()
    assert all(live.progress.step == 30 for live in lives)
    return {live.job.name: state(live) for live in lives}


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_job_gone_bad_on_the_decoder_is_stopped_and_the_others_never_knew_it(
    checkpointing: Checkpointing, poison: float
) -> None:
    clean = trained(TrainEngine(decoder_base("llama"), checkpointing=checkpointing), None)
    engine = TrainEngine(decoder_base("llama"), checkpointing=checkpointing)
    for name, found in trained(engine, poison).items():
        assert relative(found, clean[name]) < 1e-12, name


# --- jobs come and go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_base", [tiny_base, decoder_base])
def test_jobs_that_come_and_go_leave_the_base_where_and_what_it_was(make_base: Callable[[str], Any]) -> None:
    """Each kind in turn beside one that stays; a job that left leaves no memory behind."""
    base = make_base("llama")
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in base.model.state_dict().items()}
    engine = TrainEngine(base)
    engine.add(small_job("stays", 1, lora={"r": 4}))
    gone = []
    for wanted in eight_jobs().values():
        live = engine.add(wanted)
        for _ in range(2):
            engine.micro_batch()
        assert live.progress.step == 2
        engine.remove(wanted.name)
        engine.micro_batch()
        gone.append(ref(live.optimizer))
        del live
    gc.collect()
    assert [optimizer() for optimizer in gone] == [None] * len(gone)
    assert engine.live["stays"].progress.step == 3 * len(gone)
    for name, tensor in base.model.state_dict().items():
        pointer, content = before[name]
        assert tensor.data_ptr() == pointer
        assert torch.equal(tensor, content)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.model.parameters())
