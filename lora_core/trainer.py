"""Train many adapters on one frozen base. `TrainEngine.step` is one optimizer step of every live job.

    for job in jobs:                  its examples of this step, this rank's share, cut into chunks
    for batch in micro_batches:       forward_backward(batch): chunks of several jobs side by side, gradients by job
    for job in jobs:                  optim_step(job): one all-reduce of (gradient, loss, tokens), divide, clip, AdamW

Each job has its own step count, data order, schedule, clipping, dropout stream and optimizer; a neighbour that joins,
leaves or diverges changes nothing (DESIGN rule 4).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from array import array
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lora_core.adapter_bank import Adapter, AdapterBank, Run, mix64
from lora_core.adapter_init import continued_adapter, init_adapter
from lora_core.base_model import BaseModel
from lora_core.checkpointing import Checkpointing, recomputed_layers
from lora_core.config import LoraConfig, TrainConfig
from lora_core.dataset import Example
from lora_core.loss import batch_losses
from lora_core.memory import available_bytes, predictor, return_freed_memory
from lora_core.optim import AllReduce, FlatAdamW, NoGradientError, StepOutcome, learning_rate
from lora_core.packing import Chunk, PackedBatch, PackedChunk, cut_into_chunks, micro_batches, pack

log = logging.getLogger("lora.engine")

CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class EngineJob:
    """What to train: a name that is unique in the engine, the adapter, how, and the examples (all of them, on every
    rank). With `init_adapter` training starts from what that adapter computes (see `continued_adapter`).
    """

    name: str
    lora: LoraConfig
    train: TrainConfig
    examples: Sequence[Example]
    init_adapter: Adapter | None = None

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes what is left; its loss is divided by its own tokens, so it is no special
        case.
        """
        return math.ceil(len(self.examples) / self.train.batch_size)

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.train.epochs

    def examples_of(self, step: int) -> list[int]:
        """Indices of the examples of one optimizer step: a fresh permutation every epoch, known from (seed, epoch)
        alone.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _order(len(self.examples), self.train.seed, epoch)
        indices: list[int] = order[within * self.train.batch_size : (within + 1) * self.train.batch_size].tolist()
        return indices

    @property
    def chunk_limit(self) -> int:
        """Tokens of a chunk. It depends on the job alone, whatever fits into a micro-batch (see `packing.py`)."""
        return max(CHUNK_TOKENS, self.train.max_seq_len)

    @property
    def largest_chunk(self) -> int:
        """Tokens that no chunk of any step exceeds."""
        lengths = sorted((len(example.ids) for example in self.examples), reverse=True)
        return max(lengths[0], min(self.chunk_limit, sum(lengths[: self.train.batch_size])))

    def digest(self) -> str:
        """What a checkpoint must agree on to be continued: the adapter's and training's configuration, where it starts,
        and every example.
        """
        digest = hashlib.sha256(f"{self.lora.model_dump_json()}{self.train.model_dump_json()}".encode())
        for example in self.examples:
            digest.update(array("q", [len(example.ids), *example.ids]).tobytes() + bytes(example.labels_mask))
        if self.init_adapter is not None:
            given = self.init_adapter
            for name, weight in (*given.a.items(), *given.b.items(), *given.magnitude.items()):
                digest.update(f"{name} {given.scale[name]}".encode() + weight.cpu().numpy().tobytes())
        return digest.hexdigest()


@dataclass
class Progress:
    """Where a job stands. `tokens` and `supervised_tokens` count over all ranks and steps."""

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    first_loss: float = math.nan
    loss: float = math.nan


NOT_FINITE = "the loss or its gradient was not finite: lower learning_rate, or look at the rows of that step"


class JobDiverged(ValueError):  # noqa: N818 - the outcome of a step before it is an error
    """A job that cannot go on. Its adapter is as it was before that step."""

    def __init__(self, job: str, step: int, reason: str = NOT_FINITE) -> None:
        super().__init__(job, step, reason)
        self.job, self.step, self.reason = job, step, reason

    def __str__(self) -> str:
        return f"step {self.step}: {self.reason}"


class LiveJob:
    """A job in training: its optimizer, its adapter's weights and its progress."""

    def __init__(self, job: EngineJob, optimizer: FlatAdamW) -> None:
        self.job = job
        self.optimizer = optimizer
        self.progress = Progress()
        self.digest = job.digest()

    @property
    def adapter(self) -> Adapter:
        return self.optimizer.adapter

    @property
    def done(self) -> bool:
        return self.progress.step >= self.job.steps

    def chunks(self, rank: int, ranks: int) -> list[Chunk]:
        """This rank's share of the next step: every `ranks`-th example of it."""
        places = list(enumerate(self.job.examples_of(self.progress.step)))[rank::ranks]
        return cut_into_chunks(
            self.job.name,
            ((place, self.job.examples[index]) for place, index in places),
            self.job.chunk_limit,
        )

    def dropout_keys(self, chunk: PackedChunk) -> Tensor | None:
        """int64 [rows]: a hash of (job seed, step, example in the step, token in the document)."""
        if self.job.lora.lora_dropout == 0:
            return None
        seed = torch.tensor([self.job.train.seed], dtype=torch.int64, device=chunk.row_tokens.device)
        return mix64(mix64(mix64(mix64(seed) + self.progress.step) + chunk.row_examples) + chunk.row_tokens)

    def checkpoint(self) -> bytes:
        """Everything that `TrainEngine.add` needs to continue exactly."""
        return self.optimizer.dump({"job": self.digest, "progress": json.dumps(asdict(self.progress))})

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
        self.progress = Progress(**json.loads(str(counters["progress"])))


