"""A job on one rank, and what is told of it: its progress while it trains, its manifest when it is published."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.session.messages import Assignment
from jobs.spec import JobSpec
from lora_core.data.dataset import Example
from lora_core.models.base import BaseModel
from lora_core.models.exactness import Exactness
from lora_core.training.active_job import LiveJob
from lora_core.training.optimizer import Evaluation

PROBES = 4
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
    probes: list[float] = field(default_factory=list)  # losses, once it is done

    @property
    def probed(self) -> Sequence[Example]:
        """The rows by which a server sees that it computes what training did."""
        return self.live.job.examples[:PROBES]

    def expected_seconds(self, base: BaseModel, flop_per_second: float, ranks: int) -> float:
        """What is left of its training, by the rate of each rank's products."""
        job, progress = self.live.job, self.live.progress
        tokens = sum(len(example.ids) for example in job.examples) * job.train.epochs * (1 - progress.step / job.steps)
        return 4 * base.parameters * tokens / (flop_per_second * ranks * OF_PRODUCTS)

    def progress(self, base: BaseModel) -> dict[str, Any]:
        """Its figures up to now, as `Progressed` and `Trained` carry them."""
        progress, elapsed = self.live.progress, time.monotonic() - self.started
        return {
            "step": progress.step,
            "steps": self.live.job.steps,
            "loss": progress.loss,
            "first_loss": progress.first_loss,
            "tokens": progress.tokens,
            "supervised_tokens": progress.supervised_tokens,
            "tokens_per_second": (progress.tokens - self.started_tokens) / elapsed,
            "step_seconds": self.step_seconds,
            "trainable_parameters": self.live.optimizer.parameters,
            "base_parameters": base.parameters,
            "base_bytes": base.nbytes,
            **_validation(progress.before, progress.evaluation),
            **({"best_validation_loss": progress.best.loss, "best_step": progress.best.step} if progress.best else {}),
        }

    def manifest(self, base: BaseModel, exactness: Exactness) -> dict[str, Any]:
        """What is published beside the files of the adapter, once all probes are measured."""
        progress, train = self.live.progress, self.live.job.train
        return {
            "job": self.assignment.job_id,
            "base_fingerprint": base.fingerprint,
            "base_parameters": base.parameters,
            "precision": base.precision,
            "exactness": str(exactness),
            "tokenizer": self.tokenizer,
            "lora": self.spec.lora.model_dump(),
            "train": self.spec.train.model_dump(),
            "metrics": {
                "step": progress.step,
                "loss": progress.loss,
                "first_loss": progress.first_loss,
                "tokens": progress.tokens,
                "supervised_tokens": progress.supervised_tokens,
                **_validation(progress.before, progress.best if train.keeps_best else progress.evaluation),
                **({"stopped": progress.stopped} if progress.stopped else {}),
            },
            "probes": [
                {"ids": example.ids, "labels_mask": example.labels_mask, "loss": loss}
                for example, loss in zip(self.probed, self.probes, strict=True)
            ],
        }


def _validation(before: Evaluation | None, after: Evaluation | None) -> dict[str, float]:
    """An evaluation as progress and manifest name its figures, beside that of what training started from."""
    figures: dict[str, float] = {"validation_loss_before": before.loss} if before else {}
    if after is not None and after is not before:
        figures |= {
            "validation_loss": after.loss,
            "validation_accuracy": after.accuracy,
            "validation_step": after.step,
        }
    return figures
