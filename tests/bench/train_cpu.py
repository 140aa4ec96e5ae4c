"""Tokens/s of training on CPU, this engine against PEFT in the same run: `python -m tests.bench.train_cpu [threads]`.

SmolLM2-135M in the precision that `auto` chooses here, r 16 on all linears, every token supervised: one job of 4
documents of 256 tokens a step, and eight jobs of one document of 128 tokens each, which PEFT trains one after another
(its tokens/s are those of the one whose turn it is). The programs take turns step by step, so that what else the
machine does hits all of them. PEFT has fp32 or bf16, whichever takes it less time for one document of 64 tokens; it is
measured as it is, in bf16 with and without autocast, and, where a C++ compiler is there, with compiled layers and a
chunked loss.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from lora_core.models.base import BaseModel, load_base
from lora_core.models.files import local_folder
from lora_core.training.engine import TrainEngine
from tests.bench.engines import session_step
from tests.bench.peers import compiled_step, stock_step, with_peft
from tests.bench.report import COMPILED, MANY_JOBS, ONE_JOB, OURS, PEFT, Report, Row, Step, time_steps
from tests.support.tiny_models import smollm2_gguf

CPU = torch.device("cpu")
WARM, TIMED = 2, 5
PROBE = 64
"""Tokens of the step by which PEFT's precision is chosen: emulated, bf16 takes a minute for 1,024."""


def main(threads: int) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    cache = Path(os.environ.get("LORA_TEST_CACHE") or tempfile.mkdtemp())
    source = smollm2_gguf()
    folder = local_folder(source, cache)
    base = load_base(source, precision="auto", cache_dir=cache, device=CPU)
    seconds = {dtype: _probe(folder, dtype) for dtype in (torch.float32, torch.bfloat16)}
    dtype = min(seconds, key=lambda dtype: seconds[dtype])
    head = {
        "bench": "train_cpu",
        "model": "SmolLM2-135M",
        "base": base.precision,
        "why": base.why,
        "peft": str(dtype).removeprefix("torch."),
        "threads": threads,
        "torch": torch.__version__,
    }
    report = Report(head, CPU, base.model, base.model.dtype)
    report.attempt(ONE_JOB, lambda: compare(report, base, folder, dtype, ONE_JOB, jobs=1, documents=4, tokens=256))
    report.attempt(MANY_JOBS, lambda: compare(report, base, folder, dtype, MANY_JOBS, jobs=8, documents=1, tokens=128))
    report.finish()


def compare(
    report: Report,
    base: BaseModel,
    folder: Path,
    dtype: torch.dtype,
    workload: str,
    *,
    jobs: int,
    documents: int,
    tokens: int,
) -> None:
    """Rows of everybody on `jobs` jobs of `documents` documents a step; PEFT has one job at a time."""
    engine = TrainEngine(base, capacity=None)  # as `lora_core.train` and the service have it
    size = f"{documents} x {tokens}"
    ids = torch.randint(0, base.model.config.vocab_size, (documents, tokens))
    programs: dict[str, tuple[str, Step]] = {
        f"ours, {jobs} x {size}": (OURS, session_step(engine, jobs, documents, tokens)),
        f"peft, {size}": (PEFT, stock_step(_with_peft(folder, dtype), ids, autocast=False)),
    }
    if dtype == torch.bfloat16:
        programs[f"peft, autocast, {size}"] = (PEFT, stock_step(_with_peft(folder, dtype), ids, autocast=True))
    if shutil.which(os.environ.get("CXX", "g++")):
        compiled = compiled_step(_with_peft(folder, dtype), ids)
        case = f"peft compiled, chunked loss, {size}"
        if report.attempt(case, lambda: compiled() or True):  # one that cannot be compiled leaves the rest
            programs[case] = (COMPILED, compiled)
    timings = time_steps({case: step for case, (_, step) in programs.items()}, warm=WARM, timed=TIMED, device=CPU)
    for case, (who, _) in programs.items():
        report.add(Row(case, who, workload, documents * tokens * (jobs if who == OURS else 1), timings[case]))
    engine.forward.close()


def _probe(folder: Path, dtype: torch.dtype) -> float:
    step = stock_step(_with_peft(folder, dtype), torch.randint(0, 1000, (1, PROBE)), autocast=False)
    step()
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def _with_peft(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    return with_peft(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
