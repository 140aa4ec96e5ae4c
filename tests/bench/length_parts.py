"""The parts of `train_gpu` in which documents differ in length, or steps do: PEFT's side and this engine's.

PEFT has one job at a time, so that its rows are those of eight jobs in turn, too.
"""

from __future__ import annotations

import functools

import torch

from lora_core.config import LoraConfig, TrainConfig
from lora_core.training.job import EngineJob
from tests.bench.engines import CountingEngine, raise_failed, random_documents, replace_jobs, session_step
from tests.bench.gpu_parts import STEP_TOKENS, fresh_engine
from tests.bench.peers import SHAPES, padded_steps, random_llama, settings, stock_step, with_peft
from tests.bench.report import OURS, PEFT, Conditions, Report, Row, Timing, free_memory, measure, peak_gib, seconds_of

MEDIAN, SPREAD, SHORTEST = 250, 0.8, 16
"""Tokens of a document: MEDIAN * exp(SPREAD * N(0, 1)), no fewer than SHORTEST and no more than `--tokens`."""

BATCH = 8
"""Documents of a step of one job, as is the default here and in transformers' Trainer."""

PEFT_BATCHES, STRIDE = 64, 8
"""Batches that are drawn for PEFT, and of how many one is measured: sorted ones, too, are then of all lengths."""

PASS_TOKENS = 4 * STEP_TOKENS
AT_ONCE = {True: 8, False: 4}
"""Documents of 1,024 that PEFT is fastest with on 80 GB, with checkpointing and without; it accumulates over more."""


def peft_mixed(report: Report, conditions: Conditions) -> None:
    """Each row is a step on each of a few padded batches, of the same documents as they come and sorted by length."""
    model = with_peft(random_llama(conditions.shape, conditions.device))
    lengths = _lengths(PEFT_BATCHES * BATCH, conditions.tokens, seed=0)
    for setting, _, autocast in settings(model):
        for order, documents in (("", lengths), (", sorted", sorted(lengths))):
            batches = [documents[at : at + BATCH] for at in range(0, len(documents), BATCH)][STRIDE // 2 :: STRIDE]
            make_step = functools.partial(padded_steps, model, batches, conditions.device, autocast=autocast)
            case, tokens = f"mixed, peft{setting}{order}", sum(map(sum, batches))
            measure(report, conditions, case, PEFT, "mixed", tokens, make_step)


def mixed(report: Report, conditions: Conditions, precision: str) -> None:
    """One job and eight of BATCH documents a step. They step at times of their own, so that micro-batches are timed,
    and the tokens counted that they had.
    """
    engine = fresh_engine(conditions, precision)
    for jobs in (1, 8):
        replace_jobs(engine, (_mixed_job(seed, conditions) for seed in range(jobs)))
        free_memory()
        passes = [_pass(engine, conditions.device) for _ in range(conditions.warm + conditions.timed)]
        by_rate = sorted(passes[conditions.warm :], key=lambda one: one[0] / one[1])
        tokens, seconds = by_rate[len(by_rate) // 2]
        case, timing = f"mixed, ours, {precision}, {jobs} x {BATCH}", Timing(passes[0][1], seconds)
        report.add(Row(case, OURS, "mixed", tokens, timing, peak_gib(conditions.device)))


def _lengths(count: int, longest: int, seed: int) -> list[int]:
    drawn = MEDIAN * (SPREAD * torch.randn(count, generator=torch.Generator().manual_seed(seed))).exp()
    lengths: list[int] = drawn.round().int().clamp(SHORTEST, longest).tolist()
    return lengths


def _mixed_job(seed: int, conditions: Conditions) -> EngineJob:
    train = TrainConfig(
        batch_size=BATCH,
        epochs=1_000_000,
        max_seq_len=conditions.tokens,
        seed=seed,
        lr_scheduler="constant",
        warmup_ratio=0,
    )
    lengths = _lengths(8 * BATCH, conditions.tokens, seed)
    examples = random_documents(lengths, SHAPES[conditions.shape]["vocab_size"], seed)
    return EngineJob(f"job{seed}", LoraConfig(), train, examples)


def _pass(engine: CountingEngine, device: torch.device) -> tuple[int, float]:
    """Tokens and seconds of a few micro-batches."""
    before = engine.tokens

    def micro_batches() -> None:
        while engine.tokens < before + PASS_TOKENS:
            raise_failed(engine.micro_batch())

    seconds = seconds_of(micro_batches, device)
    return engine.tokens - before, seconds


def peft_curve(report: Report, conditions: Conditions) -> None:
    """One job at a time, in each setting at each size."""
    model = with_peft(random_llama(conditions.shape, conditions.device))
    vocabulary = SHAPES[conditions.shape]["vocab_size"]
    for setting, checkpointing, autocast in settings(model):
        for documents, tokens in _sizes(conditions):
            ids = torch.randint(0, vocabulary, (documents, tokens), device=conditions.device)
            at_once = AT_ONCE[checkpointing]
            make_step = functools.partial(stock_step, model, ids, autocast=autocast, at_once=at_once)
            case, workload = f"curve, peft{setting}, {documents} x {tokens}", _curve(ids.numel())
            measure(report, conditions, case, PEFT, workload, ids.numel(), make_step)


def curve(report: Report, conditions: Conditions, precision: str) -> None:
    """Eight jobs together and one at a time, at each size; and how many times as fast together is."""
    engine = fresh_engine(conditions, precision)
    for documents, tokens in _sizes(conditions):
        size, rates = documents * tokens, []
        for jobs in (1, 8):
            case = f"curve, ours, {precision}, {jobs} x {documents} x {tokens}"
            make_step = functools.partial(session_step, engine, jobs, documents, tokens)
            if measure(report, conditions, case, OURS, _curve(size), jobs * size, make_step):
                rates.append(report.rows[-1].rate)
        if len(rates) == 2:
            report.figure(f"{precision}: together over in turn, {size} tokens a job and step", rates[1] / rates[0])


def _curve(tokens: int) -> str:
    return f"curve, {tokens} a job and step"


def _sizes(conditions: Conditions) -> list[tuple[int, int]]:
    """(documents, tokens of each) of a job's step."""
    tokens = conditions.tokens
    return [(1, tokens // 4), (1, tokens), (4, tokens), (16, tokens)]
