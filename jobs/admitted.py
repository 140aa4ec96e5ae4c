"""What checking a job has found: all that the queue records of it, without the libraries that found it."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.storage.base import Storage
from cluster.storage.keys import job_spec_key
from jobs.job import Job
from jobs.trials import NewTrial


@dataclass(frozen=True)
class Rows:
    """What the rows to train on come to: `tokens` of one epoch, optimizer `steps` of all, and the tokens of one step,
    on average.
    """

    examples: int
    tokens: int
    supervised_tokens: int
    longest: int
    steps: int
    step_tokens: int


@dataclass(frozen=True)
class Admitted:
    """A job that may be queued: the sha256 of its rows, of what they became, and of the adapter that it starts from,
    which are in storage now; the path through the base that it takes; what the rows come to, and that for people; and
    of a sweep its trials, all on these rows.
    """

    storage: Storage
    dataset_sha: str
    validation_sha: str | None
    examples_sha: str
    init_adapter_sha: str | None
    forward_path: str
    rows: Rows
    summary: list[str]
    trials: tuple[NewTrial, ...] = ()

    def record(self, job: Job) -> None:
        """Write the write-once second record of a submission, from which a lost database is rebuilt."""
        self.storage.put(job_spec_key(job.id), job.spec_json.encode(), if_absent=True)
