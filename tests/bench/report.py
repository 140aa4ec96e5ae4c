"""Time steps and print what came out: each row as it ends, so that a time limit loses nothing; then a table and JSON.

    floor = measured rate of products, in bf16 if not said [FLOP/s] / (4 x parameters [FLOP a token])

A LoRA step takes two FLOP a parameter and token forward and two for the gradient with respect to the input; a frozen
weight has no gradient of its own. Where nothing is trained the floor has the first two alone. Parameters are those of
the linears and the head: an embedding is looked up.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")
Step = Callable[[], object]

PEFT, COMPILED, OURS, VLLM = "peft", "peft compiled", "ours", "vllm"
ONE_JOB, MANY_JOBS, DORA = "one job", "many jobs", ", DoRA"


@dataclass(frozen=True)
class Conditions:
    """A model's shape, the tokens of a document, and how many steps warm up and are timed."""

    shape: str
    tokens: int
    device: torch.device
    warm: int
    timed: int

    def workload(self, jobs: str, dora: bool = False) -> str:
        """What rows have in common that are compared, of `ONE_JOB` or `MANY_JOBS` of such documents."""
        return f"{jobs}{DORA * dora}, documents of {self.tokens}"


@dataclass(frozen=True)
class Timing:
    """Seconds of the first step, which may compile, and of the median step after warm-up."""

    first: float
    median: float


