"""The next micro-batch, made ready while the device computes: it is used, and it changes no bit of what is trained."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.training import engine as trainer
from lora_core.training import job as engine_job
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob, JobDiverged
from lora_core.training.optimizer import StepOutcome
from tests.support.models import RanksInThreads, decoder_base, documents, job, state, tiny_base

PATHS = pytest.mark.parametrize("path", ["hooks", "decoder"])
RANKS = pytest.mark.parametrize("ranks", [1, 2])

Steps = list[tuple[int, str, StepOutcome | str]]
"""(micro-batch, job, its outcome or error), of all jobs"""

DROPOUT = {"lora_dropout": 0.3}


def on_ranks(path: str, ranks: int, work: Callable[[TrainEngine], None], capacity: int = 96) -> None:
    """The decoder in bf16, hooks in fp32."""
    dtype, decoder = (torch.bfloat16, True) if path == "decoder" else (torch.float32, False)
    if ranks == 2:
        RanksInThreads("llama", dtype, capacity, with_decoder=decoder).run(work)
    else:
        work(TrainEngine((decoder_base if decoder else tiny_base)("llama", dtype=dtype), capacity=capacity))


def eventful_jobs() -> dict[str, EngineJob]:
    """One with a few micro-batches a step, two that are evaluated, one of them until it stops early; one joins late."""
    stops = {"eval_steps": 2, "early_stopping_patience": 1, "load_best_model_at_end": True, "learning_rate": 0.1}
    return {
        "long": job("long", examples=documents(20, 1), lora=DROPOUT, batch_size=11),
        "evaluated": job(
            "evaluated", examples=documents(9, 2), validation=documents(7, 3), lora=DROPOUT, eval_steps=3, epochs=3
        ),
        "stops": job("stops", examples=documents(8, 4), validation=documents(4, 5), lora=DROPOUT, **stops),
        "leaves": job("leaves", examples=documents(8, 6), lora=DROPOUT, batch_size=3),
        "poisoned": job("poisoned", examples=documents(8, 7), lora=DROPOUT, batch_size=3),
        "joins": job("joins", examples=documents(8, 8), lora=DROPOUT, batch_size=3),
    }


def trained_through_all(engine: TrainEngine, prefetch: bool) -> tuple[Steps, dict[str, Tensor]]:
    """Jobs join, leave, diverge and go on, are evaluated and stop: all outcomes, and each job's state at the end."""
    jobs, steps, left = eventful_jobs(), Steps(), {}
    live = {name: engine.add(new_job) for name, new_job in jobs.items() if name != "joins"}
    for call in range(60):
        if call == 7:
            live["joins"] = engine.add(jobs["joins"])
        if call == 16:
            left["leaves"] = state(live.pop("leaves"))
            engine.remove("leaves")
        if call in (5, 20):
            live["poisoned"].optimizer._grad[0] = math.nan
        if not prefetch:
            engine._prefetched = None
        for name, outcome in engine.micro_batch().items():
            steps.append((call, name, str(outcome) if isinstance(outcome, JobDiverged) else outcome))
    return steps, left | {name: state(live_job) for name, live_job in live.items()}


