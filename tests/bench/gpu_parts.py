"""The parts of `train_gpu` that measure this engine, each on a base and an engine of its own."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from lora_core.adapters.peft_format import adapter_files
from lora_core.config import LoraConfig
from lora_core.data.packing import pack
from lora_core.kernels.transfer import arrival
from lora_core.models.attention import ATTENTION_NAME
from lora_core.models.llama.forward import LlamaForward
from lora_core.models.probes import probe_losses
from lora_core.training.active_job import LiveJob, PreparedJob
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob, JobDiverged
from lora_core.training.optimizer import StepOutcome
from tests.bench.engines import CountingEngine, base_of, bench_job, checked_step, session_step, set_jobs
from tests.bench.peers import SHAPES, random_llama
from tests.bench.report import (
    DORA,
    MANY_JOBS,
    ONE_JOB,
    OURS,
    Conditions,
    Report,
    Row,
    Step,
    Timing,
    free_memory,
    measure,
    peak_gib,
    seconds_of,
    time_steps,
)

STEP_TOKENS = 8192
SWEEP = (1, 2, 4, 8, 16, 32)
MOST_JOBS = 64
SWAPS = 20
FIRST_OF_THEIR_KIND = {
    "r 64": LoraConfig(r=64),
    "DoRA": LoraConfig(use_dora=True),
    "dropout": LoraConfig(lora_dropout=0.05),
}


def one_and_eight_jobs(report: Report, conditions: Conditions, precision: str, dora: bool = False) -> None:
    """A step of 8,192 tokens of one job, and of eight (where documents are longer than 1,024, each has one)."""
    engine = fresh_engine(conditions, precision)
    for jobs, many in ((1, ONE_JOB), (8, MANY_JOBS)):
        documents, workload = _documents(jobs, conditions.tokens), conditions.workload(many, dora)
        case = f"ours, {precision}{DORA * dora}, {jobs} x {documents} x {conditions.tokens}"
        tokens, lora = jobs * documents * conditions.tokens, LoraConfig(use_dora=dora)
        make_step = functools.partial(session_step, engine, jobs, documents, conditions.tokens, lora)
        measure(report, conditions, case, OURS, workload, tokens, make_step)


def overhead(report: Report, conditions: Conditions, precision: str) -> None:
    """What one job takes beyond the frozen model's own forward pass and input gradient, on the same rows."""
    engine = fresh_engine(conditions, precision)
    set_jobs(engine, 1, _documents(1, conditions.tokens), conditions.tokens)
    (live,), forward = engine.live.values(), engine.forward
    assert live.next_step is not None
    packed = pack(live.chunks(live.next_step, 0, 1), conditions.device)
    nobody = [None] * len(packed.chunks)
    batch = forward.ready(packed, nobody, nobody)
    steps: dict[str, Step] = {
        "frozen": functools.partial(forward.forward_backward, batch, "none"),
        "lora": functools.partial(checked_step, engine),
    }
    times = time_steps(steps, warm=conditions.warm, timed=conditions.timed, device=conditions.device)
    for name, timing in times.items():
        report.figure(f"{precision}: ms of a step, {name}", 1000 * timing.median)
    report.figure(f"{precision}: % that lora adds", 100 * (times["lora"].median / times["frozen"].median - 1))


def most_jobs(report: Report, conditions: Conditions, precision: str) -> None:
    """64 live jobs in what memory there is; rows and checkpointing are the engine's choice."""
    model = random_llama(conditions.shape, conditions.device, ATTENTION_NAME)
    engine = TrainEngine(base_of(model, precision), capacity=None)
    tokens = STEP_TOKENS // MOST_JOBS
    make_step = functools.partial(session_step, engine, MOST_JOBS, 1, tokens)
    case = f"ours, {precision}, {MOST_JOBS} x 1 x {tokens}, as memory allows"
    measure(report, conditions, case, OURS, "most jobs", STEP_TOKENS, make_step)
    report.figure(f"{precision}: rows of a micro-batch with {MOST_JOBS} jobs", engine.planner.capacity)


def sweep(report: Report, conditions: Conditions, precision: str) -> None:
    """The same documents whoever they belong to, short enough that each of 32 jobs has one."""
    engine = fresh_engine(conditions, precision)
    tokens = STEP_TOKENS // SWEEP[-1]
    medians: dict[int, tuple[float, float]] = {}
    for jobs in SWEEP:
        documents = SWEEP[-1] // jobs
        set_jobs(engine, jobs, documents, tokens)
        free_memory()
        split = [_split_step(engine, conditions.device) for _ in range(conditions.warm + conditions.timed)]
        timed = split[conditions.warm :]
        whole = statistics.median(step for step, _ in timed)
        bare = statistics.median(bare for _, bare in timed)
        case = f"sweep, {precision}, {jobs} x {documents} x {tokens}"
        for title, median in ((case, whole), (f"{case}, no optimizer", bare)):
            timing = Timing(split[0][0], median)
            report.add(Row(title, OURS, "sweep", STEP_TOKENS, timing, peak_gib(conditions.device)))
        medians[jobs] = (whole, bare)
    for place, name in enumerate(("with", "without")):
        lost = 100 * (1 - medians[SWEEP[0]][place] / medians[SWEEP[-1]][place])
        report.figure(f"{precision}: % lost at {SWEEP[-1]} jobs, {name} optimizer", lost)


