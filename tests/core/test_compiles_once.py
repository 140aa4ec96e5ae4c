"""Jobs come and go without a kernel being compiled again, and one of a new kind comes with its kernels compiled.

Triton compiles one anew where an argument's type or alignment, a constant, or a number that is 1 or a multiple of 16
changes. In a process of its own (`python -m tests.core.test_compiles_once`), it is asked for that key at each launch of
a whole pass; nothing is launched, so that no GPU is needed.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this system")

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from lora_core.config import LoraConfig, TrainConfig
from lora_core.data.packing import pack
from lora_core.kernels import dora_triton
from lora_core.models.llama.decoder import Checkpointing, Decoder
from lora_core.models.llama.forward import LlamaForward
from lora_core.models.llama.warmup import KernelWarmup
from lora_core.training.active_job import LiveJob
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob
from tests.support.models import CPU, decode_with_triton, documents, next_chunks, tiny_base

BATCHES = ([4], [4, 4], [4, 5, 3], [2] * 16)
"""Ranks of the adapters in each; their rows differ, too. A rank above 16 would take kernels of its own."""

KINDS: dict[str, dict[str, Any]] = {"plain": {}, "dropout": {"lora_dropout": 0.1}, "dora": {"use_dora": True}}


NEWCOMERS: tuple[dict[str, Any], ...] = (
    {"r": 4, "lora_dropout": 0.1},
    {"r": 8, "lora_dropout": 0.1},
    {"r": 4, "use_dora": True},
    {"r": 40},
)
"""One after the other; each is the first of its kind, and so is many a set of them."""

CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")


@pytest.fixture(scope="module")
def keys() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.core.test_compiles_once"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    keys_by_kind: dict[str, Any] = json.loads(done.stdout)
    return keys_by_kind


@pytest.mark.parametrize("kind", ["plain", "dropout", "dora"])
def test_the_number_of_jobs_and_rows_compiles_nothing(keys: dict[str, Any], kind: str) -> None:
    first, *others = keys[kind]
    assert len(first) > 15
    for other in others:
        assert set(other) == set(first)


@pytest.mark.parametrize("kind", ["dropout", "dora"])
def test_options_take_kernels_of_their_own(keys: dict[str, Any], kind: str) -> None:
    """So the keys do tell kernels apart."""
    assert {key for key in keys[kind][0] if key not in keys["plain"][0]}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_a_newcomers_kernels_are_compiled_before_it_comes_in(
    keys: dict[str, Any], checkpointing: Checkpointing
) -> None:
    """Alone, and beside every subset of those that are there."""
    warmed, needed = keys[checkpointing]
    assert len(needed) == 2 ** len(NEWCOMERS) - 1
    for kernels in needed:
        assert set(kernels) <= set(warmed)
    alone = {key for kernels in needed[: len(NEWCOMERS)] for key in kernels}
    assert any(not set(kernels) <= alone for kernels in needed)  # so sets had to be warmed up, too


# --- the process of its own ------------------------------------------------------------------------------------------


class Asked:
    """The keys of all launches so far."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        backend = CUDABackend(GPUTarget("cuda", 90, 32))

        @cache
        def binder(kernel: Any) -> Any:
            return create_function_from_signature(kernel.signature, kernel.params, backend)

        def look(kernel: Any, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
            _, specialization, rest = binder(kernel)(*arguments, **options)
            self.keys.add(f"{kernel.fn.__module__} {kernel.fn.__name__} {specialization} {rest}")

        JITFunction.run = look

    def reset(self) -> list[str]:
        """They are forgotten."""
        launched, self.keys = sorted(self.keys), set()
        return launched


def small_job(name: str, seed: int, lora: dict[str, Any]) -> EngineJob:
    return EngineJob(name, LoraConfig(**lora), TrainConfig(batch_size=1 + seed % 3), documents(6, seed))


def one_pass(on: Decoder, engine: TrainEngine, live: dict[str, LiveJob], checkpointing: Checkpointing = "none") -> None:
    """Forward, backward and an evaluation of these jobs' next rows."""
    batch, forward = pack(next_chunks(live.values()), CPU), LlamaForward(on, engine.forward.modules, "bf16")
    bound = {name: forward.bind(job.adapter) for name, job in live.items()}
    adapters, keys = [bound[chunk.job] for chunk in batch.chunks], [live[c.job].dropout_keys(c) for c in batch.chunks]
    forward.forward_backward(forward.ready(batch, adapters, keys), checkpointing)
    forward.evaluate(forward.ready(batch, adapters, [None] * len(adapters)))


def keys_of(asked: Asked, ranks: Sequence[int], options: dict[str, Any]) -> list[str]:
    """Of every launch in a pass with these adapters."""
    base = tiny_base("llama", dtype=torch.bfloat16, num_hidden_layers=1)
    engine = TrainEngine(base)
    for index, r in enumerate(ranks):
        engine.add(small_job(f"{index:02}", index, {"r": r, **options}))
    one_pass(Decoder(base.model), engine, engine.live)
    return asked.reset()


def warmed_and_needed(asked: Asked, checkpointing: Checkpointing) -> tuple[list[str], list[list[str]]]:
    """The keys of what is launched before each newcomer comes in, and those of every set of them."""
    base = tiny_base("llama", dtype=torch.bfloat16, num_hidden_layers=1)
    engine, on = TrainEngine(base), Decoder(base.model)
    warmup, weights = KernelWarmup(on), [weight.clone() for weight in base.model.parameters()]
    for index, lora in enumerate(NEWCOMERS):
        there = [live.adapter for live in engine.live.values()]
        newcomer = engine.add(small_job(f"{index}", index, lora))
        before = newcomer.optimizer.flat.clone()
        warmup.warm_up(newcomer.adapter, there, checkpointing)
        assert torch.equal(newcomer.optimizer.flat, before) and not newcomer.optimizer._message.any()
    assert all(map(torch.equal, base.model.parameters(), weights))
    warmed, needed = asked.reset(), []
    for count in range(1, len(NEWCOMERS) + 1):
        for names in itertools.combinations(engine.live, count):
            one_pass(on, engine, {name: engine.live[name] for name in names}, checkpointing)
            needed.append(asked.reset())
    return warmed, needed


def main() -> None:
    """Print the keys of each batch of each kind, and with each kind of checkpointing what was launched before."""
    patch, asked = pytest.MonkeyPatch(), Asked()
    decode_with_triton(patch)
    patch.setattr(dora_triton, "_wide_product", lambda left, right: (left @ right.t()).float())  # a CPU has no other
    kinds = {kind: [keys_of(asked, ranks, options) for ranks in BATCHES] for kind, options in KINDS.items()}
    print(
        json.dumps(kinds | {checkpointing: warmed_and_needed(asked, checkpointing) for checkpointing in CHECKPOINTING})
    )


if __name__ == "__main__":
    main()
