"""What a job comes to, before anything runs: the same for `submit --dry-run` and for a dry run through the API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.settings import Settings
from cluster.sources import local_source
from jobs.admitted import Admitted, Rows
from jobs.job import SessionKey
from jobs.spec import JobSpec
from jobs.store.jobs import JobQueue
from jobs.sweep import Sweep


@dataclass(frozen=True)
class Memory:
    """Bytes that training takes on a rank of this kind of device: where there is room, and at least."""

    device: str
    roomy: int
    least: int


@dataclass(frozen=True)
class SweepEstimate:
    """How many `trials` a sweep has, how many of them go on from each rung, and the tokens of all epochs of all of
    them, had none to stop.
    """

    trials: int
    left: tuple[int, ...]
    grid_tokens: int

    def lines(self, most: int) -> Iterator[str]:
        """Say it to people, where all together train on `most` tokens."""
        left = ", then ".join(map(str, (self.trials, *self.left)))
        yield f"a sweep of {left} trials: at most about {most:,} of the {self.grid_tokens:,} tokens that all have"


@dataclass(frozen=True)
class Estimate:
    """`tokens` and `supervised_tokens` are of all epochs, and of a `sweep` about the most that its trials come to.
    `tokens_per_second` is what a session of the same base, precision, path and number of workers was measured to make
    on this cluster last, all its jobs together, and `seconds` how long the job takes at that pace: None, where none was
    measured. `before` is how many of the jobs that wait have its priority or a higher one.
    """

    rows: Rows
    tokens: int
    supervised_tokens: int
    memory: Memory
    tokens_per_second: float | None
    seconds: float | None
    before: int
    sweep: SweepEstimate | None = None

    def lines(self) -> Iterator[str]:
        """Say it to people."""
        if self.sweep is not None:
            yield from self.sweep.lines(self.tokens)
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
    rows, tokens, sweep = admitted.rows, admitted.rows.tokens * spec.train.epochs, None
    if spec.sweep is not None:
        each = [(trial.steps, rows.tokens * trial.spec.train.epochs) for trial in admitted.trials]
        sweep, tokens = _of_sweep(spec.sweep, each), spec.sweep.most_tokens(each)
    key = SessionKey(spec.base_model, spec.precision, spec.num_workers, admitted.forward_path)
    pace = queue.measured_pace(cluster, key)
    return Estimate(
        rows,
        tokens,
        round(tokens * rows.supervised_tokens / rows.tokens),
        memory,
        pace,
        None if pace is None else tokens / pace,
        queue.waiting_before(cluster, spec.priority),
        sweep,
    )


def _of_sweep(sweep: Sweep, trials: Sequence[tuple[int, int]]) -> SweepEstimate:
    """Return what trials of these steps and tokens come to."""
    rungs = sweep.rungs_of(len(trials), min(steps for steps, _ in trials))
    left = tuple(sweep.left_after(rung, rungs, len(trials)) for rung in range(1, rungs + 1))
    return SweepEstimate(len(trials), left, sum(tokens for _, tokens in trials))


def memory_of_a_rank(spec: JobSpec, settings: Settings, admitted: Admitted, device: str) -> Memory:
    """Predict it as ranks do before they let a job in, from a run without numbers on a `device` (cuda, cpu); of a sweep
    that of the trial of the largest rank.
    """
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
    lora = max((trial.spec.lora for trial in admitted.trials), key=lambda one: one.r, default=spec.lora)
    longest, kept = admitted.rows.longest, [lora] if spec.train.keeps_best else []
    references = [lora] if spec.train.is_preference and spec.init_adapter is not None else []
    plan = predicted.fit(2**62, [lora], longest, longest, kept, references)
    least = predicted.predict([lora], longest, longest, "full", kept, references)
    return Memory(device, plan.predicted_bytes, least)
