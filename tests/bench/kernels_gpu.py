"""Each Triton kernel of the decoder against its definition in torch, compiled: `python -m tests.bench.kernels_gpu`.

A kernel stays only if it is faster. Operands are random, in the shape of a Llama layer with r 16 and `--tokens` rows:
of one job, and of eight with as many rows each. A kernel that does not know of jobs has one line. On a GPU:

    floor = the larger of  bytes / measured rate of a copy,  FLOP of the low-rank products / measured rate of products

where each operand is read once and each result written once. No cache is flushed: at 8,192 tokens of the 8B shape the
operands of every kernel exceed the L2 cache (the least is shrink's, 64 MiB; H100 has 50). A definition is compiled for
its shapes alone; `torch as` says how:

    compiled    one graph
    in pieces   torch.compile breaks the graph somewhere
    eager       no part of it could be compiled, or `--eager`

Both sides must agree, or the row is marked and the exit code is 1 (`tests/core/test_kernels.py` also checks what a
kernel alone returns). Tries itself out on a CPU, in Triton's interpreter:
`TRITON_INTERPRET=1 python -m tests.bench.kernels_gpu --shape tiny --tokens 64 --device cpu --quick`
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from tests.bench.kernel_cases import OF_JOBS, OF_ROWS
from tests.bench.kernel_operands import Case, Operands, Side, definitions_run
from tests.bench.options import bench_parser, head_of, some_of
from tests.bench.report import Step, copy_rate, free_memory, matmul_rate, seconds_of

NAMES = (*OF_JOBS, *OF_ROWS)
JOBS = (1, 8)
WARM, FULL, QUICK = 3, 20, 5  # repetitions
AHEAD_CYCLES = 3_000_000
"""Of waiting on the GPU, some 2 ms: in them Python queues all launches of a repetition, as it does ahead of a step."""


@dataclass(frozen=True)
class Rates:
    """Bytes/s of a copy, read and written, and FLOP/s of bf16 products."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Row:
    """One case in microseconds; no floor on a CPU. `error` is the norm of the difference over the norm."""

    kernel: str
    jobs: int
    ours: float
    compiled: float
    torch_as: str
    floor: float | None
    error: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return self.error <= self.tolerance  # not if it is NaN

    @property
    def of_floor(self) -> float | None:
        return None if self.floor is None else self.floor / self.ours

    @property
    def ratio(self) -> float:
        """Below 1 the kernel is faster."""
        return self.ours / self.compiled


