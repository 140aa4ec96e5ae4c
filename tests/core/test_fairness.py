"""What a job gets of the machine is its fair share, whoever else is there."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_core.data.dataset import Example
from lora_core.data.packing import Chunk
from lora_core.training import job as engine_job
from lora_core.training.engine import TrainEngine
from lora_core.training.fair_queue import FairQueue
from lora_core.training.job import EngineJob
from tests.support.models import (
    RanksInThreads,
    documents,
    job,
    state,
    tiny_base,
    train_to_the_end,
)


def test_weight_decay_is_a_jobs_own() -> None:
    """A finished neighbour, whose A and B are not zero, stays as it is while another decays by 1 % a step."""
    engine = TrainEngine(tiny_base("llama"))
    finished = engine.add(job("finished", epochs=1, examples=documents(8, 1), weight_decay=0.3))
    while not finished.done:
        engine.step()
    before = state(finished)
    assert all(bool(b.abs().min() > 0) for b in finished.adapter.b.values())
    engine.add(job("decaying", weight_decay=2.0))
    for _ in range(5):
        assert set(engine.step()) == {"decaying"}
    assert torch.equal(state(finished), before)


# --- fair shares -----------------------------------------------------------------------------------------------------


def same(count: int) -> list[Example]:
    """Documents of one length."""
    return documents(count, 0, 16, 16)


def rows_of(sizes: list[int], job: str) -> list[Chunk]:
    """Chunks of so many rows, in eights."""
    return [Chunk(job, ((0, Example([3] * 8 * size, [False] * 8 * size)),), 0) for size in sizes]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 6), st.integers(1, 8), st.integers(1, 30))
def test_jobs_that_want_more_get_equal_rows(jobs: int, size: int, capacity: int) -> None:
    """No two are ever further apart than a chunk."""
    queue = FairQueue()
    served = {str(number): 0 for number in range(jobs)}
    for name in served:
        queue.put(name, rows_of([size] * 30 * capacity, name), training=True)
    for _ in range(30):
        taken, training = queue.take(8 * capacity)
        assert training
        assert len(taken) == max(1, capacity // size)
        for chunk in taken:
            served[chunk.job] += chunk.padded_tokens
        assert max(served.values()) - min(served.values()) <= 8 * size


def test_long_documents_get_their_share_and_leave_others_what_they_cannot_use() -> None:
    """Two jobs with chunks of 5 of 9 places: one of them is in every micro-batch, and small chunks take what is left.
    They are not held back for it when another job comes.
    """
    queue = FairQueue()
    for name, size in (("small", 1), ("long", 5), ("longer", 5)):
        queue.put(name, rows_of([size] * 500, name), training=True)
    first = [chunk.job for _ in range(40) for chunk in queue.take(72)[0]]
    assert {name: first.count(name) for name in ("small", "long", "longer")} == {"small": 160, "long": 20, "longer": 20}
    queue.drop("long")
    queue.drop("longer")
    queue.put("other", rows_of([1] * 500, "other"), training=True)
    then = [chunk.job for _ in range(10) for chunk in queue.take(72)[0]]
    assert then.count("small") >= 30


def test_a_copy_of_a_queue_goes_its_own_way_and_the_same_one() -> None:
    """With work that waits, work that is done, and a job that comes later."""
    queue = FairQueue()
    for name, sizes in (("small", [1] * 30), ("large", [4] * 10), ("brief", [2] * 4)):
        queue.put(name, rows_of(sizes, name), training=name != "large")
    for _ in range(6):
        queue.take(64)

    def goes_on(queue: FairQueue) -> list[str]:
        queue.put("new", rows_of([1] * 9, "new"), training=True)
        if "brief" not in queue:
            queue.put("brief", rows_of([2] * 9, "brief"), training=True)
        return [
            f"{chunk.job} {training}" for taken, training in iter(lambda: queue.take(24), ([], True)) for chunk in taken
        ]

    copies = [queue.copy(), queue.copy()]
    first = goes_on(copies[0])
    assert len(first) > 20
    assert goes_on(queue) == goes_on(copies[1]) == first


def test_a_job_that_was_away_is_not_owed_what_it_did_not_ask_for() -> None:
    queue = FairQueue()
    queue.put("old", rows_of([1] * 100, "old"), training=True)
    queue.put("brief", rows_of([1], "brief"), training=True)
    for _ in range(20):
        queue.take(16)
    queue.put("brief", rows_of([1] * 100, "brief"), training=True)
    queue.put("new", rows_of([1] * 100, "new"), training=True)
    served = [chunk.job for _ in range(10) for chunk in queue.take(24)[0]]
    assert all(abs(served.count(name) - 10) <= 2 for name in ("old", "brief", "new"))


def test_a_small_job_steps_with_every_micro_batch_while_a_big_one_fills_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of 16 documents, and after it 32 to validate on, beside steps of 2: at 4 documents a micro-batch the small
    job waits for no neighbour's batch, and the big one gets the rest.
    """
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 16)
    engine = TrainEngine(tiny_base("llama"), capacity=64)
    big = engine.add(job("big", examples=same(16), validation=same(32), batch_size=16))
    while big.evaluation_due:
        engine.micro_batch()
    small = engine.add(job("small", examples=same(8), batch_size=2))
    for count in range(1, 9):
        outcomes = engine.micro_batch()
        assert "small" in outcomes
        assert small.progress.step == count
    assert big.progress.step == 1
    assert big.evaluation_due
    micro_batches = 0
    before = small.progress.step
    while big.evaluation_due:
        engine.micro_batch()
        micro_batches += 1
    assert small.progress.step - before >= micro_batches // 2 - 1
    assert micro_batches <= 8 + 16 + 1  # 32 documents at 4, and as many of the small job's, which has 2 at a time