@PATHS
@RANKS
def test_no_bit_depends_on_it(path: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout on; micro-batches of several jobs, and steps of several micro-batches."""
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 48)

    def trained(prefetch: bool) -> tuple[Steps, dict[str, Tensor]]:
        results = []
        on_ranks(path, ranks, lambda engine: results.append(trained_through_all(engine, prefetch)))
        assert len(results) == ranks
        return results[0]

    (steps, prefetched), (expected_steps, expected) = trained(True), trained(False)
    assert steps == expected_steps
    assert prefetched.keys() == expected.keys() == eventful_jobs().keys()
    for name in prefetched:
        assert torch.equal(prefetched[name], expected[name]), name
    # All of it happened.
    assert len([name for _, name, outcome in steps if isinstance(outcome, str)]) == 2
    of_job = {name: [call for call, stepped, _ in steps if stepped == name] for name in prefetched}
    assert len(of_job["evaluated"]) == 9 and len(of_job["stops"]) in range(4, 20)
    assert any(later - sooner > 1 for sooner, later in itertools.pairwise(of_job["long"]))
    assert min(map(len, of_job.values())) > 3


@PATHS
@RANKS
def test_what_was_prefetched_is_what_is_used(path: str, ranks: int) -> None:
    """Else it would be made twice. An evaluation is prefetched, too, and that a job is done."""

    def work(engine: TrainEngine) -> None:
        made = count_plans(engine)
        engine.add(job("plain", lora=DROPOUT))
        done = engine.add(job("done", epochs=1))
        engine.add(job("evaluated", validation=documents(4, 1), eval_steps=2))
        used = 0
        for call in range(1, 16):
            prefetched = engine._prefetched
            engine.micro_batch()
            if prefetched is not None:
                used += 1
                assert len(made) == call + (engine._prefetched is not None)
                assert engine._queues is prefetched.queues and prefetched in made
        assert used >= 8 and done.done

    on_ranks(path, ranks, work)


def count_plans(engine: TrainEngine) -> list[Any]:
    """All that the engine makes from now on."""
    made: list[Any] = []
    plan = engine._plan_micro_batch

    def counted(next_steps: Any) -> Any:
        made.append(plan(next_steps))
        return made[-1]

    engine._plan_micro_batch = counted  # type: ignore[method-assign]
    return made


def test_it_is_made_before_the_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TrainEngine(tiny_base("llama"))
    engine.add(job(validation=documents(4, 1)))
    events: list[str] = []
    plan, answer = engine._plan_micro_batch, Tensor.tolist

    def recorded(sums: Tensor) -> Any:
        if sums.dim() == 2:  # of a step
            events.append("answered")
        return answer(sums)

    monkeypatch.setattr(engine, "_plan_micro_batch", lambda next_steps: (events.append("made"), plan(next_steps))[1])
    monkeypatch.setattr(Tensor, "tolist", recorded)
    engine.micro_batch()  # the evaluation before the first step
    events.clear()
    engine.micro_batch()
    engine.micro_batch()
    assert events == ["made", *["made", "answered"] * 2]


@PATHS
def test_a_job_that_diverged_and_is_healed_takes_the_same_rows_again(path: str) -> None:
    """What was made ready is of the step after, which has not come."""
    results: list[Tensor] = []
    for heal in (True, False):

        def work(engine: TrainEngine, heal: bool = heal) -> None:
            live = engine.add(job(batch_size=3, lora=DROPOUT))
            engine.step()
            if heal:
                live.optimizer._grad[0] = math.nan
                assert isinstance(engine.step()["job"], JobDiverged)
            engine.step()
            results.append(state(live))

        on_ranks(path, 1, work)
    assert torch.equal(*results)


@PATHS
def test_nothing_of_a_job_that_left_stays(path: str) -> None:
    """Its memory is free, and if it comes again, as it was, it trains as if it had stayed."""

    def work(engine: TrainEngine) -> None:
        new_job = job(lora=DROPOUT)
        live = engine.add(new_job)
        for _ in range(3):
            engine.step()
        checkpoint, references = live.snapshot().dump(), [weakref.ref(live.adapter), weakref.ref(live.bound)]
        engine.step()
        stayed = state(live)
        engine.remove("job")
        del live
        gc.collect()
        assert [reference() for reference in references] == [None, None]
        resumed = engine.add(new_job, checkpoint)
        engine.step()
        assert torch.equal(state(resumed), stayed)

    on_ranks(path, 1, work)


def test_nothing_stays_where_a_job_fails_to_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the other ranks it came in and left: there, too, the next micro-batch is made again, at today's capacity."""
    engine = TrainEngine(tiny_base("llama"), capacity=64)
    engine.add(job(examples=documents(20, 0), batch_size=20))
    engine.step()
    prepared = engine.prepare(job("other"))

    def fail(*_: object) -> None:
        engine.planner.capacity = 32
        raise MemoryError

    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 16)
    monkeypatch.setattr(trainer, "FlatAdamW", fail)
    with pytest.raises(MemoryError):
        engine.admit(prepared)
    sizes: list[int] = []
    forward_backward = engine.forward_backward
    monkeypatch.setattr(
        engine, "forward_backward", lambda batch: (sizes.append(batch.packed.ids.numel()), forward_backward(batch))
    )
    engine.micro_batch()
    assert sizes and max(sizes) <= 32
