"""A job on one rank: prepared beside the steps of others, then live, until it is done.

EngineJob  ->  PreparedJob, in host memory  ->  LiveJob, with its optimizer on the device
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.dropout import mix64
from lora_core.data.packing import PAD_TO_MULTIPLE_OF, Chunk, PackedChunk, chunked
from lora_core.models.step import Bound
from lora_core.training.job import EngineJob, Progress
from lora_core.training.optimizer import FlatAdamW, HostState, Snapshot


class CheckpointMismatchError(ValueError):
    """A checkpoint that cannot be continued with what the job is now."""


class PreparedJob:
    """A job that is ready to be admitted, in host memory."""

    def __init__(self, job: EngineJob, state: HostState) -> None:
        self.job, self.state = job, state
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
        self.progress = Progress.from_json(str(snapshot.counters["progress"]))


class NextStep(NamedTuple):
    """What comes next for a job that is not done: optimizer step `step` (from 0), or the validation examples before
    it.
    """

    step: int
    evaluation_due: bool


class LiveJob:
    """A job in training: its optimizer, its adapter's weights, these as the base's path has `bound` them, and its
    progress.
    """

    def __init__(self, job: EngineJob, optimizer: FlatAdamW, bound: Bound) -> None:
        self.job = job
        self.optimizer = optimizer
        self.bound = bound
        self.progress = Progress()
        # Of the evaluation that is under way: sum of token losses, tokens that the model would have written, tokens.
        self.scores = torch.zeros(3, dtype=torch.float64, device=optimizer.flat.device)

    @property
    def adapter(self) -> Adapter:
        return self.optimizer.adapter

    @property
    def done(self) -> bool:
        progress = self.progress
        return (progress.step >= self.job.steps or progress.stopped is not None) and not self.evaluation_due

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
        return None if self.done else NextStep(self.progress.step, self.evaluation_due)

    @property
    def following_step(self) -> NextStep | None:
        """What `next_step` will be if the step that is under way succeeds."""
        step = self.progress.step + 1
        due = self.job.evaluates_after(step)
        return NextStep(step, due) if due or step < self.job.steps else None

    def chunks(
        self, next_step: NextStep, rank: int, ranks: int, pad_to_multiple_of: int = PAD_TO_MULTIPLE_OF
    ) -> list[Chunk]:
        """A rank's share of the validation examples or of those of the step, whichever is next: every `ranks`-th."""
        job, step = self.job, None if next_step.evaluation_due else next_step.step
        examples = job.validation if step is None else [job.examples[index] for index in job.examples_of(step)]
        own = list(enumerate(examples))[rank::ranks]
        return chunked(job.name, own, job.chunk_limit, step, pad_to_multiple_of)

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
        return self.optimizer.snapshot({"job": self.job.digest, "progress": self.progress.to_json()})
