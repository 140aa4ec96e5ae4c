"""What `precision: auto` is on a CPU: fp32 or bf16, whichever multiplies this base's own shapes faster here.

A processor's name or flags do not tell: bf16 instructions were seen at 871 GFLOP/s beside 201 in fp32 (AMD), and at 180
beside 325 (Intel without AMX); without such instructions bf16 is emulated, at 10 to 20 beside 130. The answer is
remembered for this base, processor, number of threads and version of torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

CpuPrecision = Literal["fp32", "bf16"]
Shape = tuple[int, int]
"""(in, out) of a linear."""

ROWS = 128
FLOP = 1e9
"""Of one timed pass, forward and back through one shape: of larger ones fewer rows are multiplied, but not under 8."""
PASSES = 3
HOPELESS = 3.0
"""Times as long as fp32 for the first shape, which ends the measuring: emulated in bf16, a pass can take a second."""
INSTRUCTIONS = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
"""Variables by which a user chooses among the processor's instructions."""


@dataclass(frozen=True)
class Choice:
    """A precision, and why it is that one; where that was measured, the rate of the base's products in it."""

    precision: str
    why: str
    flop_per_second: float | None = None


def fastest_precision(shapes: Iterable[Shape], base: str, cache_dir: Path) -> Choice:
    """The faster of fp32 and bf16 for linears of these shapes, measured once; `base` stands for them in the memory."""
    memo = cache_dir / "precision" / f"{_key(base)}.json"
    if memo.is_file():
        return Choice(**json.loads(memo.read_text()))
    choice = _measured(Counter(shapes))
    memo.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=memo.parent, delete=False) as temporary:
        json.dump(asdict(choice), temporary)
    Path(temporary.name).replace(memo)
    return choice


def _key(base: str) -> str:
    chosen = {name: os.environ.get(name) for name in INSTRUCTIONS}
    here = [base, torch.__version__, torch.get_num_threads(), dict(torch.cpu.get_capabilities()), chosen]
    return hashlib.sha256(json.dumps(here, sort_keys=True).encode()).hexdigest()[:32]


def _measured(shapes: Counter[Shape]) -> Choice:
    """Times all of a base's linears take for one row, from one pass through each shape."""
    seconds = {torch.float32: 0.0, torch.bfloat16: 0.0}
    for index, (shape, count) in enumerate(shapes.items()):
        of_shape = {dtype: row_seconds(shape, dtype) for dtype in seconds}
        for dtype, taken in of_shape.items():
            seconds[dtype] += count * taken
        if index == 0 and of_shape[torch.bfloat16] > HOPELESS * of_shape[torch.float32]:
            shapes = Counter({shape: count})
            break
    flop = 4 * sum(count * inputs * outputs for (inputs, outputs), count in shapes.items())
    fp32, bf16 = (flop / taken for taken in seconds.values())
    better: CpuPrecision = "fp32" if fp32 > bf16 else "bf16"
    threads = torch.get_num_threads()
    return Choice(
        better,
        f"the faster one here: this base's products make {fp32 / 1e9:,.0f} GFLOP/s in fp32 and {bf16 / 1e9:,.0f} in"
        f" bf16 with {threads} thread{'s' if threads > 1 else ''}",
        max(fp32, bf16),
    )


@torch.no_grad()
def row_seconds(shape: Shape, dtype: torch.dtype) -> float:
    """What a row takes through a linear and back: the best of a few passes, as others use the machine too."""
    inputs, outputs = shape
    rows = max(8, min(ROWS, int(FLOP / (4 * inputs * outputs))))
    x, weight = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    best = float("inf")
    for _ in range(PASSES):
        began = time.perf_counter()
        _ = (x @ weight.t()) @ weight
        best = min(best, time.perf_counter() - began)
        if best > 0.5:
            break
    return best / rows
