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
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from lora_core.adapter_bank import Adapter, AdapterBank, Run, mix64
from lora_core.adapter_init import continued_adapter, init_adapter
from lora_core.attention import PackedAttention
from lora_core.base_model import BaseModel
from lora_core.config import LoraConfig, TrainConfig
from lora_core.dataset import Example
from lora_core.loss import chunk_losses
from lora_core.optim import AllReduce, FlatAdamW, NoGradientError, StepOutcome, learning_rate
from lora_core.packing import Chunk, PackedBatch, PackedChunk, cut_into_chunks, micro_batches, pack

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

    def digest(self) -> str:
        """What a checkpoint must agree on to be continued: the adapter's and training's configuration, where it starts,
        and every example.
        """
        digest = hashlib.sha256(f"{self.lora.model_dump_json()}{self.train.model_dump_json()}".encode())
        for example in self.examples:
            digest.update(array("q", [len(example.ids), *example.ids]).tobytes() + bytes(example.labels_mask))
        if self.init_adapter is not None:
            start = self.init_adapter
            for name, weight in (*start.a.items(), *start.b.items(), *start.magnitude.items()):
                digest.update(f"{name} {start.scale[name]}".encode() + weight.cpu().numpy().tobytes())
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
            max(CHUNK_TOKENS, self.job.train.max_seq_len),
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

    def add(self, job: EngineJob, checkpoint: bytes | None = None) -> LiveJob:
        """Take a job in, from the start or from `LiveJob.checkpoint`.

        Raises:
            ValueError: the target modules match nothing, the job has no examples, or the checkpoint is another job's.
        """
        if not job.examples:
            raise ValueError(f"{job.name} has no examples to train on")
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
        losses = _losses(self.base, self.bank, runs, batch)
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


def _losses(base: BaseModel, bank: AdapterBank, runs: Sequence[Run], batch: PackedBatch) -> Tensor:
    starts = list(accumulate((run.rows for run in runs), initial=0))

    def head(hidden: Tensor, chunk: int, rows: Tensor) -> Tensor:
        run = runs[chunk]
        keys = None if run.dropout_keys is None else run.dropout_keys[rows - starts[chunk]]
        with bank.routed([Run(run.adapter, len(rows), keys)]):
            return base.head(hidden)

    with bank.routed(runs):
        hidden = base.hidden(batch.ids, batch.positions, PackedAttention(batch.lengths))[0]
    labelled = [(chunk.label_rows, chunk.labels) for chunk in batch.chunks]
    return chunk_losses(hidden, head, labelled, bank.head_weights(runs))


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


@lru_cache(maxsize=64)  # one epoch of each job that is live, give or take
def _order(examples: int, seed: int, epoch: int) -> Tensor:
    mixed = int(mix64(mix64(torch.tensor(seed)) + epoch))
    return torch.randperm(examples, generator=torch.Generator().manual_seed(mixed & (2**63 - 1)))
