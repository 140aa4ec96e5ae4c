"""What one rank does by itself; the ranks together are tested in `test_service.py`."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.storage import StorageCorrupt, StorageUnavailable
from jobs import job_reader
from jobs.job_reader import JobReader
from jobs.orders import Assignment, JobFailed, NoRoom
from jobs.training_loop import Held, Rank
from lora_core.memory import DoesNotFitError, NoRoomBesideError
from lora_core.trainer import TrainEngine
from tests.models import job, tiny_base

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
            work.set_result((None, engine.prepare(job(name))))
        else:
            work.set_exception(error)
        return work

    for name, of_ranks in answers.items():
        engine = TrainEngine(tiny_base("llama"))
        rank: Rank = object.__new__(Rank)
        rank.rank, rank.engine = 0, engine
        rank.held = {"a": Held(Assignment("a", 1, "{}", ""), None, engine.add(job("a")))}  # type: ignore[arg-type]
        said: list[str | None] = []
        rank._gather = lambda answer, said=said: said.append(answer) or [*said]  # type: ignore[method-assign, misc]
        rank.mailbox = SimpleNamespace(report=SimpleNamespace(remote=reports.append))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("jobs.training_loop.ray.get", lambda reference: reference)
            rank.rank = 1
            rank._join(Assignment(name, 1, "{}", ""), read(of_ranks[1]))  # the other rank answers first
            rank.rank = 0
            rank._join(Assignment(name, 1, "{}", ""), read(of_ranks[0]))
        assert list(engine.live) == ["a"]
    assert reports == [NoRoom("waits", 1), JobFailed("fails", "rank 1: DoesNotFitError: not at all")]


def test_checkpoints_are_written_one_at_a_time_and_none_waits_for_ever() -> None:
    engine, went_on, written = TrainEngine(tiny_base("llama")), threading.Event(), []
    rank: Rank = object.__new__(Rank)
    rank.rank, rank.settings, rank._upload = 0, SimpleNamespace(checkpoint_seconds=0.0), None  # type: ignore[assignment]
    rank.held = {name: Held(Assignment(name, 1, "{}", ""), None, engine.add(job(name))) for name in "abc"}  # type: ignore[arg-type]

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
