"""Train many adapters on one frozen base. `TrainEngine.micro_batch` is what all ranks do together, again and again.

    for job between steps:             its next step's examples, or held-out ones: each rank's share, cut into chunks
    batch = a fair share of every job  chunks of several jobs side by side, at most `capacity` rows
    forward_backward(batch)            gradients by job
    for job that is complete:          optim_step(job): one all-reduce of (gradient, loss, tokens), divide, clip, AdamW

A job steps when its own batch is complete and begins its next one at once: it waits for no neighbour's. Each has its
own step count, data order, schedule, clipping, dropout stream, evaluations and optimizer; a neighbour that joins,
leaves or diverges changes nothing (DESIGN rule 4).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lora_core.adapter_bank import Adapter, AdapterBank, Run, mix64
from lora_core.adapter_init import continued_adapter, init_adapter
from lora_core.attention import PackedAttention
from lora_core.base_model import BaseModel
from lora_core.dataset import Example
from lora_core.engine_job import VALIDATION_NOT_FINITE, EngineJob, JobDiverged, Progress
from lora_core.fair_queue import FairQueue
from lora_core.loss import Head, chunk_losses, chunk_scores
from lora_core.optim import AllReduce, Evaluation, FlatAdamW, NoGradientError, Snapshot, StepOutcome, learning_rate
from lora_core.packing import Chunk, PackedBatch, PackedChunk, cut_into_chunks, pack

CHUNK_TOKENS = 1024


class LiveJob:
    """A job in training: its optimizer, its adapter's weights and its progress."""

    def __init__(self, job: EngineJob, optimizer: FlatAdamW) -> None:
        self.job = job
        self.optimizer = optimizer
        self.progress = Progress()
        self.digest = job.digest()
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
            examples = self.job.validation
        else:
            examples = [self.job.examples[index] for index in self.job.examples_of(self.progress.step)]
        limit = max(CHUNK_TOKENS, self.job.train.max_seq_len)
        return cut_into_chunks(self.job.name, list(enumerate(examples))[rank::ranks], limit)

    def dropout_keys(self, chunk: PackedChunk) -> Tensor | None:
        """int64 [rows]: a hash of (job seed, step, example in the step, token in the document)."""
        if self.job.lora.lora_dropout == 0:
            return None
        seed = torch.tensor([self.job.train.seed], dtype=torch.int64, device=chunk.row_tokens.device)
        return mix64(mix64(mix64(mix64(seed) + self.progress.step) + chunk.row_examples) + chunk.row_tokens)

    def snapshot(self) -> Snapshot:
        """Everything that `TrainEngine.add` needs to continue exactly, as of the last step: of the next one's
        gradient, what is there already is computed again.
        """
        return self.optimizer.snapshot({"job": self.digest, "progress": self.progress.to_json()})

    def checkpoint(self) -> bytes:
        """`snapshot`, written."""
        return self.snapshot().dump()

    def restore(self, checkpoint: bytes) -> None:
        """Continue from `checkpoint` of the same job.

        Raises:
            ValueError: it is another job's, or of other settings or rows.
        """
        counters = self.optimizer.restore(checkpoint)
        if counters["job"] != self.digest:
            raise ValueError(
                f"the checkpoint is not one of {self.job.name}: its lora or train settings, or its rows, are others"
            )
        self.progress = Progress.from_json(str(counters["progress"]))


