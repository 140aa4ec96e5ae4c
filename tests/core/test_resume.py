"""A job that goes on from a checkpoint ends as if it had never stopped, bit for bit."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lora_core.adapters.targets import AdaptableModules
from lora_core.data.dataset import Example
from lora_core.models.base import BaseModel
from lora_core.training import job as engine_job
from lora_core.training.engine import TrainEngine
from lora_core.training.optimizer import StepOutcome
from tests.support.models import (
    decoder_base,
    documents,
    job,
    outcome_of,
    quantised_base,
    random_adapter,
    relative,
    state,
    tiny_base,
    tiny_model,
    train_to_the_end,
    train_until,
)
from tests.support.unlike_jobs import unlike_jobs

STEPS = 4
PATHS: dict[str, Callable[[], BaseModel]] = {
    "hooks": lambda: tiny_base("llama-even"),
    "llama": lambda: decoder_base("llama-even", torch.float32),
}


@pytest.mark.parametrize("path", PATHS)
def test_resumed_jobs_end_bit_equal_beside_others(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs with every option, from what was there after a few micro-batches: dropout, schedule, epochs, evaluations and
    moments go on. They come back in another order into other micro-batches, where singular vectors round otherwise.
    """
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 48)
    svd, wanted = torch.linalg.svd, unlike_jobs("llama-even", path, STEPS)
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kw: tuple(part * (1 + 1e-6) for part in svd(*args, **kw)))
    engine = TrainEngine(PATHS[path](), capacity=96)
    checkpoints = []
    with monkeypatch.context() as here:
        here.setattr(torch.linalg, "svd", svd)
        live = {name: engine.add(one) for name, one in wanted.items()}
    for call in itertools.count():
        if call in (2, 9):
            checkpoints.append({name: one.snapshot().dump() for name, one in live.items()})
        if all(one.done for one in live.values()):
            break
        engine.micro_batch()
    for blobs in checkpoints:
        other = TrainEngine(PATHS[path](), capacity=200)
        resumed = {name: other.add(wanted[name], blobs[name]) for name in reversed(wanted)}
        while not all(one.done for one in resumed.values()):
            other.micro_batch()
        for name, one in live.items():
            assert torch.equal(state(resumed[name]), state(one)), name
            assert resumed[name].progress == one.progress, name
            assert resumed[name].snapshot().dump() == one.snapshot().dump(), name


@pytest.mark.parametrize("base_in", [
    lambda: tiny_base("llama-even", dtype=torch.bfloat16),
    lambda: decoder_base("llama-even", torch.bfloat16),
    lambda: quantised_base("fp8", torch.bfloat16),
    lambda: quantised_base("nf4", torch.bfloat16),
], ids=["hooks", "llama", "fp8", "nf4"])  # fmt: skip
@pytest.mark.parametrize("name", ["wide", "dora", "ranks", "pairs"])
def test_resumed_alone_a_job_ends_bit_equal_in_every_precision(base_in: Callable[[], BaseModel], name: str) -> None:
    """Where what lies beside a row has a say in its rounding."""
    wanted, base = unlike_jobs("llama-even", "llama", STEPS)[name], base_in()
    engine = TrainEngine(base, capacity=64)
    live = engine.add(wanted)
    losses = [outcome.loss for outcome in train_until(engine, name, 2)]
    again = TrainEngine(base, capacity=64)
    resumed = again.add(wanted, live.snapshot().dump())
    assert train_until(again, name, STEPS) == train_until(engine, name, STEPS)
    assert losses and resumed.snapshot().dump() == live.snapshot().dump()
    for one in (engine, again):
        one.forward.close()


