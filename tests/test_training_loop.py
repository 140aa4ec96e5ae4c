"""What one rank does by itself; the ranks together are tested in `test_service.py`."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.storage import StorageCorrupt, StorageUnavailable
from jobs import training_loop
from jobs.orders import Assignment
from jobs.training_loop import Rank

ASSIGNMENT = Assignment("job-1", 2, "{}", "datasets/x", checkpoint_key="checkpoints/1-500")


def rank_whose_storage_answers(answers: list[Any], monkeypatch: pytest.MonkeyPatch) -> Rank:
    """Each read takes the next answer."""
    rank: Rank = object.__new__(Rank)
    rank.rank, rank._preparing = 0, {ASSIGNMENT.job_id: (ASSIGNMENT, None)}  # type: ignore[dict-item]

    def read(_: Assignment) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(rank, "_read_now", read)
    monkeypatch.setattr(training_loop, "STORAGE_PAUSE", 0.0)
    return rank


def test_a_job_with_a_checkpoint_outlives_a_storage_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [StorageUnavailable("503"), StorageUnavailable("503"), "read"]
    assert rank_whose_storage_answers(answers, monkeypatch)._read(ASSIGNMENT) == "read"


def test_what_waiting_does_not_mend_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = rank_whose_storage_answers([StorageCorrupt("other bytes"), "read"], monkeypatch)
    with pytest.raises(StorageCorrupt):
        rank._read(ASSIGNMENT)


def test_nobody_waits_for_ever_nor_for_a_job_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    away: list[Any] = [StorageUnavailable("503")] * 3
    rank = rank_whose_storage_answers([*away, "read"], monkeypatch)
    rank._preparing = {}
    with pytest.raises(StorageUnavailable):
        rank._read(ASSIGNMENT)
    rank = rank_whose_storage_answers([*away, "read"], monkeypatch)
    monkeypatch.setattr(training_loop, "STORAGE_PATIENCE", 0.0)
    with pytest.raises(StorageUnavailable):
        rank._read(ASSIGNMENT)
