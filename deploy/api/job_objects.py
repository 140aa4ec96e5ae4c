"""Fine-tuning jobs, their events and figures, as OpenAI's client reads them."""

from __future__ import annotations

import csv
import io
import math
import re
import time
from collections.abc import Sequence
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from deploy.api.job_requests import LEARNING_RATES
from jobs.job import TERMINAL, FailureCode, Job, JobStatus, QueueEvent, StepMetrics
from jobs.sweep import Sweep
from jobs.trials import Trial
from lora_core.config import DPO_BETA, TrainConfig
from lora_core.data.json_values import finite

EVENT, CHECKPOINT, RESULT = "ftevent-", "ftckpt-", "result-"
"""How the ids of events, of checkpoints and of result files begin."""

_REWARDS = ("train_reward_accuracy", "train_reward_margin", "valid_reward_accuracy", "valid_reward_margin")
_LEVELS: dict[str, Literal["warn", "error"]] = {"warning": "warn", "error": "error"}


class UsedHyperparameters(TypedDict):
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class UsedSupervised(TypedDict):
    hyperparameters: UsedHyperparameters


class UsedDpoHyperparameters(UsedHyperparameters):
    beta: float


class UsedDpo(TypedDict):
    hyperparameters: UsedDpoHyperparameters


class UsedMethod(TypedDict):
    type: Literal["supervised", "dpo"]
    supervised: NotRequired[UsedSupervised]
    dpo: NotRequired[UsedDpo]


class JobFailure(TypedDict):
    code: str
    message: str
    param: str | None


class SweepTrial(TypedDict):
    """One job of a sweep: its `values`, how far it is, and how it stands among the others."""

    id: str
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    values: dict[str, Any]
    step: int
    steps: int
    valid_loss: float | None
    rung: int
    standing: str


class SweepObject(TypedDict):
    options: dict[str, Any]
    trials: list[SweepTrial]


class FineTuningJob(TypedDict):
    """OpenAI's FineTuningJob, whose `validation_file` may be the fraction of rows that is validated on. What comes from
    `step` on is more than that has: how far it is, what it is asked to do, and a job's own options.
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
    tokens_per_second: float | None
    requested: Literal["cancel", "pause", "requeue"] | None
    lora: dict[str, Any]
    train: dict[str, Any]
    precision: str
    num_workers: int
    priority: int
    time_limit: float | None
    depends_on: list[str]
    sweep: SweepObject | None


class JobEvent(TypedDict):
    """OpenAI's FineTuningJobEvent; of the kind `waits` is why a job is not training."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    kind: Literal["note", "waits", "metrics", "evaluation", "checkpoint"]
    data: dict[str, Any] | None


class JobLogLine(TypedDict):
    created_at: float
    level: str
    message: str


class JobLogList(TypedDict):
    object: Literal["list"]
    data: list[JobLogLine]


class CheckpointMetrics(TypedDict):
    step: int
    train_loss: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: NotRequired[float | None]
    valid_reward_accuracy: NotRequired[float | None]
    valid_reward_margin: NotRequired[float | None]


