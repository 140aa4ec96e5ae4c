"""How much memory training will take, before the base is loaded; and what fits into what there is.

    predicted = context + weights + vectors of every adapter + those that pairs are scored with beside their job's own
                + the peak of one micro-batch
                + on a CPU what is kept in host memory: best weights, and one checkpoint while it is written

The peak is that of a run without numbers (`dry_run.py`).
"""

from __future__ import annotations

import ctypes
import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lora_core.config import LoraConfig, TrainConfig
from lora_core.models.attention import ATTENTION_NAME
from lora_core.models.forward import ForwardPath
from lora_core.models.host_memory import free_host_bytes
from lora_core.models.llama.decoder import Checkpointing, Decoder
from lora_core.training.memory.adapter_shape import META, AdapterShape, AdapterShapes
from lora_core.training.memory.dry_run import Activations, Meter, frozen_weights
from lora_core.training.optimizer import FlatAdamW, HostState

LARGEST_CAPACITY = {"cpu": 2048, "cuda": 8192}
"""Tokens of a micro-batch beyond which nothing is won: products are as fast as they get."""

CONTEXT = {"cpu": 40_000_000, "cuda": 740_000_000}
"""What torch's libraries take when they are first used: on a CPU scratch memory and threads; on a GPU CUDA's context
and the code of all kernels, outside of torch's allocator (0.69 GiB were seen on an H100).
"""

HOLES = {"cpu": 1.0, "cuda": 1.04}
"""What torch's allocator reserves for each byte in tensors. 2.2 to 6.2 % more were seen on an H100 over 17 cases in
which the tensors themselves were predicted within 0.5 % (`tests/bench/memory_gpu.py`).
"""

PUBLISHED_COPIES = 4
"""Of an adapter's weights and residual, while it is published beside the steps of others: the copy of them, what is
to be written, its bytes, the files. A checkpoint that is written meanwhile is one copy.
"""

EXACT_HEAP_BYTES = 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_MMAP_MAX = 65536  # glibc's default


class DoesNotFitError(ValueError):
    """Training that needs more memory than there is; the sentence says what to change."""


class NoRoomBesideError(DoesNotFitError):
    """Training that fits by itself, and not beside the jobs that are there."""


@dataclass(frozen=True)
class Plan:
    """Tokens of a micro-batch, what is computed twice, and what training takes with them.

    `exact_heap`: it only fits where freed memory goes back at once (see `return_freed_memory`).
    """

    capacity: int
    checkpointing: Checkpointing
    predicted_bytes: int
    exact_heap: bool


@dataclass(frozen=True)
class Predictor:
    """Bytes of training any adapters on one base of `weights` bytes: `shapes` are of the base on the meta device,
    `device` is the type of what it will train on.

    `longest` is everywhere the most tokens of one document. Any threads may ask at once.
    """

    shapes: AdapterShapes
    device: str
    weights: int
    activations: Activations
    _vectors: dict[AdapterShape, int] = field(default_factory=dict)
    _states: dict[AdapterShape, tuple[int, int, int]] = field(default_factory=dict)

    def predict(
        self,
        loras: Sequence[LoraConfig],
        capacity: int,
        longest: int,
        checkpointing: Checkpointing,
        kept: Sequence[LoraConfig] = (),
        references: Sequence[LoraConfig] = (),
    ) -> int:
        """What training adds at its peak to what the process held before the base was loaded; `kept` are those of
        `loras` whose best weights are kept, `references` those whose start is kept to score pairs with.
        """
        adapters, best = self._of(loras), self._of(kept)
        peak = self.activations.peak_bytes(adapters, capacity, longest, checkpointing)
        return self._without_activations(adapters, best, self._of(references)) + int(HOLES[self.device] * peak)

    def _of(self, loras: Sequence[LoraConfig]) -> list[AdapterShape]:
        return [self.shapes.of(lora) for lora in loras]

    def _without_activations(
        self, adapters: Sequence[AdapterShape], kept: Sequence[AdapterShape], references: Sequence[AdapterShape]
    ) -> int:
        held = self.weights + sum(map(self._vector_bytes, adapters))
        held += sum(self._state_bytes(shape)[0] for shape in references)
        if self.device == "cpu":
            parts = {shape: self._state_bytes(shape) for shape in adapters}
            best = {shape: parts[shape][0] for shape in kept}
            held += sum(best[shape] for shape in kept)
            held += max(sum(of) + best.get(shape, 0) for shape, of in parts.items())
            held += PUBLISHED_COPIES * max(weights + residual for weights, _, residual in parts.values())
        return CONTEXT[self.device] + int(HOLES[self.device] * held)

    def _vector_bytes(self, shape: AdapterShape) -> int:
        if shape not in self._vectors:
            self._vectors[shape] = vector_bytes(self.shapes, shape)
        return self._vectors[shape]

    def _state_bytes(self, shape: AdapterShape) -> tuple[int, int, int]:
        if shape not in self._states:
            self._states[shape] = state_bytes(self.shapes, shape)
        return self._states[shape]

    def fit(
        self,
        budget_bytes: int,
        loras: Sequence[LoraConfig],
        longest: int,
        smallest: int,
        kept: Sequence[LoraConfig] = (),
        references: Sequence[LoraConfig] = (),
    ) -> Plan:
        """The largest capacity from `smallest` on that fits, with as little computed twice as lets any fit.

        Raises:
            DoesNotFitError: `smallest` tokens do not fit even with full checkpointing.
        """
        capacities = range(smallest, max(smallest, LARGEST_CAPACITY[self.device]) + 1)
        adapters = self._of(loras)
        without = self._without_activations(adapters, self._of(kept), self._of(references))
        kinds = list(dict.fromkeys(adapters))
        ways: tuple[Checkpointing, ...] = ("none", "selective", "full")
        for checkpointing in ways:

            def needed(capacity: int, checkpointing: Checkpointing = checkpointing) -> int:
                peak = self.activations.peak_bytes(kinds, capacity, longest, checkpointing)
                return without + int(HOLES[self.device] * peak)

            if needed(capacities[-1]) <= budget_bytes:
                capacity = capacities[-1]
            elif (least := needed(smallest)) <= budget_bytes:
                capacity = capacities[bisect_right(capacities, budget_bytes, key=needed) - 1]
            else:
                continue
            predicted = needed(capacity)
            heap = self.activations.peak_bytes(kinds, capacity, longest, "none")  # holes came to half of it
            exact_heap = self.device == "cpu" and predicted + heap > budget_bytes
            return Plan(capacity, checkpointing, predicted, exact_heap)
        raise DoesNotFitError(
            f"training needs {_gb(least)} of memory even with micro-batches of {smallest:,} tokens and activation"
            f" checkpointing ({_gb(self.weights)} of it for the base), but {_gb(budget_bytes)} are there: lower"
            f" max_seq_len or r, train fewer adapters at once (these are {len(loras)}), or use a smaller base or a"
            " lower precision"
        )


