"""A row's bits on this CPU: what the self-check finds, and that training keeps its promise in each outcome."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.kernels.operands import EXACT_DTYPES
from lora_core.models.base import BaseModel, load_base
from lora_core.models.exactness import Exactness, FrozenProduct, exactness_of
from lora_core.models.forward import ForwardPath, open_forward
from lora_core.models.llama.decoder import Decoder
from lora_core.models.precision import DenseWeight
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob
from tests.support.models import CPU, documents, job, state, threads, tiny_base
from tests.support.tiny_models import save_random

Rounding = Callable[[Tensor], Tensor]
"""Rows `[n, features]` that a product gives -> what it gives on some other CPU."""


def by_eights(rows: Tensor) -> Tensor:
    """The last rows, where they are not eight, round otherwise."""
    return torch.cat([rows[: len(rows) // 8 * 8], rows[len(rows) // 8 * 8 :] * (1 + 2e-7)])


def by_number_of_rows(rows: Tensor) -> Tensor:
    return rows * (1 + 2e-7 * (len(rows) % 29))


def at_random(rows: Tensor) -> Tensor:
    return rows * (1 + 2e-7 * torch.randint(9, (1,), generator=_DICE))


PATHS = pytest.mark.parametrize("path", ["hooks", "llama"])
_DICE = torch.Generator().manual_seed(0)


def linear_that(rounds: Rounding) -> type[nn.Linear]:
    """A kind of its own: what is found of one kind of linear is remembered."""

    class OtherLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            with torch.no_grad():
                rounded = rounds(output.detach().flatten(0, -2)).view_as(output)
            return output + (rounded - output).detach()

    return OtherLinear


OUTCOMES: list[tuple[Rounding, dict[str, Any]]] = [
    (by_eights, {"pad_to_multiple_of": 8, "joined": True}),
    (by_number_of_rows, {"pad_to_multiple_of": 8, "joined": False}),
    (at_random, {"pad_to_multiple_of": 8, "joined": False}),
]


@pytest.mark.parametrize(("rounds", "found"), OUTCOMES, ids=lambda value: getattr(value, "__name__", ""))
def test_products_decide(rounds: Rounding, found: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    linear = linear_that(rounds)(64, 48, bias=False).requires_grad_(False)
    with caplog.at_level("INFO", "lora.engine"):
        exactness = exactness_of([FrozenProduct.of_linear(linear)], CPU, torch.float32)
    assert {name: asdict(exactness)[name] for name in found} == found
    exact = rounds is not at_random
    assert exactness.promised == exact and (exactness.problem is None) == exact
    assert ("bit for bit" if exact else "not exact on this CPU: a product of its 64 x 48 linears") in caplog.text
    assert "MKL_CBWR" in caplog.text or exactness.joined


@pytest.mark.parametrize(("multiple", "rows"), [(1, 28), (8, 32)])
def test_an_engine_pads_as_it_is_told(multiple: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four documents of 7 tokens a step."""
    engine = TrainEngine(tiny_base("llama"), exactness=Exactness(pad_to_multiple_of=multiple))
    engine.add(job("a", examples=documents(4, 0, 7, 7), epochs=1))
    laid: list[int] = []
    ready = engine.ready
    monkeypatch.setattr(
        engine, "ready", lambda chunks: laid.extend(chunk.padded_tokens for chunk in chunks) or ready(chunks)
    )
    engine.step()
    assert laid == [rows]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_are_promised_in_fp32_and_fp64_alone(dtype: torch.dtype) -> None:
    assert dtype not in EXACT_DTYPES
    found = exactness_of([FrozenProduct.of_linear(nn.Linear(8, 8, dtype=dtype))], CPU, dtype)
    assert not found.promised and found.problem is None and str(found).startswith("by formula")


def test_ranks_lay_out_alike() -> None:
    """What keeps the promise on each of them, or all say that it is not kept."""
    padded, alone = Exactness(promised=True), Exactness(joined=False, promised=True)
    free = Exactness(pad_to_multiple_of=1, promised=True)
    assert Exactness.of_all([free, free]) == free
    assert Exactness.of_all([free, padded]) == padded
    assert Exactness.of_all([padded, alone, free]) == alone
    broken = Exactness(joined=False, problem="why")
    assert Exactness.of_all([free, broken]) == Exactness(8, joined=False, promised=False, problem="why")
    assert Exactness(**json.loads(json.dumps(asdict(broken)))) == broken


def weight_that(rounds: Rounding) -> type[DenseWeight]:
    """The same for the stacked products of the llama path."""

    class OtherWeight(DenseWeight):
        def forward(self, x: Tensor) -> Tensor:
            return rounds(super().forward(x))

    return OtherWeight


def other_cpu(rounds: Rounding, path: ForwardPath) -> BaseModel:
    """A tiny base whose frozen products round as on another CPU."""
    base = tiny_base("llama")
    if path == "llama":
        return replace(base, decoder=Decoder(base.model, weight_that(rounds)))
    kind = linear_that(rounds)
    for module in base.model.model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = kind
    return base


