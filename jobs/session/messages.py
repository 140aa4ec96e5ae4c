"""What the driver of a session and its ranks say to each other: a small actor between them.

The driver posts what should run (`DesiredJobs`) and takes `Report`s; rank 0 does the opposite. What is desired is a
state, not a stream: ranks say which jobs they have and read which they should have, so a worker group that was
restarted needs no history.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import ray

from jobs.job import FailureCode, JobProgress, JobSteps


@dataclass(frozen=True)
class Assignment:
    """One job to train: its spec as JSON, the sha256 of what its rows became, the digest of the adapter to start from,
    the committed checkpoint to continue from, and of a trial the step after which it comes to a rung (None: its end).

    `attempt` counts how often the job was started; it is part of its checkpoints' names.
    """

    job_id: str
    attempt: int
    spec: str
    examples_sha: str | None = None
    init_adapter_sha: str | None = None
    checkpoint_key: str | None = None
    checkpoint_sha256: str | None = None
    until_step: int | None = None


@dataclass(frozen=True)
class DesiredJobs:
    """The jobs that the ranks should train now; `stop` ends the training run. Those in `pausing` leave, and what they
    have come to is written first.
    """

    assignments: tuple[Assignment, ...] = ()
    stop: bool = False
    pausing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Base of what ranks report. `job_id` names the job it is about."""

    job_id: str


@dataclass(frozen=True)
class Expected(Report):
    """How long a job that has just joined will about take, if it trains by itself."""

    seconds: float


@dataclass(frozen=True)
class Evaluated(Report):
    """An evaluation (`lora_core.training.optimizer.Evaluation`), and why training ends with it, if it does."""

    evaluation: dict[str, Any]
    stopped: str | None


@dataclass(frozen=True)
class CheckpointWritten(Report):
    """A checkpoint is in storage and waits for its commit marker."""

    step: int
    key: str
    sha256: str


@dataclass(frozen=True)
class AdapterKept(Report):
    """What an adapter is after one of its epochs, as `Trained` has the last: a version that can be asked, too."""

    files: dict[str, bytes]
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Trained(Report):
    """A finished adapter: its files and what the manifest says of it."""

    files: dict[str, bytes]
    manifest: dict[str, Any]
    progress: JobProgress


@dataclass(frozen=True)
class RungReached(Report):
    """A trial has come to its rung with this validation loss, and what it is there is written."""

    step: int
    loss: float


@dataclass(frozen=True)
class JobFailed(Report):
    """A job cannot go on, for a reason of its own; its session can. `traceback` is where that was raised, if it was."""

    reason: str
    traceback: str | None = None
    code: FailureCode = FailureCode.UNKNOWN


@dataclass(frozen=True)
class NoRoom(Report):
    """A job does not fit into memory beside the `others` that train, though it would by itself."""

    others: int


@dataclass(frozen=True)
class RankBroke:
    """A rank's training code raised; the worker group will be restarted. The jobs that it trained are suspects."""

    rank: int
    reason: str
    active: tuple[str, ...]
    traceback: str | None = None
    code: FailureCode = FailureCode.UNKNOWN


@dataclass(frozen=True)
class RanksStarted:
    """The ranks are up, with nothing in memory: at the start of a session, and after one of them died. What they
    compute in, why it is that, by which path (`lora_core.models.forward`), how exact training is, and on which devices.
    """

    precision: str
    why: str
    forward_path: str
    exactness: str
    places: tuple[str, ...]


@dataclass(frozen=True)
class StepsDone:
    """The numbers a user follows: what jobs have come to, with the metrics of their newest steps; and how many tokens
    all jobs together train on in a second of computing, by the last minutes (None: not known yet).
    """

    jobs: tuple[JobSteps, ...]
    tokens_per_second: float | None


Message = Report | StepsDone | RankBroke | RanksStarted

_ENDS = (Trained, RungReached, JobFailed, NoRoom)


class Mailbox:
    """Lives with the driver, survives restarts of the worker group."""

    def __init__(self) -> None:
        self._desired = DesiredJobs()
        self._active: frozenset[str] = frozenset()
        self._over: set[tuple[str, int]] = set()  # jobs and their attempts
        self._reports: list[Message] = []
        self._end = threading.Event()

    def desired(self, active: tuple[str, ...]) -> DesiredJobs:
        """Rank 0 asks: these jobs I have; what should I have?

        Not what is over: until the driver has taken the report of an end, it still desires the job, and ranks that
        believed it would train it once more.
        """
        if self._active - frozenset(active):
            self._end.set()
        self._active = frozenset(active)
        wanted = tuple(job for job in self._desired.assignments if (job.job_id, job.attempt) not in self._over)
        return replace(self._desired, assignments=wanted)

    def report(self, report: Message) -> None:
        """Any rank reports: this happened."""
        if isinstance(report, _ENDS):
            self._over |= {
                (job.job_id, job.attempt) for job in self._desired.assignments if job.job_id == report.job_id
            }
        self._reports.append(report)
        if isinstance(report, _ENDS):
            self._end.set()

    def wait_for_end(self, seconds: float) -> None:
        """Return once a report says that a job is over, or the ranks have let one go, at the latest after so long:
        somebody waits for it.
        """
        self._end.wait(seconds)
        self._end.clear()

    def exchange(self, desired: DesiredJobs) -> tuple[frozenset[str], list[Message]]:
        """Post what the driver desires, and take what was reported since the last time and which jobs are active."""
        reports, self._reports = self._reports, []
        self._desired = desired
        return self._active, reports


def start_mailbox() -> Any:
    """Return a handle of a mailbox that ends with this process."""
    return ray.remote(Mailbox).options(num_cpus=0, max_concurrency=8).remote()


class RanksMailbox:
    """The ranks' side of a mailbox, given its handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._asked: ray.ObjectRef[DesiredJobs] | None = None

    def desired(self, active: tuple[str, ...], *, wait: bool) -> DesiredJobs | None:
        """See `Mailbox.desired`; None where the answer is not there yet and nobody wants to wait: ask again for it."""
        if self._asked is None:
            self._asked = self._handle.desired.remote(active)
        answered, _ = ray.wait([self._asked], timeout=None if wait else 0)
        if not answered:
            return None
        desired: DesiredJobs = ray.get(self._asked)
        self._asked = None
        return desired

    def send(self, report: Report | RanksStarted) -> None:
        """Report without waiting until it is there."""
        self._handle.report.remote(report)

    def deliver(self, report: Report | StepsDone | RankBroke) -> None:
        """Report, and return when it is there."""
        ray.get(self._handle.report.remote(report))
