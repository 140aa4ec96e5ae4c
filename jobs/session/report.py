"""A job on one rank, and what is told of it: its progress while it trains, its manifest when it is published."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.job import JobMetrics, JobProgress, StepMetrics
from jobs.session.messages import Assignment
from jobs.spec import JobSpec
from lora_core.data.dataset import Example
from lora_core.models.base import BaseModel
from lora_core.training.active_job import LiveJob
from lora_core.training.engine import TrainEngine
from lora_core.training.job import Progress
from lora_core.training.optimizer import Evaluation, StepOutcome, learning_rate

PROBES = 4
PROBE_CONTEXT, PROBE_LABELS = 16, 16
"""Tokens of a probe before its first label, and from there on: the pass over all of them takes as long as one over a
short prompt, which is what an answer of a new adapter waits for twice, here and in the server that replays them.
"""

CHECKPOINTS = 4
"""Of a job's epochs about so many, evenly apart, leave a version; the last of them is what the job publishes."""

OF_PRODUCTS = 0.5
"""What a CPU's training reaches of the rate that its products have by themselves: 0.37 to 0.6 were seen."""


@dataclass
class ActiveJob:
    """One job on this rank, with what its reports need; `tokenizer` is the hash of that which read its rows."""

    assignment: Assignment
    spec: JobSpec
    live: LiveJob
    tokenizer: str
    started: float = field(default_factory=time.monotonic)
    started_tokens: int = 0
    stepped: float = field(default_factory=time.monotonic)
    step_seconds: float = 0.0
    stepped_tokens: int = 0
    kept_step: int = 0
    """The last step after which a version was kept, or before which it is not known whether one was."""

    @property
    def ends_kept_epoch(self) -> bool:
        """Whether a version of what it is now is to be kept, with the figures of the evaluation after its epoch."""
        job, step = self.live.job, self.live.progress.step
        apart = job.steps_per_epoch * max(1, job.train.epochs // CHECKPOINTS)
        between = step % apart or step <= self.kept_step
        return not (between or self.live.evaluation_due or self.live.done)

    @property
    def validation_loss(self) -> float:
        """That of what it would publish."""
        progress = self.live.progress
        evaluation = progress.best if self.live.job.train.keeps_best else progress.evaluation
        assert evaluation is not None
        return evaluation.loss

    @property
    def probes(self) -> list[Example]:
        """Parts of rows by which a server sees that it computes what training did."""
        return [probe_of(example) for example in self.live.job.examples[:PROBES]]

    def expected_seconds(self, base: BaseModel, flop_per_second: float, ranks: int) -> float:
        """Return what is left of its training, by the rate of each rank's products: two passes over each token, and of
        pairs one more, or in the first epoch two.
        """
        job, progress = self.live.job, self.live.progress
        tokens = sum(len(example.ids) for example in job.examples) * job.train.epochs * (1 - progress.step / job.steps)
        passes = 3 + 1 / job.train.epochs if job.train.is_preference else 2
        return 2 * passes * base.parameters * tokens / (flop_per_second * ranks * OF_PRODUCTS)

    def end_step(self) -> int:
        """Note how long its last step took; returns how many tokens that trained on."""
        now, tokens = time.monotonic(), self.live.progress.tokens
        self.step_seconds, self.stepped = now - self.stepped, now
        of_step, self.stepped_tokens = tokens - max(self.stepped_tokens, self.started_tokens), tokens
        return of_step

    def step_metrics(self, outcome: StepOutcome, tokens: int) -> StepMetrics:
        """Return the figures of the step that has just ended, over `tokens` tokens."""
        job, step = self.live.job, self.live.progress.step
        figures = {
            "train_loss": outcome.loss,
            "learning_rate": learning_rate(job.train, step - 1, job.steps),
            "grad_norm": outcome.grad_norm,
            "tokens_per_second": tokens / max(self.step_seconds, 1e-9),
        }
        if outcome.accuracy is not None and outcome.margin is not None:
            figures |= {"train_reward_accuracy": outcome.accuracy, "train_reward_margin": outcome.margin}
        if (evaluation := outcome.evaluation) is not None:
            figures["valid_loss"] = evaluation.loss
            if evaluation.margin is None:
                figures["valid_mean_token_accuracy"] = evaluation.accuracy
            else:
                figures |= {"valid_reward_accuracy": evaluation.accuracy, "valid_reward_margin": evaluation.margin}
        return StepMetrics(step, time.time(), figures)

    def progress(self, base: BaseModel) -> JobProgress:
        """Its figures up to now, as `StepsDone` and `Trained` carry them."""
        progress, elapsed = self.live.progress, time.monotonic() - self.started
        figures: JobProgress = {
            **_metrics(progress, progress.evaluation),
            "steps": self.live.job.steps,
            "tokens_per_second": (progress.tokens - self.started_tokens) / elapsed,
            "step_seconds": self.step_seconds,
            "trainable_parameters": self.live.optimizer.parameters,
            "base_parameters": base.parameters,
            "base_bytes": base.nbytes,
        }
        if progress.best is not None:
            figures |= {"best_validation_loss": progress.best.loss, "best_step": progress.best.step}
        return figures

    def manifest(self, base: BaseModel, engine: TrainEngine, losses: Sequence[float]) -> dict[str, Any]:
        """Return what is published beside the files of the adapter; `losses` are those of its probes. `trained_at` is
        the end of its last step (seconds since 1970).
        """
        progress, best = self.live.progress, self.live.job.train.keeps_best and self.live.done
        metrics = _metrics(progress, progress.best if best else progress.evaluation)
        if progress.stopped is not None:
            metrics["stopped"] = progress.stopped
        return {
            "job": self.assignment.job_id,
            "trained_at": time.time() - (time.monotonic() - self.stepped),
            "base_fingerprint": base.fingerprint,
            "base_parameters": base.parameters,
            "precision": base.precision,
            "forward_path": engine.forward.name,
            "exactness": str(engine.exactness),
            "tokenizer": self.tokenizer,
            "lora": self.spec.lora.model_dump(),
            "train": self.spec.train.model_dump(),
            "metrics": metrics,
            "probes": [
                {"ids": example.ids, "labels_mask": example.labels_mask, "loss": loss}
                for example, loss in zip(self.probes, losses, strict=True)
            ],
        }


def probe_of(example: Example) -> Example:
    """Return the part of a row around its first label."""
    first = example.labels_mask.index(True) if True in example.labels_mask else len(example.ids)
    part = slice(max(0, first - PROBE_CONTEXT), first + PROBE_LABELS)
    return Example(example.ids[part], example.labels_mask[part])


def _metrics(progress: Progress, evaluation: Evaluation | None) -> JobMetrics:
    """Return the figures of a job whose adapter `evaluation` is about, beside what training started from."""
    metrics: JobMetrics = {
        "step": progress.step,
        "loss": progress.loss,
        "first_loss": progress.first_loss,
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
    }
    outcome = progress.outcome
    if outcome is not None and outcome.accuracy is not None and outcome.margin is not None:
        metrics |= {"reward_accuracy": outcome.accuracy, "reward_margin": outcome.margin}
    if progress.before is not None:
        metrics["validation_loss_before"] = progress.before.loss
    if evaluation is not None and evaluation is not progress.before:
        metrics |= {
            "validation_loss": evaluation.loss,
            "validation_accuracy": evaluation.accuracy,
            "validation_step": evaluation.step,
        }
        if evaluation.margin is not None:
            metrics["validation_reward_margin"] = evaluation.margin
    return metrics
