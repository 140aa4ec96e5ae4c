"""What a person wants to know of a job, in lines: how far it is, what came of it, and what was asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from cluster.settings import Settings
from jobs.duration import duration_text
from jobs.job import TERMINAL, EventKind, Job, JobMetrics, JobProgress, JobStatus, QueueEvent, Session, StepMetrics
from jobs.spec import JobSpec
from jobs.sweep import parameters_text
from jobs.trials import Trial
from lora_core.data.json_values import finite

_TOLD_APART = {"base_model", "dataset", "adapter", "lora", "train", "metadata", "depends_on", "time_limit", "sweep"}
_INTERNAL = {"spec_json", "content_key", "code_version", "client_request", "idempotency_key", "forward_path"}


def progress_text(progress: JobProgress) -> str:
    """Write `step 35/76  loss 0.0312  512 tokens/s  0:42 left`"""
    step, steps = progress["step"], progress["steps"]
    margin = f"  margin {progress['reward_margin']:.4f}" if "reward_margin" in progress else ""
    validation = f"  validation {progress['validation_loss']:.4f}" if "validation_loss" in progress else ""
    return (
        f"step {step}/{steps}  loss {progress['loss']:.4f}{margin}{validation}"
        f"  {progress['tokens_per_second']:.0f} tokens/s  {_left(progress)} left"
    )


def accuracy_line(accuracy: float, margin: float | None) -> str:
    """Say how good validation is: of tokens, or of pairs, which have a margin."""
    if margin is None:
        return f"token accuracy {accuracy:.1%}"
    return f"reward accuracy {accuracy:.1%}, reward margin {margin:.4f}"


def job_document(
    job: Job,
    session: Session | None = None,
    events: Sequence[QueueEvent] = (),
    steps: Sequence[StepMetrics] = (),
    trials: Sequence[Trial] = (),
) -> dict[str, Any]:
    """Return a job as JSON can hold it, without what only the queue needs; perhaps with its session, its history, the
    metrics of its steps, and the trials of a sweep.
    """
    row = {name: value for name, value in vars(job).items() if name not in _INTERNAL}
    row |= {"model": f"{job.base}:{job.adapter}", "spec": json.loads(job.spec_json)}
    row |= {"session": vars(session)} if session else {}
    row |= {"events": [vars(event) for event in events]} if events else {}
    row |= {"steps": [{"step": one.step, "at": one.at, **one.figures} for one in steps]} if steps else {}
    row |= {"trials": [vars(trial) | {"standing": trial.standing} for trial in trials]} if trials else {}
    document: dict[str, Any] = finite(row)
    return document


def report(
    job: Job, session: Session | None, events: Sequence[QueueEvent], settings: Settings, curve: str = ""
) -> Iterator[str]:
    """Describe a job with its session, if it has one, its history, and the `curve` of its loss; `settings` are those of
    whoever asks.
    """
    model = f"{job.base}:{job.spec.adapter}"
    moved = [event.at for event in events if (event.data or {}).get("to") == job.status]
    since = moved[-1] if moved else job.created_at
    lines = {
        "why": _why(job, events, since),
        "failure": job.error_code,
        "retries": _retries(job),
        "progress": _progress(job),
        "loss": curve,
        "result": _result(job),
        "published": f"{model} version {job.result['version']}" if job.result else None,
        "chat": _chat(job, model, settings) if job.result else None,
        "session": _session(job, session),
        "after": ", ".join(job.spec.depends_on),
        "time limit": _time_limit(job) if job.time_limit is not None else None,
        "settings": ", ".join(_settings(job.spec)),
        "sweep": parameters_text(job.spec.sweep.model_dump(exclude_none=True)) if job.spec.sweep else None,
        "metadata": ", ".join(f"{key}={value}" for key, value in (job.metadata or {}).items()),
    }
    yield f"{job.id}  {job.status} since {_when(since)}  {model}"
    yield from (f"  {name:<10} {text}" for name, text in lines.items() if text)
    yield "  history"
    for event in events:
        yield f"    {_when(event.at)} {'' if event.level == 'info' else f'{event.level}: '}{event.message}"


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _why(job: Job, events: Sequence[QueueEvent], since: float) -> str | None:
    """Tell its error and what to do about it, or what it waits for."""
    if job.error:
        return f"{job.error.rstrip('.')}. Change that, and submit it again: a job that failed is in nobody's way"
    waits = [event.message for event in events if event.at >= since and event.kind is EventKind.WAITS]
    if job.status is JobStatus.QUEUED and waits:
        return waits[-1]
    return f"it is asked to {job.requested}, after its current step" if job.requested else None


def _retries(job: Job) -> str | None:
    """Count the attempts that ended too early, by what ended them."""
    counts = {
        "that the job may have ended": job.lost_attempts,
        "by infrastructure": job.infrastructure_failures,
        "whose session did not start": job.failed_launches,
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"attempts lost: {told}" if told else None


def _time_limit(job: Job) -> str:
    return f"{duration_text(job.time_limit)}, of which {duration_text(job.seconds_run(time.time()) // 1)} are over"


def _progress(job: Job) -> str | None:
    progress = job.progress
    if progress is None:
        return None
    done = f"step {progress['step']} of {progress['steps']}, loss {progress['loss']:.4f}"
    done += f" ({progress['first_loss']:.4f} at the first step), {progress['tokens_per_second']:,.0f} tokens/s"
    return done if job.status in TERMINAL else f"{done}, {_left(progress)} left"


def _result(job: Job) -> str | None:
    """Return what it has been judged by, if it has validation rows."""
    figures: JobMetrics | None = job.result["metrics"] if job.result else job.progress
    if figures is None or "validation_loss" not in figures:
        return None
    before = figures.get("validation_loss_before")
    accuracy = accuracy_line(figures["validation_accuracy"], figures.get("validation_reward_margin"))
    return (
        f"validation loss {figures['validation_loss']:.4f} after step {figures['validation_step']}"
        f"{'' if before is None else f' ({before:.4f} before)'}, {accuracy}"
    )


def _chat(job: Job, model: str, settings: Settings) -> str:
    """Return a command that works where a server of these settings runs."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    url = f"http://127.0.0.1:{settings.serve_port}/v1/chat/completions"
    lacking = "" if job.base in settings.base_models else f", with an alias {job.base} of its base in LORA_BASE_MODELS"
    return f"curl {url} -H 'content-type: application/json' -d '{body}'  # after serve run deploy.app:app{lacking}"