class TrainEngine:
    """One rank's training of any number of jobs on one base.

    `all_reduce` sums a tensor over the ranks in place (None: one rank). `capacity` is the tokens of one micro-batch.
    `checkpointing` "full" keeps the inputs of decoder layers alone and computes the rest twice. Where `capacity` is
    None, both are chosen whenever a job joins or leaves, so that training fits into `budget_bytes` (None: what this
    machine can give now).
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        capacity: int | None = 2048,
        checkpointing: Checkpointing = "none",
        budget_bytes: int | None = None,
        rank: int = 0,
        ranks: int = 1,
        all_reduce: AllReduce | None = None,
    ) -> None:
        assert ranks == 1 or all_reduce is not None
        self.base = base
        self.bank = AdapterBank(base.model)
        self.live: dict[str, LiveJob] = {}
        self._capacity, self._checkpointing = capacity or 0, checkpointing
        self._budget = None if capacity else budget_bytes or available_bytes(base.device)
        if self._budget is not None:
            self._predictor = predictor(base.model.config, base.model.dtype, base.device.type)
        self._rank, self._ranks, self._all_reduce = rank, ranks, all_reduce

    def add(self, job: EngineJob, checkpoint: bytes | None = None) -> LiveJob:
        """Take a job in, from the start or from `LiveJob.checkpoint`.

        Raises:
            ValueError: the target modules match nothing, the job has no examples, the checkpoint is another job's, or
                training would not fit into memory with it.
        """
        if not job.examples:
            raise ValueError(f"{job.name} has no examples to train on")
        if job.init_adapter is None:
            start = init_adapter(self.bank, job.lora, job.train.seed)
        else:
            start = continued_adapter(self.bank, job.lora, job.init_adapter)
        self._fit([*(live.job for live in self.live.values()), job])
        live = LiveJob(job, FlatAdamW(start, job.train, self.base.device, self.base.model.dtype))
        if checkpoint is not None:
            live.restore(checkpoint)
        self.live[job.name] = live
        return live

    def remove(self, name: str) -> None:
        """Let a job go; its memory is free once the caller drops its `LiveJob`."""
        del self.live[name]
        self._fit([live.job for live in self.live.values()])

    def _fit(self, jobs: Sequence[EngineJob]) -> None:
        """Choose capacity and checkpointing for these jobs, if they are to be chosen."""
        if self._budget is None or not jobs:
            return
        longest = max(len(example.ids) for job in jobs for example in job.examples)
        smallest = max(job.largest_chunk for job in jobs)
        plan = self._predictor.fit(self._budget, [job.lora for job in jobs], longest, smallest)
        self._capacity, self._checkpointing = plan.capacity, plan.checkpointing
        if plan.exact_heap and self.base.device.type == "cpu":
            return_freed_memory()
        log.info(
            "event=planned jobs=%d capacity=%d checkpointing=%s predicted=%.2fGB budget=%.2fGB",
            len(jobs),
            plan.capacity,
            plan.checkpointing,
            plan.predicted_bytes / 1e9,
            self._budget / 1e9,
        )

    def step(self) -> dict[str, StepOutcome | JobDiverged]:
        """One optimizer step of every live job that is not done. A job that cannot go on is returned as its error; the
        others went on.
        """
        jobs = [live for live in self.live.values() if not live.done]
        for chunks in micro_batches([live.chunks(self._rank, self._ranks) for live in jobs], self._capacity):
            self.forward_backward(pack(chunks, self.base.device))
        return {live.job.name: self.optim_step(live) for live in jobs}

    def forward_backward(self, batch: PackedBatch) -> None:
        """Add every chunk's loss and gradient to its job."""
        runs = [
            Run(self.live[chunk.job].adapter, chunk.rows, self.live[chunk.job].dropout_keys(chunk))
            for chunk in batch.chunks
        ]
        with recomputed_layers(self.base.model, self.bank) if self._checkpointing == "full" else nullcontext():
            losses = batch_losses(self.base, self.bank, runs, batch)
        losses.sum().backward()
        for chunk, loss in zip(batch.chunks, losses.detach(), strict=True):
            self.live[chunk.job].optimizer.add_loss(loss, chunk.labels.numel())

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
        progress.step += 1
        progress.tokens += sum(len(job.examples[index].ids) for index in indices)
        progress.supervised_tokens += outcome.tokens
        if outcome.tokens:
            progress.loss = outcome.loss
            if math.isnan(progress.first_loss):
                progress.first_loss = outcome.loss
        return outcome


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
        losses.append(float(batch_losses(base, bank, [Run(adapter, batch.chunks[0].rows)], batch)[0]))
    return losses


@lru_cache(maxsize=64)  # one epoch of each job that is live, give or take
def _order(examples: int, seed: int, epoch: int) -> Tensor:
    mixed = int(mix64(mix64(torch.tensor(seed)) + epoch))
    return torch.randperm(examples, generator=torch.Generator().manual_seed(mixed & (2**63 - 1)))
