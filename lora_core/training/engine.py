"""Train many adapters on one frozen base. `TrainEngine.micro_batch` is what all ranks do together, again and again.

    for job between steps:             its next step's examples, or validation ones: each rank's share, in chunks
    batch = a fair share of every job  chunks of several jobs side by side, at most `capacity` tokens
                                       (both made while the device still computes what came before, where it can be)
    forward_backward(batch)            gradients by job
    for job that is complete:          optim_step: one all-reduce of (gradient, loss, tokens), divide, clip, AdamW

A job that learns from pairs has them scored before each step, in micro-batches like those of an evaluation.
A job steps when its own batch is complete and begins its next one at once: it waits for no neighbour's. Each has its
own step count, data order, schedule, clipping, dropout stream, evaluations and optimizer; a neighbour that joins,
leaves or diverges changes nothing (DESIGN rule 4).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

from lora_core.adapters.init import LoraConfigError, continued_adapter, init_adapter
from lora_core.data.packing import Chunk, PackedBatch, pack
from lora_core.models.base import BaseModel
from lora_core.models.exactness import Exactness
from lora_core.models.forward import Forward, Ready, open_forward
from lora_core.models.llama.decoder import Checkpointing
from lora_core.training.active_job import LiveJob, NextStep, PreparedJob
from lora_core.training.fair_queue import FairQueue
from lora_core.training.job import VALIDATION_NOT_FINITE, EngineJob, JobDiverged
from lora_core.training.memory.planner import MemoryPlanner
from lora_core.training.memory.predictor import DoesNotFitError, NoRoomBesideError
from lora_core.training.optimizer import (
    AllReduce,
    FlatAdamW,
    HostState,
    NoGradientError,
    StepOutcome,
    learning_rate,
)


@dataclass(frozen=True)
class ReadyBatch:
    """Chunks, the same laid end to end, and as the base's path takes them."""

    chunks: Sequence[Chunk]
    packed: PackedBatch
    ready: Ready


@dataclass(frozen=True)
class _MicroBatchPlan:
    """A micro-batch, of jobs whose next steps are these: what each rank has waiting after it, and what this rank
    computes. All ranks plan alike, so all of them take a prefetched one or none.
    """

    next_steps: dict[str, NextStep]
    queues: list[FairQueue]
    batches: list[ReadyBatch]
    training: bool