class TrainEngine:
    """One rank's training of any number of jobs on one base.

    `all_reduce` sums a tensor over the ranks in place (None: one rank). `capacity` is the rows of one micro-batch.
    Ranks stay in step as long as they add and remove the same jobs in the same order between the same micro-batches.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        capacity: int = 2048,
        rank: int = 0,
        ranks: int = 1,
        all_reduce: AllReduce | None = None,
    ) -> None:
        assert ranks == 1 or all_reduce is not None
        self.base = base
        self.bank = AdapterBank(base.model)
        self.live: dict[str, LiveJob] = {}
        self._capacity, self._rank, self._ranks, self._all_reduce = capacity, rank, ranks, all_reduce
        self._queues = [
            FairQueue() for _ in range(ranks)
        ]  # every rank's, so that this one knows when a job is complete

    def add(self, job: EngineJob, checkpoint: bytes | None = None) -> LiveJob:
        """Take a job in, from the start or from `LiveJob.checkpoint`.

        Raises:
            ValueError: the target modules match nothing, the job lacks examples, or the checkpoint is another job's.
        """
        if problems := job.problems():
            raise ValueError("; ".join(problems))
        if job.init_adapter is None:
            start = init_adapter(self.bank, job.lora, job.train.seed)
        else:
            start = continued_adapter(self.bank, job.lora, job.init_adapter)
        live = LiveJob(job, FlatAdamW(start, job.train, self.base.device, self.base.model.dtype))
        if checkpoint is not None:
            live.restore(checkpoint)
        self.live[job.name] = live
        return live

    def remove(self, name: str) -> None:
        """Let a job go; its memory is free once the caller drops its `LiveJob`."""
        del self.live[name]
        for queue in self._queues:
            queue.drop(name)

    def step(self) -> dict[str, StepOutcome | JobDiverged]:
        """Micro-batches until some job has completed an optimizer step: the outcomes of those that have (none where
        all are done).
        """
        while any(not live.done for live in self.live.values()):
            if outcomes := self.micro_batch():
                return outcomes
        return {}

    def micro_batch(self) -> dict[str, StepOutcome | JobDiverged]:
        """One micro-batch on every rank, and the outcomes of the jobs that completed an optimizer step with it (and the
        evaluation after it, where one was due). A job that cannot go on is returned as its error; the others went on.
        """
        jobs = [live for live in self.live.values() if not live.done]
        for live in jobs:
            if not self._waits(live):
                for rank, queue in enumerate(self._queues):
                    queue.put(live.job.name, live.chunks(rank, self._ranks), training=not live.evaluation_due)
        taken = [queue.take(self._capacity) for queue in self._queues]
        chunks, training = taken[self._rank]
        if chunks:  # the other ranks may have some where this one has none
            batch = pack(chunks, self.base.device)
            if training:
                self.forward_backward(batch)
            else:
                self.evaluate(batch)
        outcomes: dict[str, StepOutcome | JobDiverged] = {}
        for live in jobs:
            if not self._waits(live):
                outcome = self._evaluated(live) if live.evaluation_due else self.optim_step(live)
                if isinstance(outcome, JobDiverged) or (outcome is not None and not live.evaluation_due):
                    outcomes[live.job.name] = outcome
        return outcomes

    def _waits(self, live: LiveJob) -> bool:
        return any(live.job.name in queue for queue in self._queues)

    def forward_backward(self, batch: PackedBatch) -> None:
        """Add every chunk's loss and gradient to its job."""
        runs = [
            Run(self.live[chunk.job].adapter, chunk.rows, self.live[chunk.job].dropout_keys(chunk))
            for chunk in batch.chunks
        ]
        losses = _losses(self.base, self.bank, runs, batch)
        losses.sum().backward()
        for chunk, loss in zip(batch.chunks, losses.detach(), strict=True):
            self.live[chunk.job].optimizer.add_loss(loss, chunk.labels.numel())

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> None:
        """Add every chunk's loss and number of hits to its job's evaluation."""
        runs = [Run(self.live[chunk.job].adapter, chunk.rows) for chunk in batch.chunks]
        hidden = _hidden(self.base, self.bank, runs, batch)
        labelled = [(chunk.label_rows, chunk.labels) for chunk in batch.chunks]
        scores = chunk_scores(hidden, _routed_head(self.base, self.bank, runs), labelled)
        for chunk, score in zip(batch.chunks, scores, strict=True):
            self.live[chunk.job].scores[:2] += score
            self.live[chunk.job].scores[2] += chunk.labels.numel()

    def optim_step(self, live: LiveJob) -> StepOutcome | JobDiverged:
        """One optimizer step of one job, by all ranks together."""
        job, progress = live.job, live.progress
        indices = job.examples_of(progress.step)
        try:
            outcome = live.optimizer.step(learning_rate(job.train, progress.step, job.steps), self._all_reduce)
        except NoGradientError as error:
            return JobDiverged(job.name, progress.step + 1, str(error))
        if not (math.isfinite(outcome.grad_norm) and math.isfinite(outcome.loss)):
            return JobDiverged(job.name, progress.step + 1)
        progress.stepped(outcome, sum(len(job.examples[index].ids) for index in indices))
        return outcome

    def _evaluated(self, live: LiveJob) -> StepOutcome | JobDiverged | None:
        """The end of an evaluation, by all ranks together: the outcome of the step before it, if there was one."""
        if self._all_reduce is not None:
            self._all_reduce(live.scores)
        loss, hits, tokens = live.scores.tolist()
        live.scores.zero_()
        progress, train = live.progress, live.job.train
        if not math.isfinite(loss):
            return JobDiverged(live.job.name, progress.step, VALIDATION_NOT_FINITE)
        evaluation = Evaluation(progress.step, loss / tokens, hits / tokens, int(tokens))
        if progress.evaluated(evaluation, train.early_stopping_patience) and train.keeps_best:
            live.optimizer.keep_best()
        if live.done and train.keeps_best:
            live.optimizer.load_best()
        return progress.outcome


def _hidden(base: BaseModel, bank: AdapterBank, runs: Sequence[Run], batch: PackedBatch) -> Tensor:
    with bank.routed(runs):
        return base.hidden(batch.ids, batch.positions, PackedAttention(batch.lengths))[0]


def _losses(base: BaseModel, bank: AdapterBank, runs: Sequence[Run], batch: PackedBatch) -> Tensor:
    hidden = _hidden(base, bank, runs, batch)
    labelled = [(chunk.label_rows, chunk.labels) for chunk in batch.chunks]
    return chunk_losses(hidden, _routed_head(base, bank, runs), labelled, bank.head_weights(runs))


def _routed_head(base: BaseModel, bank: AdapterBank, runs: Sequence[Run]) -> Head:
    """The output head with the adapters that chunks have on it; chunk i is `runs[i]`."""
    starts = list(accumulate((run.rows for run in runs), initial=0))

    def head(hidden: Tensor, chunk: int, rows: Tensor) -> Tensor:
        run = runs[chunk]
        keys = None if run.dropout_keys is None else run.dropout_keys[rows - starts[chunk]]
        with bank.routed([Run(run.adapter, len(rows), keys)]):
            return base.head(hidden)

    return head


@torch.no_grad()
def probe_losses(
    base: BaseModel, bank: AdapterBank, adapter: Adapter | None, examples: Iterable[Example]
) -> list[float]:
    """Summed loss of each example's labels under `adapter` (no dropout), each run alone: what training leaves for
    serving to check.
    """
    losses = []
    for place, example in enumerate(examples):
        batch = pack([Chunk("probe", ((place, example),))], base.device)
        losses.append(float(_losses(base, bank, [Run(adapter, batch.chunks[0].rows)], batch)[0]))
    return losses
