"""Random operands for `kernels_gpu`: the rows and adapters of one layer, as the decoder's kernels take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from lora_core.adapters.dropout import key_of
from lora_core.kernels import cross_entropy, dispatch, low_rank_triton, masked_low_rank
from lora_core.kernels.operands import (
    FusedLinearAdapter,
    LinearAdapter,
    LinearGroup,
    LowRank,
    Magnitude,
    Rope,
    Segments,
)
from tests.bench.peers import SHAPES

Modules = tuple[ModuleType, ModuleType]
"""Triton, torch."""

RANK, SCALE = 16, 2.0
WEIGHT_STD = 0.25  # r 16 then make an update as large as what it is added to, so that a wrong one is seen
TOLERANCE = 1e-2
"""Norm of the difference over the norm. In bf16 the definitions are up to 4e-3 off their own results in fp32."""


@dataclass(frozen=True)
class Side:
    """A function with its operands: `written` is memory that it changes, `compared` what of that is a result."""

    function: Callable[..., object]
    arguments: tuple[object, ...]
    written: tuple[Tensor, ...]
    compared: tuple[Tensor, ...]

    def run(self) -> object:
        return self.function(*self.arguments)

    def results(self) -> list[Tensor | None]:
        """Copies of what it gives, since the next run may write over them; None where only the other side gives one."""
        returned = self.run()
        parts = (*(returned if isinstance(returned, tuple) else (returned,)), *self.compared)
        return [None if part is None else part.clone() for part in parts]


@dataclass(frozen=True)
class Case:
    """`matrices` are the low-rank matrices of all jobs that rows are multiplied with, or that such products are added
    to; one that is used twice stands there twice.
    """

    name: str
    jobs: int
    ours: Side
    reference: Side
    matrices: tuple[Tensor, ...]
    tokens: int
    tolerance: float = TOLERANCE

    @property
    def flops(self) -> int:
        """Of the low-rank products: each row meets the matrices of its own job."""
        return 2 * self.tokens * sum(matrix.numel() for matrix in self.matrices) // self.jobs

    def moved_bytes(self, results: list[Tensor | None]) -> int:
        """Every operand read once, every result written once."""
        read = {part.data_ptr(): part.nbytes for part in (*tensors(self.ours.arguments), *self.matrices)}
        return sum(read.values()) + sum(result.nbytes for result in results if result is not None)


def tensors(value: object) -> list[Tensor]:
    """The tensors in arguments; what adapters hold is counted apart."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Rope):
        return [value.cos, value.sin]
    return [found for part in value for found in tensors(part)] if isinstance(value, tuple) else []


@contextmanager
def definitions_run() -> Iterator[None]:
    """Let the definitions run on CUDA tensors, and on all rows at once: they cut them up for the caches of a CPU."""
    with (
        mock.patch.object(dispatch, "runs_in_triton", lambda x: False),
        mock.patch.object(masked_low_rank, "MASK_ROWS", 1 << 30),
        mock.patch.object(cross_entropy, "CACHED_ELEMENTS", 1 << 60),
    ):
        yield