def test_step_returns_the_jobs_that_stepped_and_nothing_once_all_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 16)
    engine = TrainEngine(tiny_base("llama"), capacity=64)
    engine.add(job("big", examples=same(16), batch_size=16, epochs=1))
    engine.add(job("small", examples=same(8), batch_size=2, epochs=2))
    stepped = [sorted(engine.step()) for _ in range(9)]
    assert stepped == [["small"]] * 7 + [["big", "small"], []]


# --- several ranks ---------------------------------------------------------------------------------------------------


def ragged_jobs() -> list[EngineJob]:
    """A batch of one, which leaves the second rank without rows, and batches whose shares are uneven."""
    return [
        job("one", examples=documents(5, 1), batch_size=1, epochs=3, lora={"lora_dropout": 0.2}),
        job("odd", examples=documents(9, 2), validation=documents(3, 5), batch_size=3, epochs=4, eval_steps=2),
        job("long", examples=documents(14, 3, 20, 30), batch_size=14, epochs=3),
        job("silent", examples=documents(3, 4), validation=documents(1, 6), batch_size=2, epochs=2),
    ]


def test_two_ranks_step_the_same_jobs_after_the_same_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a message between them; a rank without rows does not hang, one that joins or leaves between two
    micro-batches does no harm, and each job's adapter is bit for bit what two ranks make of it alone.
    """
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 32)
    results: list[dict[str, tuple[list[list[str]], Tensor]]] = []

    def together(engine: TrainEngine) -> None:
        jobs = {wanted.name: wanted for wanted in ragged_jobs()}
        live = {name: engine.add(jobs[name]) for name in ("one", "odd", "silent")}
        leaving = engine.add(job("leaving", examples=documents(20, 7), batch_size=20))
        order = []
        for call in itertools.count():
            if call == 3:
                live["long"] = engine.add(jobs["long"])
            if call == 5:
                engine.remove(leaving.job.name)  # in the middle of its first step
            if call > 5 and all(one.done for one in live.values()):
                break
            order.append(sorted(engine.micro_batch()))
        results.append({name: (order, state(one)) for name, one in live.items()})

    RanksInThreads("llama", capacity=64).run(together)
    alone: dict[str, list[Tensor]] = {wanted.name: [] for wanted in ragged_jobs()}
    for wanted in ragged_jobs():

        def by_itself(engine: TrainEngine, wanted: EngineJob = wanted) -> None:
            live = engine.add(wanted)
            train_to_the_end(engine, wanted.name)
            alone[wanted.name].append(state(live))

        RanksInThreads("llama", capacity=64).run(by_itself)
    for result in results:
        for name, (order, final) in result.items():
            assert order == results[0][name][0]
            assert all(torch.equal(final, other) for other in alone[name]), name