def _split_step(engine: TrainEngine, device: torch.device) -> tuple[float, float]:
    """Seconds of a step, and of one without the optimizer's part: of another, since the device has to be waited for
    before that part and after it.
    """
    optim_step = engine.optim_step
    seconds_of_optimizer: list[float] = []

    def timed(complete: Sequence[LiveJob]) -> dict[str, StepOutcome | JobDiverged]:
        outcomes: dict[str, StepOutcome | JobDiverged] = {}
        seconds = seconds_of(lambda: outcomes.update(optim_step(complete)), device)
        if complete:
            seconds_of_optimizer.append(seconds)
        return outcomes

    whole = seconds_of(lambda: checked_step(engine), device)
    engine.optim_step = timed  # type: ignore[method-assign]
    try:
        parted = seconds_of(lambda: checked_step(engine), device)
    finally:
        del engine.optim_step
    assert seconds_of_optimizer, "the engine's step went past optim_step, so its time is not known"
    return whole, parted - sum(seconds_of_optimizer)


def swap(report: Report, conditions: Conditions, precision: str) -> None:
    """What a swap and the step after it take beyond the step before; and how many graphs torch compiled for them. The
    newcomer is prepared before, as a session does it on a thread beside the steps.
    """
    engine = fresh_engine(conditions, precision)
    documents = _documents(8, conditions.tokens)
    set_jobs(engine, 8, documents, conditions.tokens)
    for _ in range(conditions.warm):
        checked_step(engine)
    graphs = counters["stats"]["unique_graphs"]
    pauses = []
    gc.collect()
    gc.freeze()  # as a session's rank does
    for number in range(SWAPS):
        newcomer = bench_job(f"newcomer{number}", documents, conditions.tokens, _vocabulary(conditions), 100 + number)
        leaving = next(iter(engine.live))
        prepared = engine.prepare(newcomer)
        normal = seconds_of(functools.partial(checked_step, engine), conditions.device)
        swapped = seconds_of(functools.partial(_exchange_and_step, engine, leaving, prepared), conditions.device)
        pauses.append(1000 * (swapped - normal))
    gc.unfreeze()
    report.figure(f"{precision}: ms of pause at a swap, median", statistics.median(pauses))
    report.figure(f"{precision}: ms of pause at a swap, longest", max(pauses))
    report.figure(f"{precision}: graphs compiled in {SWAPS} swaps", counters["stats"]["unique_graphs"] - graphs)


def _exchange_and_step(engine: TrainEngine, leaving: str, newcomer: PreparedJob) -> None:
    engine.remove(leaving)
    engine.admit(newcomer)
    checked_step(engine)


def join(report: Report, conditions: Conditions, precision: str) -> None:
    """Jobs whose kernels are the first of their kind on a machine join eight: in a process whose caches are empty, with
    the warm-up of kernels and without.
    """
    for kernels in ("warm", "cold"):
        with tempfile.TemporaryDirectory() as folder:
            figures = _child(conditions, precision, kernels, folder)
        for name, value in figures.items():
            report.figure(f"{precision}: {name}, {kernels} kernels", value)


def joins(conditions: Conditions, precision: str, warm: bool) -> dict[str, float]:
    """Seconds of preparing a newcomer; milliseconds that the longest step beside it takes beyond a median one, and that
    its joining and first step take beyond a median step with it (dropout and DoRA have a price of their own).
    """
    engine = fresh_engine(conditions, precision)
    documents = _documents(8, conditions.tokens)
    step, figures = functools.partial(checked_step, engine), {}

    def median_step() -> float:
        return statistics.median(seconds_of(step, conditions.device) for _ in range(5))

    with ThreadPoolExecutor(1) as thread:  # as a rank has one for those that join it
        thread.submit(set_jobs, engine, 8, documents, conditions.tokens).result()
        gc.collect()
        gc.freeze()  # as a session's rank does; this process ends with the part
        seconds_of(step, conditions.device)  # compiles for the eight
        usual = median_step()
        if not warm:
            assert isinstance(engine.forward, LlamaForward)
            engine.forward._warmup = None
        for name, lora in FIRST_OF_THEIR_KIND.items():
            newcomer = bench_job(name, documents, conditions.tokens, _vocabulary(conditions), lora=lora)
            preparing = thread.submit(_prepared_at, engine, newcomer)
            began, steps = time.monotonic(), [seconds_of(step, conditions.device)]
            while not preparing.done():
                steps.append(seconds_of(step, conditions.device))
            prepared, ended = preparing.result()
            swap = functools.partial(_exchange_and_step, engine, next(iter(engine.live)), prepared)
            figures[f"s to prepare, {name}"] = ended - began
            figures[f"ms of pause meanwhile, {name}"] = 1000 * (max(steps) - usual)
            joined = seconds_of(swap, conditions.device)
            usual = median_step()
            figures[f"ms of pause as it joins, {name}"] = 1000 * (joined - usual)
    return figures


