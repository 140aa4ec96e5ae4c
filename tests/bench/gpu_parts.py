"""The parts of `train_gpu` that measure this engine, each on a base and an engine of its own."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile

import torch
from torch._dynamo.utils import counters

from lora_core.attention import ATTENTION_NAME
from lora_core.trainer import EngineJob, LiveJob, StepOutcome, TrainEngine
from tests.bench.engines import base_of, bench_job, checked_step, set_jobs
from tests.bench.peers import SHAPES, random_llama
from tests.bench.report import MANY_JOBS, ONE_JOB, OURS, Conditions, Report, Row, Timing, measure, seconds_of

STEP_TOKENS = 8192
SWEEP = (1, 2, 4, 8, 16, 32)
SWAPS = 5


def one_and_eight_jobs(report: Report, conditions: Conditions, precision: str) -> None:
    """A step of 8,192 tokens of one job, and of eight (where documents are longer than 1,024, each has one)."""
    engine = _engine(conditions, precision)
    for jobs, workload in ((1, ONE_JOB), (8, MANY_JOBS)):
        documents = _documents(jobs, conditions.tokens)
        case = f"ours, {precision}, {jobs} x {documents} x {conditions.tokens}"
        report.attempt(case, functools.partial(_jobs_row, report, conditions, engine, case, workload, jobs, documents))


def _jobs_row(
    report: Report,
    conditions: Conditions,
    engine: TrainEngine,
    case: str,
    workload: str,
    jobs: int,
    documents: int,
) -> None:
    set_jobs(engine, jobs, documents, conditions.tokens)
    tokens = jobs * documents * conditions.tokens
    measure(report, conditions, case, OURS, workload, tokens, functools.partial(checked_step, engine))


def sweep(report: Report, conditions: Conditions, precision: str) -> None:
    """The same documents whoever they belong to, short enough that each of 32 jobs has one."""
    engine = _engine(conditions, precision)
    tokens = STEP_TOKENS // SWEEP[-1]
    bare: dict[int, float] = {}
    whole: dict[int, float] = {}
    for jobs in SWEEP:
        documents = SWEEP[-1] // jobs
        set_jobs(engine, jobs, documents, tokens)
        case = f"sweep, {precision}, {jobs} x {documents} x {tokens}"
        row = measure(report, conditions, case, OURS, "sweep", STEP_TOKENS, functools.partial(checked_step, engine))
        split = [_split_step(engine, conditions.device) for _ in range(conditions.timed)]
        without = Timing(row.timing.first, statistics.median(step - optimizer for step, optimizer in split))
        report.add(Row(f"{case}, no optimizer", OURS, "sweep", STEP_TOKENS, without))
        whole[jobs], bare[jobs] = row.timing.median, without.median
    for name, seconds in (("with", whole), ("without", bare)):
        lost = 100 * (1 - seconds[1] / seconds[SWEEP[-1]])
        report.figure(f"{precision}: % lost at 32 jobs, {name} optimizer", lost)


def _split_step(engine: TrainEngine, device: torch.device) -> tuple[float, float]:
    """Seconds of a step, and of those the optimizer's of all jobs (each waits for the device in any case)."""
    optim_step = engine.optim_step
    taken: list[float] = []

    def timed(live: LiveJob) -> StepOutcome | Exception:
        outcomes: list[StepOutcome | Exception] = []
        taken.append(seconds_of(lambda: outcomes.append(optim_step(live)), device))
        return outcomes[0]

    engine.optim_step = timed  # type: ignore[method-assign]
    try:
        whole = seconds_of(lambda: checked_step(engine), device)
    finally:
        del engine.optim_step
    assert taken, "the engine's step went past optim_step, so its time is not known"
    return whole, sum(taken)


def swap(report: Report, conditions: Conditions, precision: str) -> None:
    """What a swap and the step after it take beyond a step; and how many graphs torch compiled in them."""
    engine = _engine(conditions, precision)
    documents = _documents(8, conditions.tokens)
    set_jobs(engine, 8, documents, conditions.tokens)
    case = f"swap, {precision}: the session of 8 x {documents} x {conditions.tokens}"
    tokens = 8 * documents * conditions.tokens
    normal = measure(report, conditions, case, OURS, MANY_JOBS, tokens, functools.partial(checked_step, engine))
    graphs = counters["stats"]["unique_graphs"]
    pauses = []
    for number in range(SWAPS):
        newcomer = bench_job(f"newcomer{number}", documents, conditions.tokens, _vocabulary(conditions), 100 + number)
        leaver = next(iter(engine.live))

        def exchange(leaver: str = leaver, newcomer: EngineJob = newcomer) -> None:
            engine.remove(leaver)
            engine.add(newcomer)
            checked_step(engine)

        pauses.append(1000 * (seconds_of(exchange, conditions.device) - normal.timing.median))
    report.figure(f"{precision}: ms of pause at a swap, median", statistics.median(pauses))
    report.figure(f"{precision}: ms of pause at a swap, longest", max(pauses))
    report.figure(f"{precision}: graphs compiled in {SWAPS} swaps", counters["stats"]["unique_graphs"] - graphs)


def first_step_latency(report: Report, conditions: Conditions, precision: str) -> None:
    """Two processes one after the other, which share caches that are empty at the start."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        command = [sys.executable, "-m", "tests.bench.train_gpu", "--first-step", precision]
        command += ["--shape", conditions.shape, "--tokens", str(conditions.tokens), "--device", conditions.device.type]
        for state in ("cold", "warm"):
            done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the process of the first step ended so: {done.stderr.strip()[-250:]}")
            for name, seconds in json.loads(done.stdout.splitlines()[-1]).items():
                report.figure(f"{precision}: s, {name}, {state} caches", seconds)


def first_steps(conditions: Conditions, precision: str) -> dict[str, float]:
    """Seconds of this process's first steps, of one job and then of eight, the base loaded before."""
    engine = _engine(conditions, precision)
    seconds = {}
    for jobs in (1, 8):
        set_jobs(engine, jobs, _documents(jobs, conditions.tokens), conditions.tokens)
        seconds[f"first step of {jobs}"] = seconds_of(lambda: checked_step(engine), conditions.device)
    return seconds


def _engine(conditions: Conditions, precision: str) -> TrainEngine:
    model = random_llama(conditions.shape, conditions.device, ATTENTION_NAME)
    return TrainEngine(base_of(model, precision), capacity=STEP_TOKENS)


def _documents(jobs: int, tokens: int) -> int:
    """Of each job in a step."""
    return max(1, STEP_TOKENS // (jobs * tokens))


def _vocabulary(conditions: Conditions) -> int:
    vocabulary: int = SHAPES[conditions.shape]["vocab_size"]
    return vocabulary
