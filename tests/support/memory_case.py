"""One measured case of the memory predictor, in a process of its own: prints predicted and measured peak bytes.

python -m tests.support.memory_case SOURCE CACHE PRECISION CHECKPOINTING TOKENS ADAPTERS DROPOUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lora_core.config import LoraConfig, TrainConfig
from lora_core.data.dataset import Example
from lora_core.models.base import describe_base, load_base, resolve_precision
from lora_core.models.files import DTYPES
from lora_core.models.llama.decoder import Checkpointing
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob
from lora_core.training.memory.predictor import PUBLISHED_COPIES, predictor, resident_bytes, return_freed_memory

DOCUMENT = 128


def status_bytes(name: str) -> int:
    """A line of this process's status, such as VmHWM, the most that was ever resident: the kernel misses no moment."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def main(
    source: str, cache: Path, precision: str, checkpointing: Checkpointing, tokens: int, adapters: int, dropout: float
) -> None:
    return_freed_memory()
    cpu = torch.device("cpu")
    precision = resolve_precision(precision, source, cache_dir=cache, device=cpu).precision  # type: ignore[arg-type]
    lora = LoraConfig(r=16, lora_dropout=dropout)
    config = describe_base(source, cache)[0].config
    predicted = predictor(config, DTYPES[precision], "llama").predict(
        [lora] * adapters, tokens, DOCUMENT, checkpointing
    )
    predicted += resident_bytes()
    base = load_base(source, precision=precision, cache_dir=cache, device=cpu)  # type: ignore[arg-type]
    Path("/proc/self/clear_refs").write_text("5")  # loading may have converted the base: count from here
    engine = TrainEngine(base, capacity=tokens, checkpointing=checkpointing)
    example = Example([5 + n % 50 for n in range(DOCUMENT)], [False] + [True] * (DOCUMENT - 1))
    examples = [example] * (tokens // DOCUMENT // adapters)
    for number in range(adapters):
        engine.add(EngineJob(f"job{number}", lora, TrainConfig(batch_size=len(examples), epochs=9), examples))
    live = next(iter(engine.live.values()))
    copies = [live.snapshot(), *(live.optimizer.on_host() for _ in range(PUBLISHED_COPIES))]  # as if it took that long
    for _ in range(2):
        engine.step()
    assert len(copies) == 1 + PUBLISHED_COPIES
    shared = status_bytes("VmRSS") - resident_bytes()  # other processes' part of libraries and weights
    print(predicted, status_bytes("VmHWM") - shared)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4], *map(int, sys.argv[5:7]), float(sys.argv[7]))  # type: ignore[arg-type]
