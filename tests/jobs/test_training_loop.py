"""What one rank does by itself; the ranks together are tested in `test_service.py`."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.storage.directory import StorageCorrupt, StorageUnavailable
from jobs.session import loader as job_reader
from jobs.session.loader import JobReader
from jobs.session.messages import Assignment, JobFailed, NoRoom, Orders, RankBroke, Trained
from jobs.session.rank import Rank, train_loop
from jobs.session.report import OF_PRODUCTS, Held
from lora_core.adapters.peft_format import adapter_files
from lora_core.config import LoraConfig, TrainConfig
from lora_core.training.engine import TrainEngine, probe_losses
from lora_core.training.memory.predictor import DoesNotFitError, NoRoomBesideError
from tests.support.models import documents, job, tiny_base

ASSIGNMENT = Assignment("job-1", 2, "{}", "datasets/x", checkpoint_key="checkpoints/1-500")


def reader_whose_storage_answers(answers: list[Any], monkeypatch: pytest.MonkeyPatch) -> JobReader:
    """Each read takes the next answer."""
    reader = JobReader(None, None, rank=0)  # type: ignore[arg-type]
    reader.reading = {ASSIGNMENT.job_id: (ASSIGNMENT, None)}  # type: ignore[dict-item]

    def read(_: Assignment) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(reader, "_read_now", read)
    monkeypatch.setattr(job_reader, "STORAGE_PAUSE", 0.0)
    return reader


def test_a_job_with_a_checkpoint_outlives_a_storage_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [StorageUnavailable("503"), StorageUnavailable("503"), "read"]
    assert reader_whose_storage_answers(answers, monkeypatch)._read(ASSIGNMENT) == "read"


def test_what_waiting_does_not_mend_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = reader_whose_storage_answers([StorageCorrupt("other bytes"), "read"], monkeypatch)
    with pytest.raises(StorageCorrupt):
        reader._read(ASSIGNMENT)


def test_nobody_waits_for_ever_nor_for_a_job_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    away: list[Any] = [StorageUnavailable("503")] * 3
    reader = reader_whose_storage_answers([*away, "read"], monkeypatch)
    reader.reading = {}
    with pytest.raises(StorageUnavailable):
        reader._read(ASSIGNMENT)
    reader = reader_whose_storage_answers([*away, "read"], monkeypatch)
    monkeypatch.setattr(job_reader, "STORAGE_PATIENCE", 0.0)
    with pytest.raises(StorageUnavailable):
        reader._read(ASSIGNMENT)


def test_a_job_without_room_beside_others_waits_and_one_that_never_fits_fails() -> None:
    """Whatever one rank of two says."""
    answers: dict[str, list[Exception | None]] = {
        "waits": [None, NoRoomBesideError("not beside a")],
        "fails": [NoRoomBesideError("not beside a"), DoesNotFitError("not at all")],
    }
    reports: list[Any] = []

    def read(error: Exception | None) -> Future[Any]:
        work: Future[Any] = Future()
        if error is None:
            work.set_result((None, engine.prepare(job(name)), None))
        else:
            work.set_exception(error)
        return work

    for name, of_ranks in answers.items():
        engine = TrainEngine(tiny_base("llama"))
        rank: Rank = object.__new__(Rank)
        rank.rank, rank.engine = 0, engine
        rank.held = {"a": Held(Assignment("a", 1, "{}", ""), None, engine.add(job("a")), "")}  # type: ignore[arg-type]
        said: list[str | None] = []
        rank._gather = lambda answer, said=said: said.append(answer) or [*said]  # type: ignore[method-assign, misc]
        rank.mailbox = SimpleNamespace(report=SimpleNamespace(remote=reports.append))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("jobs.session.rank.ray.get", lambda reference: reference)
            rank.rank = 1
            rank._join(Assignment(name, 1, "{}", ""), read(of_ranks[1]))  # the other rank answers first
            rank.rank = 0
            rank._join(Assignment(name, 1, "{}", ""), read(of_ranks[0]))
        assert list(engine.live) == ["a"]
    assert reports == [NoRoom("waits", 1), JobFailed("fails", "rank 1: DoesNotFitError: not at all")]


def test_how_long_a_job_takes_is_told_from_what_is_left_of_it() -> None:
    """Ten documents, two epochs, at the rate of the products: half of it once half is done, or with two ranks."""
    engine = TrainEngine(tiny_base("llama"))
    live = engine.add(job("a", examples=documents(10, 0, 8, 8), epochs=2, batch_size=2))
    held = Held(Assignment("a", 1, "{}", ""), None, live, "")  # type: ignore[arg-type]
    parameters = engine.base.parameters
    alone = held.expected_seconds(engine.base, 1e6, ranks=1)
    assert alone == pytest.approx(4 * parameters * 160 / (1e6 * OF_PRODUCTS))
    assert held.expected_seconds(engine.base, 1e6, ranks=2) == alone / 2
    live.progress.step = live.job.steps // 2
    assert held.expected_seconds(engine.base, 1e6, ranks=1) == pytest.approx(alone / 2)


def test_what_broke_a_rank_is_told_after_what_had_ended_and_of_what_had_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is being handed over is neither blamed nor trained again, unless that is what failed."""
    reports: list[Any] = []
    rank: Rank = object.__new__(Rank)
    rank.rank, rank.held = 0, {"training": None}  # type: ignore[dict-item]
    rank.mailbox = SimpleNamespace(report=SimpleNamespace(remote=reports.append))
    rank._publisher = ThreadPoolExecutor(1)
    broken = threading.Event()

    def hand_over() -> None:
        assert broken.wait(30)
        reports.append("handed over")

    rank._hand_overs = {
        "ended": rank._publisher.submit(hand_over),
        "spoilt": rank._publisher.submit(lambda: 1 / 0),  # type: ignore[dict-item]
    }

    def run() -> None:
        threading.Timer(0.2, broken.set).start()
        raise RuntimeError("out of luck")

    rank.run = run  # type: ignore[method-assign]
    monkeypatch.setattr("jobs.session.rank.Rank", lambda *_: rank)
    monkeypatch.setattr("jobs.session.rank.ray.get", lambda reference: reference)
    config = dict.fromkeys(("settings", "mailbox", "base_model", "precision"))
    with pytest.raises(RuntimeError, match="out of luck"):
        train_loop(config)
    assert reports == ["handed over", RankBroke(0, "RuntimeError: out of luck", ("training", "spoilt"))]


