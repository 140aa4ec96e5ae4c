"""What a job comes to, before anything runs: the same for `submit --dry-run` and for a dry run through the API."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.settings import Settings
from cluster.sources import local_source
from jobs.admitted import Admitted, Rows
from jobs.job import SessionKey
from jobs.spec import JobSpec
from jobs.store.jobs import JobQueue


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes on a rank of this kind of device: where there is room, and at least."""

    device: str
    roomy: int
    least: int


@dataclass(frozen=True)
class Estimate:
    """`tokens` and `supervised_tokens` are of all epochs. `tokens_per_second` is what a session of the same base,
    precision, path and number of workers was measured to make on this cluster last, all its jobs together, and
    `seconds` how long the job takes at that pace: None, where none was measured. `before` is how many of the jobs that
    wait have its priority or a higher one.
    """

    rows: Rows
    tokens: int
    supervised_tokens: int
    memory: Memory
    tokens_per_second: float | None
    seconds: float | None
    before: int

    def lines(self) -> Iterator[str]:
        """Say it to people."""
        yield f"{self.rows.steps:,} steps, {self.tokens:,} tokens, {self.supervised_tokens:,} of them supervised"
        roomy, least = self.memory.roomy / 1e9, self.memory.least / 1e9
        yield f"memory of a rank ({self.memory.device}): {roomy:.2f} GB where there is room, {least:.2f} GB at least"
        if self.seconds is None:
            yield "how long it takes is not known: no session of its kind was measured on this cluster yet"
        else:
            minutes = max(1, round(self.seconds / 60))
            yield f"about {minutes:,} min at {self.tokens_per_second:,.0f} tokens/s, as its kind was measured here last"
        yield f"{self.before or 'no'} waiting job{'s' * (self.before != 1)} of its priority or a higher one"


def estimate(queue: JobQueue, cluster: str, spec: JobSpec, admitted: Admitted, memory: Memory) -> Estimate:
    """Return what a job that was checked would come to on a cluster."""
    rows, epochs = admitted.rows, spec.train.epochs
    key = SessionKey(spec.base_model, spec.precision, spec.num_workers, admitted.forward_path)
    pace = queue.measured_pace(cluster, key)
    return Estimate(
        rows,
        rows.tokens * epochs,
        rows.supervised_tokens * epochs,
        memory,
        pace,
        None if pace is None else rows.tokens * epochs / pace,
        queue.waiting_before(cluster, spec.priority),
    )


def memory_of_a_rank(spec: JobSpec, settings: Settings, admitted: Admitted, device: str) -> Memory:
    """Predict it as ranks do before they let a job in, from a run without numbers on a `device` (cuda, cpu)."""
    # Late: who only reads an estimate needs no torch.
    import torch

    from lora_core.models.base import describe_base
    from lora_core.models.precision import QUANTISED
    from lora_core.training.memory.predictor import predictor

    source = local_source(settings.resolve_base(spec.base_model), settings.cache_dir, weights=False)
    model, _ = describe_base(source, settings.cache_dir)
    in_fp32 = spec.precision == "fp32" or (spec.precision == "auto" and device == "cpu")
    dtype = torch.float32 if in_fp32 else torch.bfloat16
    quantised = spec.precision if spec.precision in QUANTISED else None
    predicted = predictor(model.config, dtype, admitted.forward_path, device, quantised)  # type: ignore[arg-type]
    longest, kept = admitted.rows.longest, [spec.lora] if spec.train.keeps_best else []
    references = [spec.lora] if spec.train.is_preference and spec.init_adapter is not None else []
    plan = predicted.fit(2**62, [spec.lora], longest, longest, kept, references)
    least = predicted.predict([spec.lora], longest, longest, "full", kept, references)
    return Memory(device, plan.predicted_bytes, least)
