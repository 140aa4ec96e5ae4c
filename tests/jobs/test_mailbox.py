"""The mailbox between a session's driver and its ranks, without Ray: it is a plain class."""

from __future__ import annotations

import threading
import time

import pytest

from jobs.session.messages import (
    Assignment,
    DesiredJobs,
    JobFailed,
    Mailbox,
    NoRoom,
    RankBroke,
    Report,
    StepsDone,
    Trained,
)
from jobs.session.report import probe_of
from lora_core.data.dataset import Example

FIRST, SECOND = Assignment("a", 1, "{}", "sha1"), Assignment("b", 1, "{}", "sha2")


def wanted(mailbox: Mailbox) -> list[str]:
    return [assignment.job_id for assignment in mailbox.desired(()).assignments]


def test_each_side_sees_what_the_other_said_last() -> None:
    mailbox = Mailbox()
    assert mailbox.exchange(DesiredJobs((FIRST,))) == (frozenset(), [])
    assert mailbox.desired(("x",)) == DesiredJobs((FIRST,))
    report = StepsDone((), 1.0)
    mailbox.report(report)
    assert mailbox.exchange(DesiredJobs((FIRST, SECOND), stop=True)) == (frozenset({"x"}), [report])
    assert mailbox.exchange(DesiredJobs()) == (frozenset({"x"}), [])


@pytest.mark.parametrize("end", [Trained("a", {}, {}, {}), JobFailed("a", "why"), NoRoom("a", 2)])
def test_what_is_over_is_not_ordered_again_before_the_driver_knows(end: Report) -> None:
    mailbox = Mailbox()
    mailbox.exchange(DesiredJobs((FIRST, SECOND)))
    mailbox.report(end)
    assert wanted(mailbox) == ["b"]
    mailbox.exchange(DesiredJobs((FIRST, SECOND)))  # posted before the driver has read that report
    assert wanted(mailbox) == ["b"]


def test_the_next_attempt_of_a_job_is_ordered() -> None:
    mailbox = Mailbox()
    mailbox.exchange(DesiredJobs((FIRST,)))
    mailbox.report(JobFailed("a", "why"))
    mailbox.exchange(DesiredJobs((Assignment("a", 2, "{}", "sha1"),)))
    assert wanted(mailbox) == ["a"]


def test_a_broken_rank_does_not_end_its_jobs() -> None:
    mailbox = Mailbox()
    mailbox.exchange(DesiredJobs((FIRST,)))
    mailbox.report(RankBroke(1, "why", ("a",)))
    assert wanted(mailbox) == ["a"]


def test_the_end_of_a_job_is_not_waited_for() -> None:
    mailbox = Mailbox()
    threading.Timer(0.02, mailbox.report, [StepsDone((), 1.0)]).start()
    threading.Timer(0.2, mailbox.report, [Trained("a", {}, {}, {})]).start()
    began = time.monotonic()
    mailbox.wait_for_end(10.0)
    assert 0.15 < time.monotonic() - began < 5
    _, reports = mailbox.exchange(DesiredJobs())
    assert isinstance(reports[-1], Trained)
    mailbox.wait_for_end(0.0)  # told once
    mailbox.desired(("a", "b"))
    threading.Timer(0.02, mailbox.desired, [("b",)]).start()  # the ranks have let one go
    began = time.monotonic()
    mailbox.wait_for_end(10.0)
    assert time.monotonic() - began < 5


def test_a_probe_is_the_beginning_of_an_answer_and_the_end_of_its_question() -> None:
    example = Example(list(range(100)), [False] * 40 + [True] * 60)
    assert probe_of(example) == Example(list(range(24, 56)), [False] * 16 + [True] * 16)
    text = Example(list(range(5)), [False] + [True] * 4)
    assert probe_of(text) == text
