"""Jobs come and go without a kernel being compiled again.

Triton compiles one anew where an argument's type or alignment, a constant, or a number that is 1 or a multiple of 16
changes. In a process of its own (`python -m tests.test_compiles_once`), it is asked for that key at each launch of a
whole pass; nothing is launched, so that no GPU is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this system")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from lora_core.config import LoraConfig, TrainConfig
from lora_core.decoder import Decoder, Rows
from lora_core.engine_job import EngineJob
from lora_core.kernels import gains_triton
from lora_core.packing import pack
from lora_core.ready_batch import joined_dropout_keys
from lora_core.trainer import TrainEngine
from tests.models import CPU, decode_with_triton, documents, next_chunks, tiny_base

BATCHES = ([4], [4, 4], [4, 5, 3], [2] * 16)
"""Ranks of the adapters in each; their rows differ, too. A rank above 16 would take kernels of its own."""

KINDS: dict[str, dict[str, Any]] = {"plain": {}, "dropout": {"lora_dropout": 0.1}, "dora": {"use_dora": True}}


@pytest.fixture(scope="module")
def keys() -> dict[str, list[list[str]]]:
    command = [sys.executable, "-m", "tests.test_compiles_once"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, list[list[str]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", ["plain", "dropout", "dora"])
def test_the_number_of_jobs_and_rows_compiles_nothing(keys: dict[str, list[list[str]]], kind: str) -> None:
    one, *others = keys[kind]
    assert len(one) > 15
    for other in others:
        assert set(other) == set(one)


@pytest.mark.parametrize("kind", ["dropout", "dora"])
def test_options_take_kernels_of_their_own(keys: dict[str, list[list[str]]], kind: str) -> None:
    """So the keys do tell kernels apart."""
    assert {key for key in keys[kind][0] if key not in keys["plain"][0]}


def keys_of(ranks: Sequence[int], options: dict[str, Any]) -> list[str]:
    """Of every launch in a pass with these adapters."""
    found: set[str] = set()
    backend = CUDABackend(GPUTarget("cuda", 90, 32))

    def look(kernel: Any, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, rest = binder(*arguments, **options)
        found.add(f"{kernel.fn.__module__} {kernel.fn.__name__} {specialization} {rest}")

    JITFunction.run = look
    base = tiny_base("llama", dtype=torch.bfloat16)
    engine, on = TrainEngine(base), Decoder(base.model)
    for place, r in enumerate(ranks):
        lora, train = LoraConfig(r=r, **options), TrainConfig(batch_size=1 + place % 3)
        engine.add(EngineJob(f"{place:02}", lora, train, documents(6, place)))
    jobs = list(engine.live.values())
    batch = pack(next_chunks(jobs), CPU)
    runs = [(int(chunk.job), chunk.rows) for chunk in batch.chunks]
    rows = Rows(batch.ids[0], batch.positions[0], batch.lengths, runs, joined_dropout_keys(engine.live, batch))
    on.forward_backward(on.batch(rows, [on.view(live.adapter) for live in jobs]), batch.labels)
    return sorted(found)


def main() -> None:
    """Print the keys of each batch, of each kind."""
    patch = pytest.MonkeyPatch()
    decode_with_triton(patch)
    patch.setattr(gains_triton, "_wide_product", lambda left, right: (left @ right.t()).float())  # a CPU has no other
    print(json.dumps({kind: [keys_of(ranks, options) for ranks in BATCHES] for kind, options in KINDS.items()}))


if __name__ == "__main__":
    main()