class JobCheckpoint(TypedDict):
    """OpenAI's FineTuningJobCheckpoint: a model, until it is as old as old versions may be."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: CheckpointMetrics


class EstimatedMemory(TypedDict):
    device: str
    bytes: int
    least_bytes: int


class EstimatedQueue(TypedDict):
    before: int


class EstimatedSweep(TypedDict):
    """How many trials there are and go on from each rung, and the tokens of all epochs of all of them."""

    trials: int
    left: list[int]
    grid_tokens: int


class JobEstimate(TypedDict):
    """What a job would come to: `tokens` of all epochs, or the most of a sweep, bytes on a rank, how many jobs stand
    before it, and how many `seconds` it takes, by itself, at the pace that was measured for its kind last (null: none
    was, on this cluster).
    """

    object: Literal["fine_tuning.job.estimate"]
    model: str
    examples: int
    tokens: int
    supervised_tokens: int
    tokens_per_epoch: int
    supervised_tokens_per_epoch: int
    steps: int
    seconds: float | None
    tokens_per_second: float | None
    memory: EstimatedMemory
    queue: EstimatedQueue
    sweep: EstimatedSweep | None
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


def job_object(job: Job, trials: Sequence[Trial] = ()) -> FineTuningJob:
    spec, sent, progress = job.spec, job.client_request or {}, job.progress
    hyperparameters: UsedHyperparameters = {
        "n_epochs": spec.train.epochs,
        "batch_size": spec.train.batch_size,
        "learning_rate_multiplier": spec.train.learning_rate / LEARNING_RATES[spec.train.method],
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
        "method": _method(spec.train, hyperparameters),
        "hyperparameters": hyperparameters,
        "seed": spec.train.seed,
        "metadata": job.metadata,
        "integrations": [],
        "result_files": [f"{RESULT}{job.id}"] if job.status in TERMINAL and progress else [],
        "fine_tuned_model": fine_tuned_model(job),
        "trained_tokens": job.result["metrics"]["tokens"] if succeeded and job.result else None,
        "estimated_finish": estimated_finish(job),
        "error": _failure(job),
        "step": progress["step"] if progress else None,
        "steps": progress["steps"] if progress else None,
        "loss": finite(progress["loss"]) if progress else None,
        "suffix": spec.adapter,
        "tokens_per_second": finite(progress["tokens_per_second"]) if progress else None,
        "requested": None if job.requested is None else job.requested.value,
        "lora": spec.lora.model_dump(mode="json"),
        "train": spec.train.model_dump(mode="json"),
        "precision": spec.precision,
        "num_workers": spec.num_workers,
        "priority": spec.priority,
        "time_limit": job.time_limit,
        "depends_on": spec.depends_on,
        "sweep": _sweep(spec.sweep, trials),
    }


def _sweep(sweep: Sweep | None, trials: Sequence[Trial]) -> SweepObject | None:
    if sweep is None:
        return None
    of_trials: list[SweepTrial] = [
        {
            "id": trial.job_id,
            "status": trial.status.value,
            "values": trial.parameters,
            "step": trial.progress["step"] if trial.progress else 0,
            "steps": trial.steps,
            "valid_loss": finite(trial.validation_loss),
            "rung": trial.reached,
            "standing": trial.standing,
        }
        for trial in trials
    ]
    return {"options": sweep.model_dump(mode="json", exclude_none=True), "trials": of_trials}


def _failure(job: Job) -> JobFailure | None:
    if job.error is None:
        return None
    return {"code": job.error_code or FailureCode.UNKNOWN, "message": job.error, "param": None}


def _method(train: TrainConfig, hyperparameters: UsedHyperparameters) -> UsedMethod:
    if train.method == "supervised":
        return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
    return {"type": "dpo", "dpo": {"hyperparameters": {**hyperparameters, "beta": train.beta or DPO_BETA}}}


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


def event_object(event: QueueEvent | StepMetrics) -> JobEvent:
    """Return a line of a job's history, or the metrics of one of its steps."""
    level: Literal["info", "warn", "error"] = "info"
    data: dict[str, Any] | None
    if isinstance(event, QueueEvent):
        level, message, data = _LEVELS.get(event.level, "info"), event.message, event.data
    else:
        data = {"step": event.step, **event.figures}
        message = f"Step {event.step}: training loss={event.figures.get('train_loss', math.nan):.4f}"
    return {
        "id": EVENT + "-".join(str(part) for part in event.place if part),
        "object": "fine_tuning.job.event",
        "created_at": int(event.at),
        "level": level,
        "message": message,
        "type": "message" if isinstance(event, QueueEvent) else "metrics",
        "kind": event.kind.value if isinstance(event, QueueEvent) else "metrics",
        "data": finite(data),
    }


def event_place(event_id: str) -> tuple[int, int] | None:
    """Return where an event stands in a job's history: the inverse of its id, or None where it is no event's."""
    match = re.fullmatch(rf"{EVENT}(\d{{1,15}})(?:-(\d{{1,9}}))?", event_id, re.ASCII)
    return None if match is None else (int(match[1]), int(match[2] or 0))


def checkpoint_object(event: QueueEvent) -> JobCheckpoint:
    data = event.data or {}
    metrics = finite(data["metrics"])
    figures: CheckpointMetrics = {
        "step": metrics["step"],
        "train_loss": metrics["loss"],
        "valid_loss": metrics.get("validation_loss"),
    }
    if "reward_margin" in metrics:
        figures["valid_reward_accuracy"] = metrics.get("validation_accuracy")
        figures["valid_reward_margin"] = metrics.get("validation_reward_margin")
    else:
        figures["valid_mean_token_accuracy"] = metrics.get("validation_accuracy")
    return {
        "id": f"{CHECKPOINT}{event.id}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(event.at),
        "fine_tuning_job_id": event.subject,
        "fine_tuned_model_checkpoint": data["model"],
        "step_number": metrics["step"],
        "metrics": figures,
    }


def result_csv(steps: Sequence[StepMetrics]) -> bytes:
    """Write the metrics of steps, one a line."""
    given = {name for one in steps for name in one.figures}
    accuracy = [name for name in _REWARDS if name in given] or ["valid_mean_token_accuracy"]
    columns = ["step", "train_loss", "valid_loss", *accuracy, "learning_rate", "grad_norm", "tokens_per_second",
               "memory_bytes"]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({"step": one.step, **one.figures} for one in steps)
    return text.getvalue().encode()