def test_a_checkpoint_of_any_moment_continues_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step, before, in and after an evaluation: the same steps, figures, best weights and end."""
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 48)
    wanted = job(
        validation=documents(6, seed=50),
        lora={"lora_dropout": 0.2},
        epochs=9,
        learning_rate=0.03,
        eval_steps=2,
        early_stopping_patience=2,
    )

    engine = TrainEngine(tiny_base("llama"), capacity=64)
    live = engine.add(wanted)
    outcomes: list[StepOutcome] = []
    moments = []
    while not live.done:
        moments.append((live.snapshot().dump(), len(outcomes), live.evaluation_due, "job" in engine._queues[0]))
        if outcome := engine.micro_batch().get("job"):
            outcomes.append(outcome_of(outcome))
    assert live.progress.stopped
    assert live.progress.best is not None
    assert live.progress.best.step < live.progress.step - 2
    assert {(due, begun) for _, _, due, begun in moments} == {
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    }
    for blob, done, _, _ in moments[::11]:
        again = TrainEngine(tiny_base("llama"), capacity=160)
        resumed = again.add(wanted, blob)
        assert train_to_the_end(again, "job") == outcomes[done:]
        assert resumed.progress == live.progress
        assert torch.equal(state(resumed), state(live))


def test_a_snapshot_stays_as_it_was_while_training_goes_on() -> None:
    """It is written by another thread, steps later."""
    engine = TrainEngine(tiny_base("llama"))
    live = engine.add(job(validation=documents(6, seed=50), eval_steps=1, load_best_model_at_end=True))
    train_until(engine, "job", 3)
    written, snapshot = live.snapshot().dump(), live.snapshot()
    train_until(engine, "job", 6)
    assert live.snapshot().dump() != written
    assert snapshot.dump() == written


def test_the_way_back_is_as_short_for_many_rows_and_late_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint names the step and holds no rows; resuming draws the order of its epoch, and of the first, where
    unused modules are looked for, but not of those between.
    """
    sizes: list[int] = []
    orders: list[set[int]] = []
    drawn: list[int] = []
    order = engine_job._order

    def counted(examples: int, seed: int, epoch: int) -> Tensor:
        drawn.append(epoch)
        return order(examples, seed, epoch)

    monkeypatch.setattr(engine_job, "_order", counted)
    for rows, steps in ((8, 1), (800, 1), (8, 41)):
        wanted = job(examples=documents(rows, 0), epochs=50, batch_size=8)
        engine = TrainEngine(tiny_base("llama"))
        live = engine.add(wanted)
        train_until(engine, "job", steps)
        sizes.append(len(blob := live.snapshot().dump()))
        resumed = TrainEngine(tiny_base("llama"))
        drawn.clear()
        resumed.add(replace(wanted), blob)  # which knows nothing yet
        train_until(resumed, "job", steps + 1)
        orders.append(set(drawn))
    assert max(sizes) - min(sizes) < 64  # digits
    assert orders == [{0, 1, 2}, {0}, {0, 41, 42}]  # and the next epoch's, made ready ahead


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def run_rank(folder: Path, rank: int, ranks: int, last: int | None) -> None:
    """What each process of the test below does: train from the newest checkpoint there is, to the end or for `last`
    steps, after which it waits to be killed, however fast it was.
    """
    meet = f"file://{folder}/meet-{len(list(folder.glob('run-*')))}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    engine = TrainEngine(tiny_base("llama"), capacity=64, rank=rank, ranks=ranks, all_reduce=dist.all_reduce)
    engine.add(job("neighbour", seed=1, batch_size=7))
    checkpoint = folder / "checkpoint"
    wanted = job(
        validation=documents(7, 50), lora={"lora_dropout": 0.2}, epochs=40, eval_steps=5, load_best_model_at_end=True
    )
    blobs = [checkpoint.read_bytes() if rank == 0 and checkpoint.exists() else None]
    dist.broadcast_object_list(blobs, src=0)
    live = engine.add(wanted, blobs[0])
    while not live.done:
        if live.progress.step == last:
            time.sleep(60)
        engine.micro_batch()
        if rank == 0:
            (folder / "new").write_bytes(live.snapshot().dump())
            (folder / "new").replace(checkpoint)
    dist.barrier()
    if rank == 0:
        (folder / "end").write_bytes(live.snapshot().dump())


