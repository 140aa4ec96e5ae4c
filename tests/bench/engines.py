"""This project's engine on random documents, as both training benchmarks drive it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_core.config import LoraConfig, TrainConfig
from lora_core.data.dataset import Example
from lora_core.data.packing import PAD_TO_MULTIPLE_OF
from lora_core.models.base import BaseModel, placed
from lora_core.training.engine import ReadyBatch, TrainEngine
from lora_core.training.job import EngineJob, JobDiverged
from lora_core.training.optimizer import StepOutcome
from tests.bench.report import Step

PLAIN = LoraConfig()


class CountingEngine(TrainEngine):
    """Counts what it trains on: where jobs are unlike, it depends on their turns how much that is."""

    tokens = 0

    def forward_backward(self, batch: ReadyBatch) -> None:
        """Count the tokens of this batch's documents, which are longer than the padding between them."""
        self.tokens += sum(length for length in batch.packed.lengths if length >= PAD_TO_MULTIPLE_OF)
        super().forward_backward(batch)


def random_documents(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[Example]:
    """Random tokens, all but the first of each document supervised."""
    ids = torch.randint(0, vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return [Example(row.tolist(), [False] + [True] * (len(row) - 1)) for row in ids.split(list(lengths))]


def base_of(model: PreTrainedModel, precision: str) -> BaseModel:
    """A random bf16 model as the engine takes it."""
    return placed(
        BaseModel(model, PreTrainedTokenizerBase(), "random", "0" * 64, precision, model.device), model.device
    )


def bench_job(
    name: str, documents: int, tokens: int, vocabulary: int, seed: int = 0, lora: LoraConfig = PLAIN
) -> EngineJob:
    """A job that takes all its documents in every step and does not end."""
    train = TrainConfig(batch_size=documents, epochs=1_000_000, max_seq_len=tokens, seed=seed)
    return EngineJob(name, lora, train, random_documents([tokens] * documents, vocabulary, seed))


def set_jobs(engine: TrainEngine, jobs: int, documents: int, tokens: int, lora: LoraConfig = PLAIN) -> None:
    """Let the live jobs go and take in `jobs` fresh ones of `documents` documents each."""
    vocabulary = engine.base.model.config.vocab_size
    fresh = (bench_job(f"job{number}", documents, tokens, vocabulary, number, lora) for number in range(jobs))
    replace_jobs(engine, fresh)


def replace_jobs(engine: TrainEngine, jobs: Iterable[EngineJob]) -> None:
    """Let the live jobs go and take in these."""
    for name in list(engine.live):
        engine.remove(name)
    for job in jobs:
        engine.add(job)


def checked_step(engine: TrainEngine) -> None:
    """One step of every job; raises where one could not go on, since a step that gave up is no measurement."""
    left = len(engine.live)
    while left > 0:
        outcomes = engine.step()
        left -= len(outcomes)  # the jobs are alike, so that fair shares let none do two before all have done one
        raise_failed(outcomes)


def raise_failed(outcomes: Mapping[str, StepOutcome | JobDiverged]) -> None:
    """The first error among them, if there is one."""
    for outcome in outcomes.values():
        if isinstance(outcome, Exception):
            raise outcome


def session_step(engine: TrainEngine, jobs: int, documents: int, tokens: int, lora: LoraConfig = PLAIN) -> Step:
    """A step of the engine with these jobs and no others."""
    set_jobs(engine, jobs, documents, tokens, lora)
    return functools.partial(checked_step, engine)