def train(path: ForwardPath, rounds: Rounding, neighbours: int, exactness: Exactness | None = None) -> Tensor:
    engine = TrainEngine(other_cpu(rounds, path), capacity=256, exactness=exactness)
    live = engine.add(job("small", examples=documents(6, 1, 3, 7), batch_size=2, epochs=2))
    for number in range(neighbours):
        engine.add(job(f"n{number}", examples=documents(9, 5 + number, 9, 40), batch_size=3, epochs=9))
    while not live.done:
        engine.step()
    return state(live)


@PATHS
@pytest.mark.parametrize("rounds", [by_eights, by_number_of_rows])
def test_colocated_equals_alone_on_other_cpus(rounds: Rounding, path: ForwardPath) -> None:
    """And without what the check asks for it does not: jobs of 6 to 14 tokens a step show it."""
    assert torch.equal(train(path, rounds, neighbours=0), train(path, rounds, neighbours=3))
    wrong = Exactness(pad_to_multiple_of=1)
    assert not torch.equal(train(path, rounds, 0, wrong), train(path, rounds, 3, wrong))


def test_threads_do_not_change_what_is_found_for_the_worse() -> None:
    """Asked again for each number of threads, since products are cut by it."""
    base = tiny_base("llama")
    for count in (1, 2, 3):
        with threads(count):
            for forward in (open_forward(base), open_forward(replace(base, decoder=Decoder(base.model)))):
                assert forward.exactness().problem is None
                forward.close()


def test_products_are_asked_to_be_exact_where_a_base_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MKL_CBWR", raising=False)
    folder = save_random(tmp_path / "base", "gpt2")
    load_base(str(folder), precision="fp32", cache_dir=tmp_path, device=CPU)
    assert os.environ["MKL_CBWR"] in ("AVX2,STRICT", "AVX512,STRICT")
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    load_base(str(folder), precision="fp32", cache_dir=tmp_path, device=CPU)
    assert os.environ["MKL_CBWR"] == "COMPATIBLE", "a user's choice stays"


TOO_LATE = """
import sys
import torch
torch.set_num_threads(2)
torch.ones(64, 64) @ torch.ones(64, 64)  # from here on MKL does not look at its environment
from tests.core.test_exactness import at_widths
same, exactness = at_widths("smollm2")
assert same, exactness
print(exactness)
"""


@pytest.mark.slow
def test_colocated_equals_alone_where_products_cannot_be_asked_any_more() -> None:
    """A notebook that multiplied before it loaded a base: the self-check finds a way, and says it."""
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    process = subprocess.run(
        [sys.executable, "-c", TOO_LATE], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("bit for bit")


REAL_WIDTHS = {
    "smollm2": ("llama", {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
                          "num_key_value_heads": 3, "head_dim": 64, "num_hidden_layers": 1}),
    "llama-1b": ("llama", {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
                           "num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 1}),
    "gpt2": ("gpt2", {"n_embd": 768, "n_head": 12, "n_layer": 1}),
}  # fmt: skip


@functools.cache
def _of_width(width: str, path: ForwardPath) -> BaseModel:
    base = tiny_base(REAL_WIDTHS[width][0], **REAL_WIDTHS[width][1])
    return base if path == "hooks" else replace(base, decoder=Decoder(base.model))


def at_widths(width: str, path: ForwardPath = "llama") -> tuple[bool, Exactness]:
    """Whether a job whose steps have a few tokens is the same beside one whose steps have many, some of them of the
    same lengths.
    """
    base = _of_width(width, path)
    mine = job("mine", examples=documents(4, 1, 3, 6), lora={"r": 8}, batch_size=1, epochs=1)
    others = [*documents(6, 2, 20, 60), *documents(6, 3, 3, 6)]
    other = job("other", examples=others, lora={"r": 16}, batch_size=3, epochs=9)

    def trained(*jobs: EngineJob) -> tuple[Tensor, Exactness]:
        engine = TrainEngine(base, capacity=512)
        live = [engine.add(one) for one in jobs]
        while not live[0].done:
            engine.step()
        engine.forward.close()
        return state(live[0]), engine.exactness

    (alone, exactness), (beside, _) = trained(mine), trained(mine, other)
    return torch.equal(alone, beside), exactness


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("width", "path"),
    [
        ("smollm2", "llama"),
        pytest.param("llama-1b", "llama", marks=pytest.mark.slow),
        ("smollm2", "hooks"),
        ("gpt2", "hooks"),
    ],
)
def test_colocated_equals_alone_at_real_widths(width: str, path: ForwardPath, count: int) -> None:
    """One layer; steps of 3 to 6 tokens, which is where products were seen to differ."""
    with threads(count):
        same, exactness = at_widths(width, path)
    assert same and exactness.promised, exactness
