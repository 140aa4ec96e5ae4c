"""A job on one rank: prepared beside the steps of others, then live, until it is done.

EngineJob  ->  PreparedJob, in host memory  ->  LiveJob, with its optimizer on the device

A step of pairs is scored before it is trained on (`preferences.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.dropout import mix64
from lora_core.config import DPO_BETA
from lora_core.data.packing import PAD_TO_MULTIPLE_OF, Chunk, PackedChunk, chunked
from lora_core.models.step import Bound
from lora_core.training.job import EngineJob, Progress
from lora_core.training.optimizer import Evaluation, FlatAdamW, HostState, Snapshot, StepOutcome
from lora_core.training.preferences import PairScores

Phase = Literal["evaluate", "score", "train"]


class CheckpointMismatchError(ValueError):
    """A checkpoint that cannot be continued with what the job is now."""


class PreparedJob:
    """A job that is ready to be admitted, in host memory. `reference` is the adapter that its pairs are scored with
    beside its own (None: the base alone).
    """

    def __init__(self, job: EngineJob, state: HostState, reference: Adapter | None = None) -> None:
        self.job, self.state, self.reference = job, state, reference
        self.reference_scores: Tensor | None = None  # as a checkpoint has them
        self.progress = Progress()
        self.digest = job.digest  # of all its rows: it is known from here on

    def restore(self, checkpoint: bytes) -> None:
        """Continue from `checkpoint` of the same job.

        Raises:
            CheckpointMismatchError: it is another job's, or of other settings or rows.
        """
        snapshot = Snapshot.load(checkpoint)
        if snapshot.counters["job"] != self.digest:
            raise CheckpointMismatchError(
                f"the checkpoint is not one of {self.job.name}: its lora or train settings, or its rows, are others"
            )
        self.state.restore(snapshot)
        self.reference_scores = snapshot.tensors.get("reference")
        self.progress = Progress.from_json(str(snapshot.counters["progress"]))


class NextStep(NamedTuple):
    """What comes next for a job that is not done: optimizer step `step` (from 0), or before it the validation examples
    or the scores of its pairs.
    """

    step: int
    phase: Phase


class LiveJob:
    """A job in training: its optimizer, its adapter's weights, these as the base's path has `bound` them, and its
    progress. `reference` is the bound adapter of `PreparedJob`'s; `pairs` are there where it learns from some.
    """

    def __init__(
        self, job: EngineJob, optimizer: FlatAdamW, bound: Bound, reference: Bound | None, progress: Progress
    ) -> None:
        self.job = job
        self.optimizer = optimizer
        self.bound, self.reference = bound, reference
        self.progress = progress
        self.pairs: PairScores | None = None
        if job.train.is_preference:
            documents, most = len(job.examples) + len(job.validation), max(job.documents_of_step, len(job.validation))
            self.pairs = PairScores(job.train.beta or DPO_BETA, documents, most, optimizer.flat.device)
        # Of the evaluation that is under way: sum of token losses, tokens that the model would have written, tokens.
        self.scores = torch.zeros(3, dtype=torch.float64, device=optimizer.flat.device)

    @property
    def adapter(self) -> Adapter:
        return self.optimizer.adapter

    @property
    def complete(self) -> bool:
        """Whether it has come to its end."""
        progress = self.progress
        return (progress.step >= self.job.steps or progress.stopped is not None) and not self.evaluation_due

    @property
    def done(self) -> bool:
        """Whether there is nothing more to do here: it has come to its end, or to where it waits."""
        return self.complete or (self.progress.step >= self.job.last_step and not self.evaluation_due)

    @property
    def evaluation_due(self) -> bool:
        """Whether the validation examples come before the next step. It follows from the progress alone, so that a
        checkpoint taken before, during or after an evaluation continues alike.
        """
        step, last = self.progress.step, self.progress.evaluation
        return self.job.evaluates_after(step) and (last is None or last.step != step)

    @property
    def next_step(self) -> NextStep | None:
        """None: it is done."""
        return None if self.done else NextStep(self.progress.step, self.phase)

    @property
    def phase(self) -> Phase:
        """What is under way, or comes next, of a job that is not done."""
        if self.evaluation_due:
            return "evaluate"
        return "score" if self.pairs is not None and self.pairs.step != self.progress.step else "train"

    @property
    def following_step(self) -> NextStep | None:
        """What `next_step` will be if the step that is under way succeeds."""
        step = self.progress.step + 1
        if self.job.evaluates_after(step):
            return NextStep(step, "evaluate")
        return NextStep(step, "train" if self.pairs is None else "score") if step < self.job.last_step else None

    def chunks(
        self, next_step: NextStep, rank: int, ranks: int, pad_to_multiple_of: int = PAD_TO_MULTIPLE_OF
    ) -> list[Chunk]:
        """A rank's share of the validation examples or of those of the step, whichever is next: every `ranks`-th. What
        is scored comes for the reference, too, where that has not scored it yet.
        """
        job, step = self.job, None if next_step.phase == "evaluate" else next_step.step
        examples = job.validation if step is None else [job.examples[index] for index in job.examples_of(step)]
        own = list(enumerate(examples))[rank::ranks]
        chunks = chunked(job.name, own, job.chunk_limit, step, pad_to_multiple_of)
        if self._reference_due(next_step):
            chunks += [replace(chunk, step=None, reference=True) for chunk in chunks]
        return chunks

    def _reference_due(self, next_step: NextStep) -> bool:
        """Each document is first scored in the first epoch, or before the first step."""
        if self.pairs is None or next_step.phase == "train":
            return False
        return next_step.step < (1 if next_step.phase == "evaluate" else self.job.steps_per_epoch)

    def bound_of(self, chunk: Chunk) -> Bound | None:
        """What a chunk is computed with; None is the base alone."""
        return self.reference if chunk.reference else self.bound

    def add_scores(self, chunk: Chunk, scores: Sequence[Tensor], labels: int) -> None:
        """Count a chunk of the evaluation, or of the pairs to score, that is under way: its loss, and how many of its
        labels are what the model would have written.
        """
        if self.pairs is None:
            self.scores[:2] += torch.stack([*scores])
            self.scores[2] += labels
        else:
            self.pairs.add(chunk, scores[0])

    @property
    def shares(self) -> Tensor:
        """What ranks have counted by `add_scores`, to be added up over them."""
        return self.scores if self.pairs is None else self.pairs.shares

    def score_step(self, count: bool) -> None:
        """All pairs of the step are scored: their weights are known from here on, and where this rank is the one to
        `count`, their loss.
        """
        assert self.pairs is not None
        step = self.progress.step
        documents = self.job.examples_of(step)
        sums = self.pairs.score(documents, self._reference_due(NextStep(step, "score")))
        self.pairs.step = step
        if count:
            self.optimizer.add_loss(sums[0], len(documents) // 2)

    def outcome(self, loss_sum: float, count: float, norm: float) -> StepOutcome:
        """What came of the queued step; see `FlatAdamW.outcome`."""
        outcome = self.optimizer.outcome(loss_sum, count, norm)
        if self.pairs is None or not outcome.tokens:
            return outcome
        documents = [self.job.examples[index] for index in self.job.examples_of(self.progress.step)]
        figures, labels = self.pairs.figures(outcome.tokens), sum(sum(one.labels_mask) for one in documents)
        return replace(outcome, tokens=labels, accuracy=figures.accuracy, margin=figures.margin)

    def evaluation(self) -> Evaluation:
        """The one that is complete; the next one starts from nothing."""
        step, validation = self.progress.step, self.job.validation
        if self.pairs is None:
            loss, correct, tokens = self.scores.tolist()
            self.scores.zero_()
            return Evaluation(step, loss / tokens, correct / tokens, int(tokens))
        first = len(self.job.examples)
        documents = range(first, first + len(validation))
        self.pairs.score(documents, self._reference_due(NextStep(step, "evaluate")))
        figures = self.pairs.figures(len(validation) // 2)
        labels = sum(sum(one.labels_mask) for one in validation)
        return Evaluation(step, figures.loss, figures.accuracy, labels, figures.margin)

    def dropout_keys(self, chunk: PackedChunk) -> Tensor | None:
        """int64 [tokens]: a hash of (job seed, step, example in the step, token in the document); None without
        dropout or training.
        """
        if self.job.lora.lora_dropout == 0 or chunk.step is None:
            return None
        # Not a tensor of a list, whose copy to the device would be waited for.
        seed = torch.full((1,), self.job.train.seed, dtype=torch.int64, device=chunk.positions.device)
        return mix64(mix64(mix64(mix64(seed) + chunk.step) + chunk.example_indices) + chunk.positions)

    def snapshot(self) -> Snapshot:
        """Everything that `TrainEngine.add` needs to continue exactly, as of the last step: of the next one's
        gradient, what is there already is recomputed.
        """
        counters: dict[str, float | int | str] = {"job": self.job.digest, "progress": self.progress.to_json()}
        return self.optimizer.snapshot(counters, None if self.pairs is None else {"reference": self.pairs.reference})