def _session(job: Job, session: Session | None) -> str:
    workers = f"{job.num_workers} worker{'s' * (job.num_workers > 1)}"
    asked = f"{job.spec.base_model} in precision {job.spec.precision}, {workers}"
    if job.is_sweep:
        return f"those of its trials, on {job.cluster}: {asked}"
    if session is None:
        return f"none yet, on {job.cluster}: {asked}"
    facts = session.facts
    path = f"; path: {facts['forward_path']}" if facts and "forward_path" in facts else ""
    found = f"; it is {facts['precision']}, {facts['why']}{path}; exact: {facts['exactness']}" if facts else ""
    return f"{session.ray_submission_id} ({session.state}) on {job.cluster}: {asked}, attempt {job.attempt}{found}"


def _settings(spec: JobSpec) -> Iterator[str]:
    """Name those that differ from what they are where nobody says anything."""
    yield f"dataset {spec.dataset}"
    for prefix, block in (("", spec), ("lora.", spec.lora), ("train.", spec.train)):
        for name, value in _differing(block):
            if name not in _TOLD_APART:
                yield f"{prefix}{name} {value}"


def _differing(block: BaseModel) -> Iterator[tuple[str, Any]]:
    for name, field in type(block).model_fields.items():
        value = getattr(block, name)
        if value != field.get_default(call_default_factory=True):
            yield name, value


def _left(progress: JobProgress) -> str:
    """Return minutes and seconds until the last step, at the pace up to now."""
    step, pace = progress["step"], progress["tokens_per_second"]
    seconds = int((progress["steps"] - step) * progress["tokens"] / step / pace) if step and pace else 0
    return f"{seconds // 60}:{seconds % 60:02d}"
