"""What the queue holds: jobs, the sessions that run them, their states with the moves between them, and the errors.

A move that is not listed here cannot be made by any method of the queue, and a state without moves is final.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NotRequired, TypedDict

from jobs.spec import JobSpec


class JobStatus(StrEnum):
    """OpenAI's words for a fine-tuning job."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


TRANSITIONS: Mapping[JobStatus, frozenset[JobStatus]] = {
    JobStatus.VALIDATING_FILES: frozenset({JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset(
        {JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}
TERMINAL = frozenset(status for status, moves in TRANSITIONS.items() if not moves)


class RequestedAction(StrEnum):
    """What is asked of a job: to cancel or pause it by a user, to go back to the queue by the scheduler, where another
    job needs its workers more. A running one reads it between two steps; any other is moved at once."""

    CANCEL = "cancel"
    PAUSE = "pause"
    REQUEUE = "requeue"

    @property
    def status(self) -> JobStatus:
        """The state that the job is in once it is done."""
        return _REQUESTED[self]


_REQUESTED = {
    RequestedAction.CANCEL: JobStatus.CANCELLED,
    RequestedAction.PAUSE: JobStatus.PAUSED,
    RequestedAction.REQUEUE: JobStatus.QUEUED,
}


class FailureCode(StrEnum):
    """Why an attempt at a job ended without what it was for, as far as it is known."""

    OUT_OF_MEMORY = "out_of_memory"
    DIVERGED = "diverged"
    DATA = "invalid_data"
    LOST_NODE = "lost_node"
    STORAGE = "storage_unavailable"
    NOT_STARTED = "session_not_started"
    DEPENDENCY = "dependency_failed"
    TIME_LIMIT = "time_limit"
    UNKNOWN = "training_failed"

    @property
    def is_of_infrastructure(self) -> bool:
        """Whether no job can have caused it."""
        return self in (FailureCode.LOST_NODE, FailureCode.STORAGE, FailureCode.NOT_STARTED)


MAX_INFRASTRUCTURE_FAILURES = 10  # of a job that had no part in them
BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 2.0, 300.0


def backoff_seconds(failures: int) -> float:
    """Return how long a job waits for its next attempt after so many that failed: each time twice as long."""
    return min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** (failures - 1))


class SessionState(StrEnum):
    """A session is recorded as launching before anything is started, so that a restart asks Ray instead of guessing."""

    LAUNCHING = "launching"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"


SESSION_TRANSITIONS: Mapping[SessionState, frozenset[SessionState]] = {
    SessionState.LAUNCHING: frozenset({SessionState.RUNNING, SessionState.STOPPING, SessionState.ENDED}),
    SessionState.RUNNING: frozenset({SessionState.STOPPING, SessionState.ENDED}),
    SessionState.STOPPING: frozenset({SessionState.ENDED}),
    SessionState.ENDED: frozenset(),
}
ALIVE = frozenset(state for state, moves in SESSION_TRANSITIONS.items() if moves)


@dataclass(frozen=True)
class SessionKey:
    """What the jobs of one session share: one loaded base in one precision, one forward path, one number of ranks."""

    base_model: str
    precision: str
    num_workers: int
    forward_path: str | None = None


class JobMetrics(TypedDict):
    """What training has come to, as the manifest of an adapter has it too. The figures of validation are those of the
    adapter as it is, or is published; where there are no validation rows there are none. Of pairs the accuracy of
    either is how often the chosen answer has the larger reward, and the margin by how much.
    """

    step: int
    loss: float
    first_loss: float
    tokens: int
    supervised_tokens: int
    reward_accuracy: NotRequired[float]
    reward_margin: NotRequired[float]
    validation_loss_before: NotRequired[float]
    validation_loss: NotRequired[float]
    validation_accuracy: NotRequired[float]
    validation_reward_margin: NotRequired[float]
    validation_step: NotRequired[int]
    best_validation_loss: NotRequired[float]
    best_step: NotRequired[int]
    stopped: NotRequired[str]


class JobProgress(JobMetrics):
    """What can be followed while a job trains."""

    steps: int
    tokens_per_second: float
    step_seconds: float
    trainable_parameters: int
    base_parameters: int
    base_bytes: int


@dataclass(frozen=True)
class StepMetrics:
    """The figures of one optimizer step, by OpenAI's names where it has one, and when it ended (seconds since 1970).
    `event_id` is the newest event of the job's history before it.
    """

    step: int
    at: float
    figures: dict[str, float]
    event_id: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands in the history of its job: an event's is its id and 0."""
        return self.event_id, self.step

    def with_figures(self, figures: dict[str, float]) -> StepMetrics:
        """Return it with more figures."""
        return replace(self, figures=self.figures | figures)


@dataclass(frozen=True)
class JobSteps:
    """What a job has come to, and the metrics of its newest steps, oldest first."""

    job_id: str
    progress: JobProgress
    steps: tuple[StepMetrics, ...]


class JobResult(TypedDict):
    """What a job has published."""

    model: str
    version: str
    number: NotRequired[int | None]
    digest: str
    adapter_bytes: int
    metrics: JobMetrics


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of `jobs`, as it was read. Times are seconds since 1970. It may run for `time_limit` seconds, and has for
    `run_seconds` before the attempt that began at `attempt_at`. `attempt` counts how often the job was started,
    `lost_attempts` how often its session or a rank ended under it in a way that it may have caused,
    `infrastructure_failures` how often a node or the storage was lost, `failed_launches` how often no session could be
    started for it; until `not_before` it waits for its next attempt, or if that is infinity for other jobs.
    `max_colocated` is the most other jobs that it may train beside: None is any number; 0 is none, as it may be what
    ended a session. `step_tokens` are about those of one optimizer step: None is not known. `level` is that with which
    it was started last: its priority, raised by how long it had waited. `sweep_id` is the sweep that it is a trial of,
    or its own id where it is a sweep, whose trials are the jobs that train.
    """

    id: str
    tenant: str
    cluster: str
    status: JobStatus
    priority: int
    spec_json: str
    base: str
    base_model: str
    precision: str
    forward_path: str | None
    num_workers: int
    step_tokens: int | None
    level: int | None
    content_key: str
    code_version: str
    dataset_sha: str
    validation_sha: str | None
    examples_sha: str | None
    init_adapter_sha: str | None
    created_at: float
    updated_at: float
    started_at: float | None
    finished_at: float | None
    time_limit: float | None
    run_seconds: float
    attempt_at: float | None
    session_id: str | None
    attempt: int
    lost_attempts: int
    infrastructure_failures: int
    failed_launches: int
    not_before: float | None
    max_colocated: int | None
    requested: RequestedAction | None
    error: str | None
    error_code: FailureCode | None
    progress: JobProgress | None
    result: JobResult | None
    client_request: dict[str, Any] | None
    metadata: dict[str, str] | None
    idempotency_key: str | None
    sweep_id: str | None

    @property
    def is_sweep(self) -> bool:
        """Whether it is many jobs, its trials, and trains by these alone."""
        return self.sweep_id == self.id

    @property
    def session_key(self) -> SessionKey:
        """The sessions that it may train in have this key."""
        return SessionKey(self.base_model, self.precision, self.num_workers, self.forward_path)

    def seconds_run(self, at: float) -> float:
        """Return for how long it has been running until then, in all its attempts."""
        began = self.attempt_at if self.status is JobStatus.RUNNING else None
        return self.run_seconds + (0.0 if began is None else at - began)

    def is_late(self, at: float) -> bool:
        """Return whether it has been running for longer than it may."""
        return self.time_limit is not None and self.seconds_run(at) > self.time_limit

    @property
    def adapter(self) -> str:
        """The name that it publishes under."""
        return str(json.loads(self.spec_json)["adapter"])

    @property
    def spec(self) -> JobSpec:
        """Parsed when asked for, so that a row of an older version can still be listed."""
        return JobSpec.model_validate_json(self.spec_json)


@dataclass(frozen=True, kw_only=True)
class ClientRequest:
    """What a client of the API sent: `document` is kept to answer with, `metadata` to find jobs by. The same
    `idempotency_key` is the same job; without one, the same content in a request of the same `digest` within `window`
    seconds.
    """

    document: dict[str, Any]
    digest: str
    metadata: dict[str, str] | None
    idempotency_key: str | None
    window: float


@dataclass(frozen=True, kw_only=True)
class Session:
    """One row of `sessions`. Writes of a driver that carry another `fence` than the row change nothing. Once its ranks
    have loaded the base, `resolved_precision` is what `auto` turned out to be, and `facts` say why it is that one, how
    exact training is there, and on which devices it runs. `tokens_per_second` is how fast all its jobs together train,
    by its last steps. `requested` is what it was asked to do: "stop"."""

    id: str
    cluster: str
    base_model: str
    precision: str
    forward_path: str | None
    num_workers: int
    state: SessionState
    attempt: int
    fence: int
    resolved_precision: str | None
    facts: dict[str, Any] | None
    tokens_per_second: float | None
    lease_until: float | None
    requested: str | None
    reason: str | None
    created_at: float
    updated_at: float

    @property
    def session_key(self) -> SessionKey:
        """What it was launched for."""
        return SessionKey(self.base_model, self.precision, self.num_workers, self.forward_path)

    @property
    def launching(self) -> bool:
        """Whether its driver is not up yet."""
        return self.state is SessionState.LAUNCHING

    @property
    def leaving(self) -> bool:
        """Whether it is stopping, or was asked to: it takes no job."""
        return self.state is SessionState.STOPPING or self.requested is not None

    @property
    def session_keys(self) -> tuple[SessionKey, ...]:
        """Those of the jobs that it takes: also with the precision that `auto` turned out to be."""
        key = self.session_key
        return (key,) if self.resolved_precision is None else (key, replace(key, precision=self.resolved_precision))

    @property
    def ray_submission_id(self) -> str:
        """The same for everyone who knows the row: whoever finds it launching asks Ray whether this id exists."""
        return f"{self.id}-a{self.attempt}"


def lease_name(cluster: str) -> str:
    """Return the lease row of a cluster's scheduler."""
    return f"scheduler:{cluster}"


@dataclass(frozen=True)
class Lease:
    """Proof that `holder` has the lease `name`. The token grows with every holder: an older one writes nothing."""

    name: str
    holder: str
    token: int


@dataclass(frozen=True)
class LeaseInfo:
    """What anyone may know of a lease; `valid` until it runs out or is given back."""

    holder: str
    token: int
    valid: bool


class EventKind(StrEnum):
    """What an event is, where more than people read it: `WAITS` says why a job waits, `EVALUATION` has the figures of
    its validation rows after a step, and `CHECKPOINT` names a model of what the adapter was after one.
    """

    NOTE = "note"
    WAITS = "waits"
    EVALUATION = "evaluation"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class QueueEvent:
    """One line of the history of a job or session, whose id is `subject`."""

    id: int
    subject: str
    at: float
    level: str
    kind: EventKind
    message: str
    data: dict[str, Any] | None

    @property
    def place(self) -> tuple[int, int]:
        """Where it stands in the history of its subject, beside `StepMetrics`."""
        return self.id, 0
