"""A job on one rank: prepared beside the steps of others, then live, until it is done.

EngineJob  ->  PreparedJob, in host memory  ->  LiveJob, with its optimizer on the device
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.adapter_bank import Adapter
from lora_core.adapter_view import AdapterView
from lora_core.dataset import Example
from lora_core.dropout import mix64
from lora_core.engine_job import EngineJob, Progress
from lora_core.optim import FlatAdamW, HostState, Snapshot
from lora_core.packing import Chunk, PackedChunk, cut_into_chunks


class PreparedJob:
    """A job that is ready to be admitted, in host memory."""

    def __init__(self, job: EngineJob, state: HostState) -> None:
        self.job, self.state = job, state
        self.progress = Progress()
        self.digest = job.digest()  # of all its rows: it is known from here on

    def restore(self, checkpoint: bytes) -> None:
        """Continue from `checkpoint` of the same job.

        Raises:
            ValueError: it is another job's, or of other settings or rows.
        """
        snapshot = Snapshot.load(checkpoint)
        if snapshot.counters["job"] != self.digest:
            raise ValueError(
                f"the checkpoint is not one of {self.job.name}: its lora or train settings, or its rows, are others"
            )
        self.state.restore(snapshot)
        self.progress = Progress.from_json(str(snapshot.counters["progress"]))


class LiveJob:
    """A job in training: its optimizer, its adapter's weights and its progress."""

    def __init__(self, job: EngineJob, optimizer: FlatAdamW) -> None:
        self.job = job
        self.optimizer = optimizer
        self.progress = Progress()
        self.view: AdapterView | None = None  # of the adapter, where the decoder computes it
        self._ahead: tuple[tuple[int, int], list[Chunk]] | None = None
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
        """Whether the held-out examples come before the next step. It follows from the progress alone, so that a
        checkpoint taken before, during or after an evaluation continues alike.
        """
        step, last = self.progress.step, self.progress.evaluation
        return self.job.evaluates_after(step) and (last is None or last.step != step)

    def chunks(self, rank: int, ranks: int) -> list[Chunk]:
        """A rank's share of what comes next, the held-out examples or those of the next step: every `ranks`-th."""
        if self.evaluation_due:
            return self._cut(self.job.validation, rank, ranks)
        if self._ahead is not None and self._ahead[0] == (self.progress.step, rank):
            return self._ahead[1]
        return self._of_step(self.progress.step, rank, ranks)

    def look_ahead(self, rank: int, ranks: int) -> None:
        """Make ready what `chunks` will return for this rank after the step that is under way."""
        step = self.progress.step + 1
        if step < self.job.steps:
            chunks = self._of_step(step, rank, ranks)
            for chunk in chunks:
                _ = chunk.columns
            self._ahead = (step, rank), chunks

    def _of_step(self, step: int, rank: int, ranks: int) -> list[Chunk]:
        return self._cut([self.job.examples[index] for index in self.job.examples_of(step)], rank, ranks)

    def _cut(self, examples: Sequence[Example], rank: int, ranks: int) -> list[Chunk]:
        return cut_into_chunks(self.job.name, list(enumerate(examples))[rank::ranks], self.job.chunk_limit)

    def dropout_keys(self, chunk: PackedChunk) -> Tensor | None:
        """int64 [rows]: a hash of (job seed, step, example in the step, token in the document)."""
        if self.job.lora.lora_dropout == 0:
            return None
        # Not a tensor of a list, whose way to the device would be waited for.
        seed = torch.full((1,), self.job.train.seed, dtype=torch.int64, device=chunk.row_tokens.device)
        return mix64(mix64(mix64(mix64(seed) + self.progress.step) + chunk.row_examples) + chunk.row_tokens)

    def snapshot(self) -> Snapshot:
        """Everything that `TrainEngine.add` needs to continue exactly, as of the last step: of the next one's
        gradient, what is there already is computed again.
        """
        return self.optimizer.snapshot({"job": self.job.digest(), "progress": self.progress.to_json()})

    def checkpoint(self) -> bytes:
        """`snapshot`, written."""
        return self.snapshot().dump()