def _prepared_at(engine: TrainEngine, newcomer: EngineJob) -> tuple[PreparedJob, float]:
    return engine.prepare(newcomer), time.monotonic()


def ends(report: Report, conditions: Conditions, precision: str) -> None:
    """What a checkpoint of one of eight jobs, and its end, cost the others: the step beside which a thread writes the
    checkpoint, or makes the files, beyond the one before; and a probe, which lies between two steps.
    """
    engine = fresh_engine(conditions, precision)
    set_jobs(engine, 8, _documents(8, conditions.tokens), conditions.tokens)
    step, device = functools.partial(checked_step, engine), conditions.device
    for _ in range(conditions.warm):
        step()
    pauses: dict[str, list[float]] = {"a checkpoint": [], "publishing": [], "a probe": []}
    for live in [*engine.live.values()][: conditions.timed + 1]:
        for name, begin in (("a checkpoint", _checkpoint), ("publishing", _publish)):
            usual = seconds_of(step, device)
            with ThreadPoolExecutor(1) as thread:
                beside = seconds_of(functools.partial(_step_beside, thread, begin, engine, live, step), device)
            pauses[name].append(1000 * (beside - usual))
        probe = functools.partial(probe_losses, engine.forward, live.bound, live.job.examples[:1])
        pauses["a probe"].append(1000 * seconds_of(probe, device))
    for name, of_jobs in pauses.items():  # the first takes memory, and the hooks' kernels
        report.figure(f"{precision}: ms that {name} takes, first", of_jobs[0])
        report.figure(f"{precision}: ms that {name} takes, median of others", statistics.median(of_jobs[1:]))


def _step_beside(
    thread: ThreadPoolExecutor,
    begin: Callable[[TrainEngine, LiveJob], Callable[[], object]],
    engine: TrainEngine,
    live: LiveJob,
    step: Step,
) -> None:
    thread.submit(begin(engine, live))
    step()


def _checkpoint(_: TrainEngine, live: LiveJob) -> Callable[[], object]:
    snapshot = live.snapshot()

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder:
            snapshot.write(path := Path(folder) / "state")
            with path.open("rb") as written:
                hashlib.file_digest(written, "sha256")

    return write


def _publish(engine: TrainEngine, live: LiveJob) -> Callable[[], object]:
    adapter, arrived = live.optimizer.on_host(), arrival(engine.base.device)

    def make_files() -> None:
        arrived()
        pickle.dumps(adapter_files(adapter, engine.forward.modules, "base"))

    return make_files


def first_step_latency(report: Report, conditions: Conditions, precision: str) -> None:
    """Two processes one after the other, which share caches that are empty at the start."""
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            for name, seconds in _child(conditions, precision, "first", folder).items():
                report.figure(f"{precision}: s, {name}, {state} caches", seconds)


def _child(conditions: Conditions, precision: str, what: str, caches: str) -> dict[str, float]:
    """What another process measured, whose compile caches are in this folder."""
    folders = {"TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
    command = [sys.executable, "-m", "tests.bench.train_gpu", "--child", what, "--precisions", precision]
    command += ["--shape", conditions.shape, "--tokens", str(conditions.tokens), "--device", conditions.device.type]
    done = subprocess.run(command, env=os.environ | folders, capture_output=True, text=True)
    if done.returncode:
        last_words = (done.stderr.strip() or "no word").splitlines()[-1]
        raise RuntimeError(f"the process of {what!r} ended with {done.returncode}: {last_words}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def first_steps(conditions: Conditions, precision: str) -> dict[str, float]:
    """Seconds of this process's first steps, of one job and then of eight, the base loaded before."""
    engine = fresh_engine(conditions, precision)
    seconds = {}
    for jobs in (1, 8):
        set_jobs(engine, jobs, _documents(jobs, conditions.tokens), conditions.tokens)
        seconds[f"first step of {jobs}"] = seconds_of(lambda: checked_step(engine), conditions.device)
    return seconds


def fresh_engine(conditions: Conditions, precision: str) -> CountingEngine:
    """Without jobs, on a base of its own."""
    model = random_llama(conditions.shape, conditions.device, ATTENTION_NAME)
    return CountingEngine(base_of(model, precision), capacity=STEP_TOKENS)


def _documents(jobs: int, tokens: int) -> int:
    """Of each job in a step."""
    return max(1, STEP_TOKENS // (jobs * tokens))


def _vocabulary(conditions: Conditions) -> int:
    vocabulary: int = SHAPES[conditions.shape]["vocab_size"]
    return vocabulary