def main() -> int:
    """Measure what the command line asks for; 1 where sides disagree or a case failed."""
    arguments = _arguments()
    device, began = torch.device(arguments.device), time.perf_counter()
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    rates = Rates(copy_rate(device), matmul_rate(device)) if cuda else None
    head = head_of("kernels_gpu", arguments, device) | {"autotune": arguments.autotune}
    if rates is not None:
        head |= {"bytes_per_second": round(rates.bytes), "bf16_flops": round(rates.flops)}
    print(", ".join(f"{name} {value}" for name, value in head.items()) + f"\n{_titles()}", flush=True)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name, jobs in _cases(arguments.only):
        try:
            operands = Operands(arguments.shape, arguments.tokens, jobs, device)
            rows.append(measure((OF_JOBS | OF_ROWS)[name](operands), arguments, rates))
            print(_line(rows[-1]), flush=True)
        except Exception as error:  # the other cases go on
            failed[f"{name}, {jobs}"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            print(f"{name:<26}{jobs:>5}  {failed[f'{name}, {jobs}'].splitlines()[0]}", flush=True)
        free_memory()
    head["seconds"] = round(time.perf_counter() - began, 1)
    print("\n" + json.dumps(head | {"rows": [_as_json(row) for row in rows], "failed": failed}))
    return 0 if not failed and all(row.agrees for row in rows) else 1


def measure(case: Case, arguments: argparse.Namespace, rates: Rates | None) -> Row:
    """Compare both sides of a case, then time them."""
    written = {tensor.data_ptr(): tensor for tensor in (*case.ours.written, *case.reference.written)}
    saved = [(tensor, tensor.clone()) for tensor in written.values()]

    def restore() -> None:
        for tensor, content in saved:
            tensor.copy_(content)

    repetitions = QUICK if arguments.quick else FULL
    ours = case.ours.results()
    floor = None if rates is None else 1e6 * max(case.moved_bytes(ours) / rates.bytes, case.flops / rates.flops)
    seconds = _median_seconds(case.ours, restore, repetitions, arguments.device)
    with definitions_run():
        reference, how = _compiled(case.reference, restore, arguments)
        restore()
        error = relative_error(ours, reference.results())
        del ours
        reference_seconds = _median_seconds(reference, restore, repetitions, arguments.device)
    return Row(case.name, case.jobs, 1e6 * seconds, 1e6 * reference_seconds, how, floor, error, case.tolerance)


def _compiled(side: Side, restore: Step, arguments: argparse.Namespace) -> tuple[Side, str]:
    """The definition in the best form that it can be run in, and what that is."""
    mode = "max-autotune-no-cudagraphs" if arguments.autotune else None
    for how, fullgraph in () if arguments.eager else (("compiled", True), ("in pieces", False)):
        torch._dynamo.reset()
        counters.clear()
        compiled = replace(side, function=torch.compile(side.function, dynamic=False, mode=mode, fullgraph=fullgraph))
        try:
            restore()
            compiled.run()
        except TorchDynamoException:
            continue
        if counters["stats"]["unique_graphs"]:
            return compiled, how
    return side, "eager"


def relative_error(ours: list[Tensor | None], reference: list[Tensor | None]) -> float:
    """The largest of all results that both sides give; NaN where one has a NaN."""
    errors = []
    for one, other in zip(ours, reference, strict=True):
        if one is None or other is None:
            continue
        norm = other.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
        errors.append((one.float() - other.float()).norm() / norm)
    return float(torch.stack(errors).max())


def _median_seconds(side: Side, restore: Step, repetitions: int, device: str) -> float:
    """Of one run; what it writes over is restored before each."""

    def on_cpu() -> float:
        restore()
        return seconds_of(side.run, torch.device("cpu"))

    def queued() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        restore()
        torch.cuda._sleep(AHEAD_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        side.run()
        end.record()
        return start, end

    if device == "cpu":
        return statistics.median([on_cpu() for _ in range(WARM + repetitions)][WARM:])
    pairs = [queued() for _ in range(WARM + repetitions)]
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs[WARM:]) / 1000


def _cases(only: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    for name in filter(only.__contains__, NAMES):
        for jobs in JOBS if name in OF_JOBS else JOBS[:1]:
            yield name, jobs


def _arguments() -> argparse.Namespace:
    parser = bench_parser(__doc__, tokens=8192, of="rows of a batch, of all jobs together")
    parser.add_argument("--only", type=some_of(NAMES), default=NAMES, help="kernels, by commas")
    parser.add_argument("--autotune", action="store_true", help="compile with max-autotune-no-cudagraphs")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    if arguments.tokens < JOBS[-1] or arguments.tokens % JOBS[-1]:
        parser.error(f"--tokens {arguments.tokens}: {JOBS[-1]} jobs share them, so choose a multiple of {JOBS[-1]}")
    if arguments.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--device cpu: set TRITON_INTERPRET=1 in the environment, since Triton compiles for GPUs alone")
    return arguments


def _titles() -> str:
    return (
        f"{'kernel':<26}{'jobs':>5}{'ours us':>11}{'compiled us':>13}{'floor us':>10}{'of floor':>10}{'ours/comp.':>12}"
        f"{'torch as':>11}{'error':>9}"
    )


def _line(row: Row) -> str:
    floor, share = ("-", "-") if row.floor is None else (f"{row.floor:.1f}", f"{row.of_floor:.2f}")
    mark = "" if row.agrees else f"  MISMATCH: more than {row.tolerance}"
    return (
        f"{row.kernel:<26}{row.jobs:>5}{row.ours:>11.1f}{row.compiled:>13.1f}{floor:>10}{share:>10}{row.ratio:>12.3f}"
        f"{row.torch_as:>11}{row.error:>9.1e}{mark}"
    )


def _as_json(row: Row) -> dict[str, object]:
    return {
        "kernel": row.kernel,
        "jobs": row.jobs,
        "ours_us": round(row.ours, 2),
        "compiled_us": round(row.compiled, 2),
        "torch_as": row.torch_as,
        "floor_us": None if row.floor is None else round(row.floor, 2),
        "of_floor": None if row.of_floor is None else round(row.of_floor, 4),
        "ours_over_compiled": round(row.ratio, 4),
        "error": None if math.isnan(row.error) else row.error,
        "tolerance": row.tolerance,
        "agrees": row.agrees,
    }


if __name__ == "__main__":
    sys.exit(main())