def test_checkpoints_are_written_one_at_a_time_and_none_waits_for_ever() -> None:
    engine, went_on, written = TrainEngine(tiny_base("llama")), threading.Event(), []
    rank: Rank = object.__new__(Rank)
    rank.rank, rank.settings, rank._upload = 0, SimpleNamespace(checkpoint_seconds=0.0), None  # type: ignore[assignment]
    rank.held = {name: Held(Assignment(name, 1, "{}", ""), None, engine.add(job(name)), "") for name in "abc"}  # type: ignore[arg-type]

    def put(key: str, _: bytes) -> None:
        assert went_on.wait(30)
        written.append(key.split("/")[1])

    rank.storage = SimpleNamespace(put=put)  # type: ignore[assignment]
    rank._report = lambda report: None  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as rank._writer:
        for turn in range(4):
            while any(live.progress.step <= turn for live in engine.live.values()):
                engine.micro_batch()
            rank._maybe_checkpoint()
            rank._maybe_checkpoint()  # the first is being written
            assert len(written) == turn and rank._upload is not None
            went_on.set()
            rank._upload.result()
            went_on.clear()
    assert [key[0] for key in written] == ["a", "b", "c", "a"]


def rank_with_a_job_that_ends(report: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> Rank:
    """Of two jobs, "short" has one step and three examples."""
    rank: Rank = object.__new__(Rank)
    rank.engine = TrainEngine(tiny_base("llama"))
    rank.base, rank.rank, rank._base_model, rank._reported = rank.engine.base, 0, "tiny", math.inf
    rank.settings, rank._upload = SimpleNamespace(checkpoint_seconds=math.inf), None  # type: ignore[assignment]
    rank.handing_over, rank._hand_overs, rank._publisher = {}, {}, ThreadPoolExecutor(1)
    rank.mailbox = SimpleNamespace(report=SimpleNamespace(remote=report))
    monkeypatch.setattr("jobs.session.rank.ray.get", lambda reference: reference)
    jobs = [job("short", examples=documents(3, 1), epochs=1, batch_size=3), job("long", epochs=1000)]
    spec: Any = SimpleNamespace(lora=LoraConfig(), train=TrainConfig())
    rank.held = {
        one.name: Held(Assignment(one.name, 1, "{}", ""), spec, rank.engine.add(one), "of a vocabulary") for one in jobs
    }
    return rank


def test_a_job_is_handed_over_beside_the_steps_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    went_on, reports = threading.Event(), []

    def report(what: Any) -> None:
        assert went_on.wait(30)
        reports.append(what)

    rank = rank_with_a_job_that_ends(report, monkeypatch)
    short, long = (held.live for held in rank.held.values())
    both = Orders(tuple(rank.assigned.values()))
    only_long, again = Orders(both.assignments[1:]), Orders((replace(both.assignments[0], attempt=2),))
    while not short.done:
        rank._step()
    expected = adapter_files(short.adapter, rank.engine.bank, "tiny")
    losses = probe_losses(rank.base, rank.engine.bank, short.adapter, short.job.examples)
    rank.settings.checkpoint_seconds, rank.held["long"].written_step = 0.0, long.progress.step
    rank._maybe_checkpoint()
    assert rank._upload is None  # what is done is published
    rank.settings.checkpoint_seconds = math.inf
    steps = [long.progress.step]
    while "short" in rank.held:  # the step that ended it has taken the first probe
        rank._step()
        steps.append(long.progress.step)
    for _ in range(3):
        rank._step()
        rank._let_go(both)
    assert steps == [steps[0], steps[0] + 1, steps[0] + 2] and long.progress.step == steps[0] + 5
    assert "short" not in rank.engine.live and rank.assigned.keys() == {"short", "long"}
    went_on.set()
    rank._publisher.shutdown()
    rank._let_go(both)
    assert rank.assigned.keys() == {"short", "long"} and rank._hand_overs == {}
    (told,) = reports
    assert isinstance(told, Trained) and (told.job_id, told.files) == ("short", expected)
    assert [probe["loss"] for probe in told.manifest["probes"]] == losses
    for orders in (only_long, again):  # another attempt would have to be read
        rank.handing_over = {"short": both.assignments[0]}
        rank._let_go(orders)
        assert rank.assigned.keys() == {"long"}


def test_a_hand_over_that_fails_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(_: Any) -> None:
        raise ConnectionError("no mailbox")

    rank = rank_with_a_job_that_ends(report, monkeypatch)
    while "short" in rank.held:
        rank._step()
    rank._publisher.shutdown()
    with pytest.raises(ConnectionError, match="no mailbox"):
        rank._let_go(Orders(tuple(rank.assigned.values())))
