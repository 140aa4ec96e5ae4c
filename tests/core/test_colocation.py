"""What a job computes beside others is what it computes alone: on every path through a base, in every
precision that a CPU has, and with every option of an adapter.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple
from weakref import ref

import pytest
import torch
from torch import Tensor

from lora_core.models.base import BaseModel
from lora_core.models.precision import QUANTISED
from lora_core.training import job as engine_job
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob, JobDiverged
from lora_core.training.optimizer import StepOutcome
from tests.support.models import (
    RanksInThreads,
    decoder_base,
    job,
    quantised_base,
    relative,
    state,
    threads,
    tiny_base,
    train_until,
)
from tests.support.unlike_jobs import unlike_jobs

STEPS = 10
JOINS, LEAVES, POISONED_AT = 3, 9, 3  # micro-batches, and steps of the poisoned job
DOUBLE = torch.float64


class Result(NamedTuple):
    """What came of a job: its outcomes, the best and last figures of its validation among them, and A, B, m and both
    moments.
    """

    outcomes: list[StepOutcome]
    state: Tensor


def train_alone(engine: TrainEngine, wanted: EngineJob, steps: int) -> Result:
    live = engine.add(wanted)
    return Result(train_until(engine, wanted.name, steps), state(live))


def train_together(
    engine: TrainEngine, wanted: dict[str, EngineJob], poison: float, between: Callable[[], None] = lambda: None
) -> dict[str, Result]:
    """One joins late, one leaves early, in the middle of a step or not, one is done while the others go on; one turns
    NaN, fails, and is left in. `between` is called before each micro-batch.
    """
    live = {name: engine.add(one) for name, one in wanted.items() if name != "late"}
    outcomes: dict[str, list[StepOutcome]] = {name: [] for name in wanted}
    failures: list[tuple[str, int]] = []
    for call in itertools.count():
        if call == JOINS:
            live["late"] = engine.add(wanted["late"])
        if call == LEAVES:
            engine.remove("early")
        if live["poison"].progress.step == POISONED_AT:
            live["poison"].optimizer.flat[::7] = poison
            live["poison"].adapter.norm.clear()
        if call > LEAVES and all(one.done for name, one in live.items() if name not in ("early", "poison")):
            break
        between()
        for name, result in engine.micro_batch().items():
            if isinstance(result, JobDiverged):
                failures.append((name, result.step))
            else:
                outcomes[name].append(result)
    steps = {POISONED_AT, POISONED_AT + 1}  # where an evaluation was due, the first is what it fails after
    assert len(failures) > 3 and all(name == "poison" and step in steps for name, step in failures)
    assert 0 < len(outcomes["early"]) < wanted["early"].steps
    return {name: Result(outcomes[name], state(live[name])) for name in wanted if name != "poison"}


# --- bit for bit, in fp32 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "path", "count"),
    [
        ("llama-odd", "hooks", 1),
        ("gpt2", "hooks", 1),
        ("llama-odd", "hooks", 2),
        ("llama", "hooks", 1),
        ("llama-even", "llama", 1),
        ("llama-even", "llama", 2),
    ],
)
def test_colocated_equals_alone_bit_for_bit(kind: str, path: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with widths that are no multiple of a vector register. Chunks and micro-batches are so small that neighbours
    differs from one to the next.
    """
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 32)
    wanted = unlike_jobs(kind, path, STEPS)

    def engine() -> TrainEngine:
        base = tiny_base(kind) if path == "hooks" else decoder_base(kind, dtype=torch.float32)
        return TrainEngine(base, capacity=128)

    with threads(count):
        colocated = train_together(engine(), wanted, math.nan)
        for name, together in colocated.items():
            alone = train_alone(engine(), wanted[name], len(together.outcomes))
            assert together.outcomes == alone.outcomes, name
            assert torch.equal(together.state, alone.state), name


# --- by the formula, in fp64 -----------------------------------------------------------------------------------------


KIND = "llama-even"


def base_of(path: str, alone: bool = False) -> BaseModel:
    """What trains together, and what it is compared with alone: transformers' modules where they are what the base
    is.
    """
    if path in QUANTISED:
        return quantised_base(path)
    return (tiny_base if alone else decoder_base)(KIND, dtype=DOUBLE)


@cache
def alone_in_double(path: str, name: str, done: int) -> Result:
    wanted = unlike_jobs(KIND, "llama", STEPS)[name]
    return train_alone(TrainEngine(base_of(path, alone=True), capacity=128), wanted, done)


def compare(path: str, colocated: dict[str, Result]) -> None:
    for name, together in colocated.items():
        alone = alone_in_double(path, name, len(together.outcomes))
        assert relative(together.state, alone.state) < 1e-9, name
        losses, expected = ([outcome.loss for outcome in result.outcomes] for result in (together, alone))
        assert losses == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("path", ["llama", "fp8", "nf4"])
def test_colocated_on_the_decoder_is_alone_by_the_formula(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is computed twice and cut how, which changes here between any two micro-batches: many chunks packed side
    by side with all activations kept, or a document at a time, which is no packing at all.
    """
    engine = TrainEngine(base_of(path), capacity=96)
    modes: Any = itertools.cycle([("none", 96, 16), ("selective", 1, 1), ("full", 256, 64)])

    def change() -> None:
        engine.planner.checkpointing, engine.planner.capacity, chunk_tokens = next(modes)
        monkeypatch.setattr(engine_job, "CHUNK_TOKENS", chunk_tokens)

    compare(path, train_together(engine, unlike_jobs(KIND, "llama", STEPS), math.nan, change))


def test_colocated_on_two_ranks_on_the_decoder_is_alone_by_the_formula() -> None:
    """And both ranks end with the same bits; a number that is too large spreads as one that is none."""
    found: list[dict[str, Result]] = []
    ranks = RanksInThreads(KIND, DOUBLE, 96, "full", with_decoder=True)
    ranks.run(lambda engine: found.append(train_together(engine, unlike_jobs(KIND, "llama", STEPS), math.inf)))
    one, other = found
    assert all(torch.equal(one[name].state, other[name].state) for name in one)
    compare("llama", one)


# --- jobs come and go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_base", [tiny_base, decoder_base])
def test_jobs_that_come_and_go_leave_the_base_where_and_what_it_was(make_base: Callable[[str], Any]) -> None:
    """Each kind in turn beside one that stays; a job that left leaves no memory behind."""
    base = make_base("llama")
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in base.model.state_dict().items()}
    engine = TrainEngine(base)
    engine.add(job("stays", batch_size=10))
    gone = []
    path = "hooks" if make_base is tiny_base else "llama"
    for wanted in [one for one in unlike_jobs("llama", path, STEPS).values() if not one.validation]:
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