class TrainEngine:
    """One rank's training of any number of jobs on one base, all of them through its `forward` path (None: the one
    that plain adapters take).

    `all_reduce` sums a tensor over the ranks in place (None: one rank). `capacity` is the tokens of one micro-batch.
    `checkpointing` "full" saves little but the inputs of the model's layers and recomputes the rest; "selective"
    recomputes gate and up on the llama path, and nothing on the other. Where `capacity` is None, both are chosen
    whenever a job joins or leaves, so that training fits into `budget_bytes` (None: what this machine can give now).
    `exactness` says how chunks are laid out (None: what this machine's products ask for). Ranks stay in
    step as long as their budgets and exactness are equal and they add and remove the same jobs in the same order
    between the same micro-batches.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        forward: Forward | None = None,
        capacity: int | None = 2048,
        checkpointing: Checkpointing = "none",
        budget_bytes: int | None = None,
        exactness: Exactness | None = None,
        rank: int = 0,
        ranks: int = 1,
        all_reduce: AllReduce | None = None,
    ) -> None:
        assert ranks == 1 or all_reduce is not None
        self.base = base
        self.forward = forward or open_forward(base)
        self.live: dict[str, LiveJob] = {}
        self.planner = MemoryPlanner(base, self.forward.name, capacity, checkpointing, budget_bytes)
        self.exactness = exactness or self.forward.exactness()
        self._rank, self._ranks, self._all_reduce = rank, ranks, all_reduce
        # Every rank's, so that this one knows when a job is complete.
        self._queues = [FairQueue() for _ in range(ranks)]
        self._prefetched: _MicroBatchPlan | None = None
        self._prepared = WeakSet[PreparedJob]()  # and not admitted, as far as somebody still wants to

    def add(self, job: EngineJob, checkpoint: bytes | None = None) -> LiveJob:
        """Take a job in, from the start or from a `LiveJob.snapshot` that was dumped: `prepare` and `admit` in one."""
        return self.admit(self.prepare(job, checkpoint))

    def prepare(self, job: EngineJob, checkpoint: bytes | None = None) -> PreparedJob:
        """Everything that a job needs to be taken in. It may be done on a thread of its own, so that those who train
        are held up by `admit` alone. Their plan is one without it, so nothing of it lies on the device yet; on a GPU,
        its kernels are compiled (`warmup.py`). Where the device is the host, its weights and what it has of a
        checkpoint do, in the room for one that is written.

        Raises:
            ValueError: the target modules match nothing, the job lacks examples, the checkpoint is another job's, or
                such an adapter cannot take the path of this engine.
            DoesNotFitError: training does not fit into memory with it; NoRoomBesideError: but would without the others.
        """
        if problems := job.problems():
            raise ValueError("; ".join(problems))
        if problems := self.forward.problems(job.lora):
            raise LoraConfigError(problems)
        modules = self.forward.modules
        beside = [live.job for live in list(self.live.values())]
        try:
            plan = self.planner.plan([*beside, job])
        except DoesNotFitError as error:
            self.planner.plan([job])
            raise NoRoomBesideError(*error.args) from error
        if job.init_adapter is None:
            start = init_adapter(modules, job.lora, job.train.seed)
        else:
            start = continued_adapter(modules, job.lora, job.init_adapter)
        waiting = {prepared.job.name: prepared.job for prepared in self._prepared}
        self.planner.prefetch_plans([*({other.name: other for other in beside} | waiting | {job.name: job}).values()])
        state = HostState(start, self.base.model.dtype, pinned=self.base.device.type == "cuda")
        prepared = PreparedJob(job, state, start if job.has_reference_adapter else None)
        if checkpoint is not None:
            prepared.restore(checkpoint)
        others = [live.adapter for live in list(self.live.values())]
        others += [other.state.trained.adapter for other in self._prepared]
        self.forward.warm_up(start, others, (plan or self.planner).checkpointing)
        self._prepared.add(prepared)
        return prepared

    def admit(self, prepared: PreparedJob) -> LiveJob:
        """Let a prepared job train from the next micro-batch on: first there is room for its vectors, then they are.

        Raises:
            NoRoomBesideError: it does not fit into memory beside those that came in meanwhile.
        """
        job, base = prepared.job, self.base
        self._prefetched = None  # capacity may change even where the job does not come in
        try:
            self.planner.fit([*(live.job for live in self.live.values()), job])
        except DoesNotFitError as error:
            if not self.live:
                raise
            raise NoRoomBesideError(*error.args) from error
        try:
            optimizer = FlatAdamW(prepared.state, job.train, base.device, base.model.dtype)
            reference = None if prepared.reference is None else self.forward.load(prepared.reference)
            live = LiveJob(job, optimizer, self.forward.bind(optimizer.adapter), reference, prepared.progress)
            if live.pairs is not None and prepared.reference_scores is not None:
                live.pairs.reference.copy_(prepared.reference_scores)
        except Exception:  # as the other ranks will, that let the job go again
            self._fit_again()
            raise
        self.live[job.name] = live
        return live

    def remove(self, name: str) -> None:
        """Let a job go; its memory is free once the caller drops its `LiveJob`.

        Those that stay fitted in beside it. Should the prediction for them alone come out higher, as the dry runs
        differ, they go on as they did: a job that leaves is never a reason for the others to stop.
        """
        del self.live[name]
        self._prefetched = None  # which holds the job's memory, too
        for queue in self._queues:
            queue.drop(name)
        self._fit_again()

    def _fit_again(self) -> None:
        with suppress(DoesNotFitError):
            self.planner.fit([live.job for live in self.live.values()])

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
        self._compute_micro_batch()
        complete = [live for live in jobs if not any(live.job.name in queue for queue in self._queues)]
        outcomes: dict[str, StepOutcome | JobDiverged | None] = {}
        for live in complete:
            if live.phase == "evaluate":
                outcomes[live.job.name] = self._evaluated(live)
            elif live.phase == "score":
                self._score(live)
                outcomes[live.job.name] = None
        outcomes |= self.optim_step([live for live in complete if live.job.name not in outcomes])
        return {
            live.job.name: outcome
            for live in complete
            if isinstance(outcome := outcomes[live.job.name], JobDiverged)
            or (outcome is not None and not live.evaluation_due)
        }

    def _next_steps(self, stepping: Collection[str] = ()) -> dict[str, NextStep]:
        """Those of the jobs that are not done; of `stepping` the ones after the step that is under way."""
        jobs = self.live.items()
        steps = {name: live.following_step if name in stepping else live.next_step for name, live in jobs}
        return {name: step for name, step in steps.items() if step is not None}

    def _plan_micro_batch(self, next_steps: dict[str, NextStep]) -> _MicroBatchPlan:
        """What all ranks do next where these are the jobs' next steps; it changes nothing of the engine."""
        queues = [queue.copy() for queue in self._queues]
        for name, next_step in next_steps.items():
            if not any(name in queue for queue in queues):
                for rank, queue in enumerate(queues):
                    chunks = self.live[name].chunks(next_step, rank, self._ranks, self.exactness.pad_to_multiple_of)
                    queue.put(name, chunks, training=next_step.phase == "train")
        taken = [queue.take(self.planner.capacity) for queue in queues]
        chunks, training = taken[self._rank]  # the other ranks may have some where this one has none
        chunks.sort(key=lambda chunk: chunk.job)  # those of one job lie side by side
        parts = [chunks] if self.exactness.joined else [[chunk] for chunk in chunks]
        return _MicroBatchPlan(next_steps, queues, [self.ready(part) for part in parts if part], training)

    def _compute_micro_batch(self) -> None:
        """This rank's share of the next micro-batch: the prefetched one, if the jobs went on as it expected."""
        next_steps, plan, self._prefetched = self._next_steps(), self._prefetched, None
        if plan is None or plan.next_steps != next_steps:
            plan = self._plan_micro_batch(next_steps)
        self._queues = plan.queues
        for batch in plan.batches:
            (self.forward_backward if plan.training else self.evaluate)(batch)

    def ready(self, chunks: Sequence[Chunk]) -> ReadyBatch:
        """Make all that `forward_backward` or `evaluate` takes of chunks, before the first kernel."""
        packed = pack(chunks, self.forward.device)
        bounds = [self.live[chunk.job].bound_of(chunk) for chunk in chunks]
        keys = [self.live[chunk.job].dropout_keys(chunk) for chunk in packed.chunks]
        return ReadyBatch(chunks, packed, self.forward.ready(packed, bounds, keys))

    def forward_backward(self, batch: ReadyBatch) -> None:
        """Add every chunk's loss and gradient to its job; the loss of pairs is there since they were scored."""
        assert all(chunk.step is not None for chunk in batch.chunks)
        losses = self.forward.forward_backward(batch.ready, self.planner.checkpointing, self._weights(batch.chunks))
        for chunk, loss in zip(batch.packed.chunks, losses, strict=True):
            live = self.live[chunk.job]
            if live.pairs is None:
                live.optimizer.add_loss(loss, chunk.labels.numel())

    def _weights(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """`[chunks]`, 1 for those that are of no pair; None where none is."""
        pairs = [self.live[chunk.job].pairs for chunk in chunks]
        if not any(pairs):
            return None
        one = torch.ones((), dtype=torch.float64, device=self.forward.device)
        of_chunks = zip(chunks, pairs, strict=True)
        return torch.stack([one if of_job is None else of_job.weight_of(chunk) for chunk, of_job in of_chunks])

    def evaluate(self, batch: ReadyBatch) -> None:
        """Add every chunk's loss and number of correct labels to its job's evaluation, or to its pairs' scores."""
        losses, correct = self.forward.evaluate(batch.ready)
        for chunk, packed, *scores in zip(batch.chunks, batch.packed.chunks, losses, correct, strict=True):
            self.live[chunk.job].add_scores(chunk, scores, packed.labels.numel())

    def optim_step(self, complete: Sequence[LiveJob]) -> dict[str, StepOutcome | JobDiverged]:
        """One optimizer step of each, by all ranks together. The device answers once for all of them; while it still
        computes, the next micro-batch is prefetched as if all go on: it takes none of the time after the answer, when
        a GPU has nothing to do. If that fails or a rank is lost meanwhile, some have stepped and are not counted: the
        engine is then of no more use.
        """
        outcomes: dict[str, StepOutcome | JobDiverged] = {}
        queued: dict[str, Tensor] = {}
        for live in complete:
            job, step = live.job, live.progress.step
            try:
                rate = learning_rate(job.train, step, job.steps)
                queued[job.name] = live.optimizer.queue_step(rate, self._all_reduce, step == job.gradient_check_step)
            except NoGradientError as error:
                outcomes[job.name] = JobDiverged(job.name, step + 1, str(error))
        if not queued:
            return outcomes
        sums = torch.stack([*queued.values()])
        self._prefetched = self._plan_micro_batch(self._next_steps(queued))
        for name, of_job in zip(queued, sums.tolist(), strict=True):
            outcomes[name] = self._stepped(self.live[name], *of_job)
        return outcomes

    def _stepped(self, live: LiveJob, loss_sum: float, tokens: float, norm: float) -> StepOutcome | JobDiverged:
        job, progress = live.job, live.progress
        outcome = live.outcome(loss_sum, tokens, norm)
        if not outcome.is_finite:
            return JobDiverged(job.name, progress.step + 1)
        indices = job.examples_of(progress.step)
        vocabulary = self.base.model.config.get_text_config().vocab_size
        progress.stepped(outcome, sum(len(job.examples[index].ids) for index in indices), vocabulary)
        return outcome if progress.diverged is None else JobDiverged(job.name, progress.step, progress.diverged)

    def _score(self, live: LiveJob) -> None:
        """The end of scoring a step's pairs, by all ranks together."""
        if self._all_reduce is not None:
            self._all_reduce(live.shares)
        live.score_step(count=self._rank == 0)

    def _evaluated(self, live: LiveJob) -> StepOutcome | JobDiverged | None:
        """The end of an evaluation, by all ranks together: the outcome of the step before it, if there was one."""
        if self._all_reduce is not None:
            self._all_reduce(live.shares)
        progress, train, evaluation = live.progress, live.job.train, live.evaluation()
        if not math.isfinite(evaluation.loss):
            return JobDiverged(live.job.name, progress.step, VALIDATION_NOT_FINITE)
        patience = train.early_stopping_patience if progress.step < live.job.steps else None
        if progress.evaluated(evaluation, patience) and train.keeps_best:
            live.optimizer.keep_best()
        if live.complete and train.keeps_best:
            live.optimizer.load_best()
        return progress.outcome
