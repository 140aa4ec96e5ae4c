"""This project's engine on random documents, as both training benchmarks drive it."""

from __future__ import annotations

import functools

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_core.base_model import BaseModel, placed
from lora_core.config import LoraConfig, TrainConfig
from lora_core.dataset import Example
from lora_core.engine_job import EngineJob
from lora_core.trainer import TrainEngine
from tests.bench.report import Step

PLAIN = LoraConfig()


def random_documents(count: int, tokens: int, vocabulary: int, seed: int = 0) -> list[Example]:
    """Random tokens, all but the first supervised."""
    ids = torch.randint(0, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Example(row, [False] + [True] * (tokens - 1)) for row in ids]


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
    return EngineJob(name, lora, train, random_documents(documents, tokens, vocabulary, seed))


def set_jobs(engine: TrainEngine, jobs: int, documents: int, tokens: int, lora: LoraConfig = PLAIN) -> None:
    """Let the live jobs go and take in `jobs` fresh ones of `documents` documents each."""
    for name in list(engine.live):
        engine.remove(name)
    for number in range(jobs):
        vocabulary = engine.base.model.config.vocab_size
        engine.add(bench_job(f"job{number}", documents, tokens, vocabulary, number, lora))


def checked_step(engine: TrainEngine) -> None:
    """One step of every job; raises where one could not go on, since a step that gave up is no measurement."""
    left = len(engine.live)
    while left > 0:
        outcomes = engine.step()
        left -= len(outcomes)  # the jobs are alike, so that fair shares let none do two before all have done one
        for outcome in outcomes.values():
            if isinstance(outcome, Exception):
                raise outcome


def session_step(engine: TrainEngine, jobs: int, documents: int, tokens: int, lora: LoraConfig = PLAIN) -> Step:
    """A step of the engine with these jobs and no others."""
    set_jobs(engine, jobs, documents, tokens, lora)
    return functools.partial(checked_step, engine)
