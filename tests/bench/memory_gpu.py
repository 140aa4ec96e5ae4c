"""What the memory predictor says of training on one GPU, and what it takes: `python -m tests.bench.memory_gpu`.

Random weights in the shape of Llama, r 16 on all linears; a step has 8,192 tokens in documents of 256, all supervised,
in micro-batches of each case's capacity. Two steps are measured:

    measured = the most that torch reserved + what the device had given away beside torch (contexts, code of kernels)

so nothing else may run on the GPU. Tensors alone are `max_memory_allocated`; what lies between the two are holes that
torch's allocator could not use. `--device cpu` shows that the program runs, and measures nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, dataclass

import torch

from lora_core.config import LoraConfig
from lora_core.models.attention import ATTENTION_NAME
from lora_core.models.llama.decoder import Checkpointing
from lora_core.models.precision import QUANTISED
from lora_core.training.engine import TrainEngine
from lora_core.training.memory.predictor import CONTEXT, Predictor, predictor
from tests.bench.engines import base_of, checked_step, set_jobs
from tests.bench.peers import random_llama
from tests.bench.report import free_memory, synchronize

STEP_TOKENS, DOCUMENT, STEPS = 8192, 256, 2
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One point of the grid."""

    shape: str
    precision: str
    jobs: int
    capacity: int
    checkpointing: Checkpointing
    dora: bool = False

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(use_dora=self.dora)


@dataclass(frozen=True)
class Result:
    """GiB; `measured` and `tensors` are None on a CPU."""

    predicted: float
    measured: float | None
    tensors: float | None

    @property
    def error(self) -> float | None:
        """By how many percent of what was measured the prediction is above it."""
        return None if self.measured is None else 100 * (self.predicted / self.measured - 1)


# Cases of one shape and precision share a base; those that follow each other with as many jobs share the jobs.
GRID = [
    Case("8b", "bf16", 1, 8192, "none"),
    Case("8b", "bf16", 1, 8192, "selective"),
    Case("8b", "bf16", 1, 8192, "full"),
    Case("8b", "bf16", 1, 2048, "none"),
    Case("8b", "bf16", 8, 8192, "none"),
    Case("8b", "bf16", 8, 4096, "selective"),
    Case("8b", "bf16", 32, 8192, "none"),
    Case("8b", "bf16", 32, 4096, "full"),
    Case("8b", "bf16", 8, 8192, "none", dora=True),
    Case("8b", "bf16", 1, 4096, "full", dora=True),
    Case("8b", "fp8", 1, 8192, "none"),
    Case("8b", "fp8", 1, 4096, "full"),
    Case("8b", "nf4", 1, 8192, "none"),
    Case("8b", "nf4", 1, 2048, "full"),
    Case("1b", "bf16", 1, 8192, "none"),
    Case("1b", "bf16", 1, 2048, "full"),
    Case("1b", "bf16", 32, 4096, "selective"),
    Case("1b", "fp8", 8, 8192, "none"),
    Case("1b", "nf4", 8, 2048, "selective"),
]
TINY_GRID = [
    Case("tiny", "bf16", 1, 8192, "none"),
    Case("tiny", "bf16", 2, 2048, "selective"),
    Case("tiny", "bf16", 1, 2048, "full", dora=True),
    Case("tiny", "nf4", 1, 4096, "full"),
]


def main() -> None:
    """Measure the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", default="", help="cases whose names have this in them, such as dora")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"{'case':<50}{'predicted':>11}{'measured':>11}{'tensors':>11}{'error %':>9}   (GiB)")
    results: list[tuple[Case, Result]] = []
    grid = [case for case in (GRID if device.type == "cuda" else TINY_GRID) if arguments.only in title(case)]
    for (shape, precision), cases in itertools.groupby(grid, lambda case: (case.shape, case.precision)):
        measure_base(shape, precision, list(cases), device, results)
        free_memory()
    report(results, device)


def measure_base(
    shape: str, precision: str, cases: list[Case], device: torch.device, results: list[tuple[Case, Result]]
) -> None:
    """Every case of one base."""
    base = base_of(random_llama(shape, device, ATTENTION_NAME), precision)
    of = predictor(
        base.model.config, torch.bfloat16, "llama", device.type, precision if precision in QUANTISED else None
    )
    engine = TrainEngine(base)
    alike = None
    for case in cases:
        if (case.jobs, case.dora) != alike:
            set_jobs(engine, case.jobs, STEP_TOKENS // (case.jobs * DOCUMENT), DOCUMENT, case.lora)
            alike = case.jobs, case.dora
        engine.planner.capacity, engine.planner.checkpointing, engine._prefetched = (
            case.capacity,
            case.checkpointing,
            None,
        )
        results.append((case, measure(engine, case, of)))
        print(line(*results[-1]), flush=True)


def measure(engine: TrainEngine, case: Case, of: Predictor) -> Result:
    """The peak of two steps beside the prediction."""
    device = engine.base.device
    free_memory()
    for _ in range(STEPS):
        checked_step(engine)
    synchronize(device)
    predicted = of.predict([case.lora] * case.jobs, case.capacity, DOCUMENT, case.checkpointing) / GIB
    if device.type != "cuda":
        return Result(predicted, None, None)
    free, total = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved(device)
    measured = (torch.cuda.max_memory_reserved(device) + context) / GIB
    return Result(predicted, measured, torch.cuda.max_memory_allocated(device) / GIB)


def title(case: Case) -> str:
    """Its name in the table."""
    dora = ", dora" * case.dora
    return f"{case.shape} {case.precision}, {case.jobs} jobs{dora}, {case.capacity} tokens, {case.checkpointing}"


def line(case: Case, result: Result) -> str:
    """A row of the table."""
    figures = result.predicted, result.measured, result.tensors
    texts = ["-" if figure is None else f"{figure:.2f}" for figure in figures]
    error = "-" if result.error is None else f"{result.error:+.1f}"
    return f"{title(case):<50}" + "".join(f"{text:>11}" for text in texts) + f"{error:>9}"


def report(results: list[tuple[Case, Result]], device: torch.device) -> None:
    """The table once more, what the context came to, and the line of JSON."""
    print()
    for case, result in results:
        print(line(case, result))
    cuda = device.type == "cuda"
    head = {
        "bench": "memory_gpu",
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "assumed_context_gib": round(CONTEXT[device.type] / GIB, 3),
    }
    if cuda:
        free, total = torch.cuda.mem_get_info(device)
        head["context_gib"] = round((total - free - torch.cuda.memory_reserved(device)) / GIB, 3)
    errors = [abs(result.error) for _, result in results if result.error is not None]
    head["largest_error_percent"] = round(max(errors), 2) if errors else None
    rows = [asdict(case) | asdict(result) | {"error_percent": result.error} for case, result in results]
    print("\n" + json.dumps(head | {"rows": rows}))


if __name__ == "__main__":
    main()