class Operands:
    """Random operands in a model's shape for equal jobs: bf16 on CUDA, fp32 on CPU."""

    def __init__(self, shape: str, tokens: int, jobs: int, device: torch.device) -> None:
        sizes = SHAPES[shape]
        self.tokens, self.jobs, self.device = tokens, jobs, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.hidden, self.intermediate = sizes["hidden_size"], sizes["intermediate_size"]
        self.vocabulary, self.heads = sizes["vocab_size"], sizes["num_attention_heads"]
        self.kv_heads, self.head_size = sizes["num_key_value_heads"], self.hidden // self.heads
        kv = self.kv_heads * self.head_size
        self.qkv = LinearGroup(0, ("q", "k", "v"), self.hidden, (self.hidden, kv, kv))
        self.o = LinearGroup(0, ("o",), self.hidden, (self.hidden,))
        self.gate_up = LinearGroup(0, ("gate", "up"), self.hidden, (self.intermediate, self.intermediate))
        self.down = LinearGroup(0, ("down",), self.intermediate, (self.hidden,))

    def random(self, *sizes: int, std: float = 1.0) -> Tensor:
        return torch.randn(sizes, device=self.device).mul_(std).to(self.dtype)

    def rows(self, *sizes: int) -> Tensor:
        return self.random(self.tokens, *sizes)

    def rope(self) -> Rope:
        angle = self.rows(self.head_size // 2).float()
        cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        return Rope(cos, sin, self.head_size, self.heads + self.kv_heads, bias=None, norm=None)

    def low_rank(self, group: LinearGroup, dropout: float = 0.0, dora: bool = False) -> LowRank:
        """All jobs on a group, as many rows each."""
        adapters = [self._adapter(group, dropout, dora) for _ in range(self.jobs)]
        table = [low_rank_triton.table_row(adapter, group) for adapter in (*adapters, None)]
        segments = Segments([(job, self.tokens // self.jobs) for job in range(self.jobs)], self.device)
        keys = torch.randint(-(2**63), 2**63 - 1, (self.tokens,), device=self.device) if dropout else None
        on_device = torch.tensor(table, dtype=torch.int64, device=self.device)
        return LowRank(group, adapters, segments, adapters[0].width, RANK, on_device, keys, dora)

    def _adapter(self, group: LinearGroup, dropout: float, dora: bool) -> FusedLinearAdapter:
        parts = []
        for place, (name, size) in enumerate(zip(group.names, group.outputs, strict=True)):
            b, gradient = self.random(RANK, size, std=WEIGHT_STD), torch.zeros(RANK, size, device=self.device)
            magnitude = Magnitude(*(torch.rand(size, device=self.device) + 0.5 for _ in range(4))) if dora else None
            parts.append(LinearAdapter(b.t(), gradient.t(), place * RANK, key_of(name), magnitude))
        a = self.random(RANK * len(parts), group.inputs, std=WEIGHT_STD)
        scales = torch.full((len(a),), SCALE, device=self.device)
        adapter = FusedLinearAdapter(a, torch.zeros_like(a, dtype=torch.float32), scales, tuple(parts), dropout)
        # Computed here, as by the first batch of a job: both wait for the device or for lists, which no graph takes.
        assert adapter.scale == SCALE and len(group.columns) == len(parts)
        return adapter

    def case(
        self,
        name: str,
        modules: Modules,
        arguments: tuple[object, ...],
        *,
        written: tuple[Tensor, ...] = (),
        compared: tuple[Tensor, ...] = (),
        matrices: tuple[Tensor, ...] = (),
    ) -> Case:
        """The function of that name in Triton and in torch, on the same operands."""
        ours, reference = (getattr(module, name.removeprefix("masked_")) for module in modules)
        sides = Side(ours, arguments, written, compared), Side(reference, for_torch(arguments), written, compared)
        return Case(name, self.jobs, *sides, matrices, self.tokens)


def for_torch(arguments: tuple[object, ...]) -> tuple[object, ...]:
    """Without the table of addresses, so that a definition that went on to Triton would fail instead of being timed."""
    return tuple(replace(part, table=None) if isinstance(part, LowRank) else part for part in arguments)


def present(low: LowRank) -> list[FusedLinearAdapter]:
    """The adapters of all jobs."""
    return [adapter for adapter, _ in low.present()]


def all_a(low: LowRank) -> tuple[Tensor, ...]:
    """A of all jobs."""
    return tuple(adapter.a for adapter in present(low))


def all_magnitudes(low: LowRank) -> list[Magnitude]:
    """DoRA of all jobs, linear by linear."""
    parts = [part for adapter in present(low) for part in filter(None, adapter.parts)]
    return [part.magnitude for part in parts if part.magnitude is not None]


def all_b(low: LowRank) -> tuple[Tensor, ...]:
    """B of all jobs, linear by linear."""
    return tuple(part.b for adapter in present(low) for part in filter(None, adapter.parts))