@dataclass(frozen=True)
class Row:
    """One case: `tokens` a step. Ratios are to the best row of a peer with the same `workload`."""

    case: str
    who: str
    workload: str
    tokens: int
    timing: Timing
    peak_gib: float | None = None

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.timing.median


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Report:
    """The rows of one run of a benchmark."""

    def __init__(
        self,
        head: Mapping[str, object],
        device: torch.device,
        model: nn.Module,
        dtype: torch.dtype = torch.bfloat16,
        *,
        flop: int = 4,
        peers: Sequence[str] = (PEFT, COMPILED),
    ) -> None:
        self.rows: list[Row] = []
        self._head, self._peers = dict(head), tuple(peers)
        self._figures: dict[str, float] = {}
        self._failures: dict[str, str] = {}
        self._flops, self._dtype = matmul_rate(device, dtype), _NAMES[dtype]
        self._floor = self._flops / (flop * product_parameters(model))
        print(", ".join(f"{name} {value}" for name, value in head.items()))
        print(
            f"{self._dtype} products {self._flops / 1e12:.2f} TFLOP/s, {product_parameters(model) / 1e9:.3f} G"
            f" parameters in products: the floor is {self._floor:.0f} tokens/s\n{self._titles()}",
            flush=True,
        )

    def add(self, row: Row) -> None:
        """Keep a row and print it."""
        self.rows.append(row)
        print(self._line(row), flush=True)

    def figure(self, name: str, value: float) -> None:
        """A number that is no throughput; its unit is in its name."""
        self._figures[name] = round(value, 4)
        print(f"{name:<64}{value:>10.4g}", flush=True)

    def attempt(self, case: str, measure: Callable[[], T]) -> T | None:
        """What `measure` returns; None where it fails, which is reported and lets the other cases go on."""
        try:
            return measure()
        except torch.OutOfMemoryError:
            self._failed(case, "out of memory")
        except Exception as error:
            self._failed(case, f"{type(error).__name__}: {str(error).strip()[:300]}")
        finally:
            free_memory()
        return None

    def best(self, who: str, workload: str) -> Row | None:
        """The fastest row of somebody on a workload."""
        rows = [row for row in self.rows if (row.who, row.workload) == (who, workload)]
        return max(rows, key=lambda row: row.rate, default=None)

    def finish(self) -> None:
        """The whole table with ratios, and the line of JSON."""
        print(f"\n{self._titles()}{''.join(f'x {peer}'.rjust(17) for peer in self._peers)}")
        for row in self.rows:
            ratios = [self._ratio(row, who) for who in self._peers]
            texts = ["-" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            print(f"{self._line(row)}{''.join(text.rjust(17) for text in texts)}")
        for name, value in self._figures.items():
            print(f"{name:<64}{value:>10.4g}")
        for case, reason in self._failures.items():
            print(f"{case:<64}{reason.splitlines()[0]}")
        head = self._head | {f"{self._dtype}_flops": self._flops, "floor": round(self._floor, 1)}
        rows = [self._as_json(row) for row in self.rows]
        print("\n" + json.dumps({**head, "rows": rows, "figures": self._figures, "failed": self._failures}))

    def _failed(self, case: str, reason: str) -> None:
        self._failures[case] = reason
        print(f"{case:<64}{reason}", flush=True)

    def _ratio(self, row: Row, who: str) -> float | None:
        peer = self.best(who, row.workload)
        return None if peer is None else row.rate / peer.rate

    def _titles(self) -> str:
        return f"{'case':<64}{'tokens/s':>10}{'of floor':>10}{'s a step':>10}{'first s':>9}{'peak GiB':>10}"

    def _line(self, row: Row) -> str:
        peak = "-" if row.peak_gib is None else f"{row.peak_gib:.1f}"
        share = f"{row.rate / self._floor:.3f}"
        return f"{row.case:<64}{row.rate:>10.0f}{share:>10}{row.timing.median:>10.4f}{row.timing.first:>9.2f}{peak:>10}"

    def _as_json(self, row: Row) -> dict[str, object]:
        ratios = {f"x {who}": self._ratio(row, who) for who in self._peers}
        return {
            "case": row.case,
            "who": row.who,
            "workload": row.workload,
            "tokens_per_second": round(row.rate, 1),
            "of_floor": round(row.rate / self._floor, 4),
            "first_step_seconds": round(row.timing.first, 3),
            "peak_gib": None if row.peak_gib is None else round(row.peak_gib, 2),
            **{name: round(ratio, 3) for name, ratio in ratios.items() if ratio is not None},
        }


def measure(
    report: Report,
    conditions: Conditions,
    case: str,
    who: str,
    workload: str,
    tokens: int,
    make_step: Callable[[], Step],
) -> bool:
    """Report the time of a step of `tokens`, run alone; False where it cannot be made or run."""

    def timed() -> bool:
        free_memory()
        times = time_steps({case: make_step()}, warm=conditions.warm, timed=conditions.timed, device=conditions.device)
        report.add(Row(case, who, workload, tokens, times[case], peak_gib(conditions.device)))
        return True

    return report.attempt(case, timed) is not None


def time_steps(steps: Mapping[str, Step], *, warm: int, timed: int, device: torch.device) -> dict[str, Timing]:
    """Run the steps in turns, so that what else the machine does hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(warm + timed):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step, device))
    return {name: Timing(taken[0], statistics.median(taken[warm:])) for name, taken in seconds.items()}


def seconds_of(action: Step, device: torch.device) -> float:
    """Wall time until the device is done with it."""
    synchronize(device)
    began = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - began


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of values in order."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of a product of random square matrices: 8,192 wide on a GPU, 2,048 on a CPU.

    The best of many, since a floor from a moment when something else ran would flatter everybody.
    """
    size, bunch = (8192, 20) if device.type == "cuda" else (2048, 1)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)

    def products() -> None:
        for _ in range(bunch):
            torch.mm(left, right, out=out)

    products()
    return bunch * 2 * size**3 / min(seconds_of(products, device) for _ in range(20))


def copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written, of copies of 1 GiB: the best of many, as above."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(5):
            target.copy_(source)

    copies()
    return 5 * 2 * source.nbytes / min(seconds_of(copies, device) for _ in range(20))


def product_parameters(model: nn.Module) -> int:
    """Parameters of every linear, the output head (tied or not) among them."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory() -> None:
    """Give back what the last case held, in cycles and in cached blocks, and begin to count the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float | None:
    """The most that tensors took since `free_memory`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
