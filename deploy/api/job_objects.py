"""Fine-tuning jobs, their events and figures, as OpenAI's client reads them."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Sequence
from typing import Any, Literal

from typing_extensions import TypedDict

from deploy.api.job_requests import LEARNING_RATE
from jobs.job import TERMINAL, EventKind, Job, JobStatus, QueueEvent

EVENT, RESULT = "ftevent-", "result-"  # how the ids of events and of result files begin
_LEVELS: dict[str, Literal["warn", "error"]] = {"warning": "warn", "error": "error"}


class UsedHyperparameters(TypedDict):
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class UsedSupervised(TypedDict):
    hyperparameters: UsedHyperparameters


class UsedMethod(TypedDict):
    type: Literal["supervised"]
    supervised: UsedSupervised


class JobFailure(TypedDict):
    code: str
    message: str
    param: str | None


class FineTuningJob(TypedDict):
    """OpenAI's FineTuningJob; `step`, `steps`, `loss` and `suffix` are more than that has, and `validation_file` may
    be the fraction of rows that is validated on.
    """

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    model: str
    organization_id: str
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    training_file: str
    validation_file: str | float | None
    method: UsedMethod
    hyperparameters: UsedHyperparameters
    seed: int
    metadata: dict[str, str] | None
    integrations: list[dict[str, Any]]
    result_files: list[str]
    fine_tuned_model: str | None
    trained_tokens: int | None
    estimated_finish: int | None
    error: JobFailure | None
    step: int | None
    steps: int | None
    loss: float | None
    suffix: str


class JobEvent(TypedDict):
    """OpenAI's FineTuningJobEvent."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class EstimatedMemory(TypedDict):
    device: str
    bytes: int
    least_bytes: int


class EstimatedQueue(TypedDict):
    before: int


class JobEstimate(TypedDict):
    """What a job would come to: `tokens` of all epochs, bytes on a rank, and how many jobs stand before it."""

    object: Literal["fine_tuning.job.estimate"]
    model: str
    examples: int
    tokens: int
    tokens_per_epoch: int
    supervised_tokens_per_epoch: int
    steps: int
    memory: EstimatedMemory
    queue: EstimatedQueue
    summary: list[str]


class ResultFile(TypedDict):
    """OpenAI's File, of a job's figures."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune-results"]
    status: Literal["processed"]


def job_object(job: Job) -> FineTuningJob:
    spec, sent, progress = job.spec, job.client_request or {}, job.progress
    hyperparameters: UsedHyperparameters = {
        "n_epochs": spec.train.epochs,
        "batch_size": spec.train.batch_size,
        "learning_rate_multiplier": spec.train.learning_rate / LEARNING_RATE,
    }
    succeeded = job.status is JobStatus.SUCCEEDED and job.result is not None
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": None if job.finished_at is None else int(job.finished_at),
        "model": spec.init_adapter or job.base,
        "organization_id": job.tenant,
        "status": job.status.value,
        "training_file": sent.get("training_file") or spec.dataset,
        "validation_file": sent.get("validation_file") or spec.validation,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "hyperparameters": hyperparameters,
        "seed": spec.train.seed,
        "metadata": job.metadata,
        "integrations": [],
        "result_files": [f"{RESULT}{job.id}"] if job.status in TERMINAL and progress else [],
        "fine_tuned_model": fine_tuned_model(job),
        "trained_tokens": job.result["metrics"]["tokens"] if succeeded and job.result else None,
        "estimated_finish": estimated_finish(job),
        "error": None if job.error is None else {"code": "training_failed", "message": job.error, "param": None},
        "step": progress["step"] if progress else None,
        "steps": progress["steps"] if progress else None,
        "loss": finite(progress["loss"]) if progress else None,
        "suffix": spec.adapter,
    }


def finite(value: Any) -> Any:
    """Return figures as JSON can hold them: null in the place of what is no finite number, as of training that
    diverged.
    """
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fine_tuned_model(job: Job) -> str | None:
    """Return what a job has published: the name of just that version."""
    if job.status is not JobStatus.SUCCEEDED or job.result is None:
        return None
    return f"{job.result['model']}@{job.result.get('number') or job.result['version']}"


def estimated_finish(job: Job) -> int | None:
    """Return when a running job ends if it goes on at the pace up to now."""
    progress = job.progress
    if job.status is not JobStatus.RUNNING or progress is None or not progress["step"] * progress["tokens_per_second"]:
        return None
    left = (progress["steps"] - progress["step"]) * progress["tokens"] / progress["step"]
    return int(time.time() + left / progress["tokens_per_second"])


def event_object(event: QueueEvent) -> JobEvent:
    figures = event_figures(event)
    return {
        "id": f"{EVENT}{event.id}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.at),
        "level": _LEVELS.get(event.level, "info"),
        "message": event.message,
        "type": "metrics" if figures else "message",
        "data": finite(figures or event.data),
    }


def event_figures(event: QueueEvent) -> dict[str, Any] | None:
    """Return the figures of a step by OpenAI's names, where the event has some."""
    data = event.data or {}
    if event.kind is EventKind.METRICS:
        return dict(data)
    if event.kind is EventKind.EVALUATION:
        return {"step": data["step"], "valid_loss": data["loss"], "valid_mean_token_accuracy": data["accuracy"]}
    return None


def result_csv(events: Sequence[QueueEvent]) -> bytes:
    """Write the figures that a job's history has, a step a line."""
    steps: dict[int, dict[str, Any]] = {}
    for figures in filter(None, map(event_figures, events)):
        steps.setdefault(figures["step"], {}).update(figures)
    columns = ["step", "train_loss", "valid_loss", "valid_mean_token_accuracy", "tokens_per_second"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(steps[step] for step in sorted(steps))
    return text.getvalue().encode()