def predictor(
    config: PretrainedConfig, dtype: torch.dtype, path: ForwardPath, device: str = "cpu", quantised: str | None = None
) -> Predictor:
    """For a base of this config that computes in `dtype` by this path; `device` is a torch device's type, `quantised`
    fp8 or nf4 where the linears are.
    """
    with META:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=ATTENTION_NAME, dtype=dtype
        )
    model.requires_grad_(False)
    model.eval()
    weights, frozen = sum(parameter.nbytes for parameter in model.parameters()), []
    if path == "llama":
        frozen = frozen_weights(model, device, quantised)
        dense = [part for layer in Decoder.stacks(model) for group in layer for part in group]
        weights += sum(weight.nbytes for weight in frozen) - sum(part.nbytes for part in dense)
    shapes = AdapterShapes(model)
    return Predictor(shapes, device, weights, Activations(shapes, path, device, frozen, LARGEST_CAPACITY[device]))


def vector_bytes(shapes: AdapterShapes, shape: AdapterShape) -> int:
    """Of one adapter: its master weights, their gradient, two moments, the copy that products use; with DoRA norms and
    scales.
    """
    adapter, dtype = shapes.adapter(shape), shapes.model.dtype
    meter = Meter()
    with meter:
        FlatAdamW(HostState(adapter, dtype), TrainConfig(), META, dtype)
    return meter.peak + 2 * sum(m.nbytes for m in adapter.magnitude.values())


def state_bytes(shapes: AdapterShapes, shape: AdapterShape) -> tuple[int, int, int]:
    """Of one adapter's weights, and of what a checkpoint has besides: both moments, and PiSSA's residual."""
    state = HostState(shapes.adapter(shape), shapes.model.dtype)
    weights = state.trained.vector.nbytes
    return weights, 2 * weights, state.residual.vector.nbytes if state.residual is not None else 0


def available_bytes(device: torch.device) -> int:
    """What training may take in all: on a GPU with the weights that lie there, on a CPU, where they are mapped, too.

    On a GPU the context is gone from it, and is predicted nevertheless: so much is left for holes between tensors.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return free_host_bytes()


def resident_bytes() -> int:
    """What this process holds now, with its share of what it shares with others."""
    smaps = Path("/proc/self/smaps_rollup")
    if not smaps.exists():
        return int(psutil.Process().memory_info().rss)
    (line,) = [line for line in smaps.read_text().splitlines() if line.startswith("Pss:")]
    return int(line.split()[1]) * 1024


def return_freed_memory() -> None:
    """From now on every tensor of 1 MiB or more is memory of its own, which goes back to the system with it.

    Else glibc keeps them in one heap with holes that it cannot use (2.36: up to 0.7 GB more at 1,024 tokens of
    SmolLM2-135M than the tensors come to, half of what checkpointing saves). The price is time in the kernel.
    """
    _set_malloc({_M_MMAP_MAX: _MMAP_MAX, _M_TRIM_THRESHOLD: EXACT_HEAP_BYTES, _M_MMAP_THRESHOLD: EXACT_HEAP_BYTES})


def keep_freed_memory() -> None:
    """From now on what a tensor leaves is there for the next one. Else glibc gives it back, and each page of it is a
    fault when it is taken again: 7 % of the time of a step in fp32 with AVX2, and more where products are faster.

    A thread that has an arena of its own is not helped: under MALLOC_ARENA_MAX=1 none has.
    """
    _set_malloc({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1})


def _set_malloc(parameters: Mapping[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # musl has none, and no such heap
        for parameter, value in parameters.items():
            mallopt(parameter, value)
        ctypes.CDLL(None).malloc_trim(0)  # what was kept until now is taken before any memory of its own


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