def start(target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Processes with these arguments, forked from one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.core.test_resume", "transformers.models.llama.modeling_llama"])
    processes = [context.Process(target=target, args=of_one) for of_one in arguments]
    for process in processes:
        process.start()
    return processes


def start_run(folder: Path, ranks: int, last: int | None = None) -> list[Any]:
    """`run_rank` in processes of their own."""
    (folder / f"run-{len(list(folder.glob('run-*')))}").touch()
    return start(run_rank, [(folder, rank, ranks, last) for rank in range(ranks)])


@pytest.mark.alone
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_processes_end_with_the_same_bits(ranks: int, tmp_path: Path) -> None:
    """`kill -9` at two moments that nobody chose, often in the middle of a step; each time all ranks go on from the
    last checkpoint that was complete.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    undisturbed = start_run(whole, ranks)
    for pause, last in ((0.05, 60), (0.11, 119)):
        processes = start_run(broken, ranks, last)
        before = (broken / "checkpoint").read_bytes() if (broken / "checkpoint").exists() else None
        deadline = time.monotonic() + 60
        while not (broken / "checkpoint").exists() or (broken / "checkpoint").read_bytes() == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(pause)
        for process in processes:
            process.kill()
            process.join()
        assert not (broken / "end").exists()
    for process in (*start_run(broken, ranks), *undisturbed):
        process.join(60)
        assert process.exitcode == 0
    assert (broken / "end").read_bytes() == (whole / "end").read_bytes()


# --- many ranks ------------------------------------------------------------------------------------------------------


def train_two_jobs(engine: TrainEngine) -> tuple[list[Tensor], dict[str, list[float]]]:
    """Their weights, and the losses of all steps: one job has fewer documents a step than there are ranks, and none
    divides by them.
    """
    few = job("few", seed=1, batch_size=3, epochs=3, lora={"lora_dropout": 0.2}, validation=documents(3, 50))
    odd = job("odd", seed=2, batch_size=9, epochs=5)
    live, losses = [engine.add(wanted) for wanted in (few, odd)], dict[str, list[float]](few=[], odd=[])
    while not all(one.done for one in live):
        for name, outcome in engine.micro_batch().items():
            losses[name].append(outcome_of(outcome).loss)
    return [state(one) for one in live], losses


def run_one_of_many(folder: Path, rank: int, ranks: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    base = tiny_base("llama", dtype=torch.float64)
    engine = TrainEngine(base, capacity=64, rank=rank, ranks=ranks, all_reduce=dist.all_reduce)
    torch.save(train_two_jobs(engine), folder / f"rank-{rank}")
    dist.barrier()


@pytest.mark.alone
@pytest.mark.parametrize("ranks", [4, 8])
def test_many_ranks_end_as_one_does(ranks: int, tmp_path: Path) -> None:
    """Processes that add by gloo: all with the same bits, and within rounding those of one rank, in fp64."""
    processes = start(run_one_of_many, [(tmp_path, rank, ranks) for rank in range(ranks)])
    weights, losses = train_two_jobs(TrainEngine(tiny_base("llama", dtype=torch.float64)))
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    first, *others = [torch.load(tmp_path / f"rank-{rank}") for rank in range(ranks)]
    assert all(torch.equal(one, same) for other in others for one, same in zip(other[0], first[0], strict=True))
    assert all(relative(one, alone) < 1e-9 for one, alone in zip(first[0], weights, strict=True))
    assert {name: pytest.approx(of, rel=1e-9) for name, of in losses.items()} == first[1]


def test_checkpoint_of_other_settings_or_rows_is_refused() -> None:
    engine = TrainEngine(tiny_base("llama"))
    engine.add(job())
    engine.step()
    blob = engine.live["job"].snapshot().dump()
    rows = documents(10, seed=0)
    others = {
        "alpha": job(lora={"lora_alpha": 9}),
        "rate": job(learning_rate=1e-4),
        "rows": job(examples=[*rows[:-1], Example(rows[-1].ids[::-1], rows[-1].labels_mask)]),
        "labels": job(examples=[*rows[:-1], Example(rows[-1].ids, [False, *[True] * (len(rows[-1].ids) - 1)])]),
        "r": job(lora={"r": 5}),
        "start": replace(job(), init_adapter=random_adapter(AdaptableModules(tiny_model("llama")), 5)),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match="checkpoint"):
            TrainEngine(tiny_base("llama")).add(replace(other, name=name), blob)
    TrainEngine(tiny_base("llama")).add(job("other name"), blob)
    starts = [random_adapter(AdaptableModules(tiny_model("llama")), seed) for seed in (5, 6)]
    given = [replace(job(), init_adapter=start) for start in starts]
    blob = TrainEngine(tiny_base("llama")).add(given[0]).snapshot().dump()
    for other in (given[1], job()):
        with pytest.raises(ValueError, match="checkpoint"):
            TrainEngine(tiny_base("llama")).add(other, blob)
