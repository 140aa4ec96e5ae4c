"""The mailbox between a session's driver and its ranks, without Ray: it is a plain class."""

from __future__ import annotations

import pytest

from jobs.session.messages import (
    Assignment,
    DesiredJobs,
    JobFailed,
    Mailbox,
    NoRoom,
    Progressed,
    RankBroke,
    Report,
    Trained,
)

FIRST, SECOND = Assignment("a", 1, "{}", "sha1"), Assignment("b", 1, "{}", "sha2")


def wanted(mailbox: Mailbox) -> list[str]:
    return [assignment.job_id for assignment in mailbox.desired(()).assignments]


def test_each_side_sees_what_the_other_said_last() -> None:
    mailbox = Mailbox()
    assert mailbox.exchange(DesiredJobs((FIRST,))) == (frozenset(), [])
    assert mailbox.desired(("x",)) == DesiredJobs((FIRST,))
    report = Progressed("a", {"step": 1})
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
