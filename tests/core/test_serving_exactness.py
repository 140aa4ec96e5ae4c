"""In fp32 on CPU a request has the same logits whatever is computed beside it and however its prompt is read."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_core.inference import engine, sampling
from lora_core.inference.engine import AHEAD, Generator
from lora_core.inference.generation import GenerationRequest
from lora_core.inference.sampling_params import SamplingParams
from lora_core.kernels.stacked_low_rank import expand_, shrink
from lora_core.models.attention import ATTENTION_NAME
from lora_core.models.base import BaseModel, placed
from lora_core.models.forward import Forward, open_forward
from lora_core.models.llama import packing, stacks
from lora_core.models.llama.forward import LlamaForward
from lora_core.models.precision import DenseWeight
from lora_core.models.step import Step
from tests.support.models import CPU, random_adapter
from tests.support.tiny_models import byte_tokenizer

TINY: dict[str, int] = {"hidden_size": 48, "intermediate_size": 184, "num_attention_heads": 4, "num_key_value_heads": 2}
SMOLLM2: dict[str, int] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
RANKS = (4, 8, 16, 9, 64, 16)


class RecordingForward:
    """Keeps the logits of the last step."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self.logits = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)

    def step(self, step: Step) -> Tensor:
        self.logits = self._forward.step(step)
        return self.logits


@dataclass
class Answer:
    tokens: list[int]
    logits: list[Tensor]


def base_of(sizes: dict[str, int], layers: int = 1) -> BaseModel:
    config = LlamaConfig(vocab_size=264, max_position_embeddings=512, num_hidden_layers=layers, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    stream = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.06 * torch.randn(parameter.shape, generator=stream) + (parameter.dim() == 1)
    model.eval().requires_grad_(False)
    return placed(BaseModel(model, byte_tokenizer(), "random", "0" * 64, "fp32", CPU), CPU)


def answers(base: BaseModel, forward: Forward, requests: Sequence[GenerationRequest], **sizes: int) -> list[Answer]:
    recording = RecordingForward(forward)
    generator = Generator(base, recording, max_len=512, **sizes)  # type: ignore[arg-type]
    generator.end_tokens = frozenset()
    found = {generator.add(request): Answer([], []) for request in requests}
    while generator.running or generator.waiting:
        for event, logits in zip(generator.step(), recording.logits, strict=True):
            found[event.request].tokens.append(event.token)
            found[event.request].logits.append(logits)
    return list(found.values())


def some_requests(forward: Forward, count: int, longest: int) -> list[GenerationRequest]:
    dice = random.Random(1)
    adapters = [forward.load(random_adapter(forward.modules, n, r=r, dora=n == 3)) for n, r in enumerate(RANKS)]
    beginning, requests = [dice.randrange(200) for _ in range(30)], []
    for number in range(count):
        which = number % (len(RANKS) + 1)
        ids = [dice.randrange(200) for _ in range(dice.choice([1, 3, 17, longest // 3, longest]))]
        requests.append(
            GenerationRequest(
                prompt=[*(beginning if number % 2 else []), *ids],
                adapter=adapters[which] if which < len(RANKS) else None,
                digest=str(which),
                sampling=SamplingParams(temperature=0.7, seed=number, top_k=-1 if number % 2 else 40),
                max_tokens=dice.choice([2, 5, 9]),
            )
        )
    return requests


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "sizes", "count", "longest"),
    [(1, TINY, 14, 200), (2, TINY, 14, 200), (1, SMOLLM2, 9, 150), (2, SMOLLM2, 9, 150), (3, SMOLLM2, 9, 150)],
    indirect=["threads"],
)
def test_the_same_bits_alone_and_in_any_mix(threads: int, sizes: dict[str, int], count: int, longest: int) -> None:
    base = base_of(sizes, layers=2 if sizes is TINY else 1)
    forward = open_forward(base)
    assert isinstance(forward, LlamaForward) and forward.serving_problem() is None
    requests = some_requests(forward, count, longest)
    alone = [answers(base, forward, [request], slots=1)[0] for request in requests]
    mixes = [
        {"slots": 9, "mixed_tokens": 256, "prefill_tokens": 1024},
        {"slots": 3, "mixed_tokens": 7, "prefill_tokens": 50},
    ]
    for mix in mixes:
        together = answers(base, forward, [*requests, *requests], **mix)  # the second time beginnings are known
        for number, answer in enumerate(together):
            assert answer.tokens == alone[number % count].tokens
            for here, there in zip(answer.logits, alone[number % count].logits, strict=True):
                assert torch.equal(here, there), f"request {number} of {mix}"


def test_more_adapters_at_once_than_are_one_product() -> None:
    """Stacks grow as adapters come, and are as wide as this CPU asks for from the first on."""
    base = base_of(TINY)
    forward = open_forward(base)
    adapters = [forward.load(random_adapter(forward.modules, seed, r=16)) for seed in range(27)]
    requests = [
        GenerationRequest(prompt=[seed, 5, 9], adapter=adapter, sampling=SamplingParams(temperature=0.0), max_tokens=3)
        for seed, adapter in enumerate(adapters)
    ]
    alone = [answers(base, open_forward(base), [request], slots=1)[0] for request in requests]
    for few in (requests[:1], requests[:3], requests):
        for here, there in zip(answers(base, forward, few, slots=27), alone, strict=False):
            assert all(map(torch.equal, here.logits, there.logits)) and here.tokens == there.tokens


def test_adapters_that_come_and_go_lie_side_by_side() -> None:
    """Each step is one product of its adapters, whoever holds the slots between them; nobody's bits move with him."""
    base = base_of(TINY)
    forward = open_forward(base)
    assert isinstance(forward, LlamaForward) and forward._stacks is not None
    adapters = [forward.load(random_adapter(forward.modules, seed, r=16)) for seed in range(9)]
    x = torch.randn(32, TINY["hidden_size"], generator=torch.Generator().manual_seed(3))
    group, alone = forward.decoder.groups[0], {}
    of_another = forward.load(random_adapter(forward.modules, 9, r=16, targets=["o_proj"]))
    for adapter, present in ((of_another, False), (adapters[0], True)):  # in the same slot
        assert bool(forward._stacks.of([(adapter, 2)])[group.index]) == present
    dice = random.Random(4)
    for number in range(60):
        of_step = [adapters[which] for which in dice.sample(range(9), dice.randint(1, 5))]
        counts = [dice.choice([1, 1, 2, 5]) for _ in of_step]
        runs = list(zip(of_step, counts, strict=True))
        runs = [runs[index] for index in forward._stacks.order(runs)]
        (stack,) = forward._stacks.of(runs)[group.index]
        y, start = torch.zeros(sum(counts), sum(group.outputs)), 0
        expand_(y, shrink(x[: len(y)], [stack]), [stack])
        for adapter, count in runs:
            own, part = x[start : start + count].double(), y[start : start + count]
            for columns, fused in zip(group.columns, adapter.groups[0].parts, strict=True):
                h = own @ adapter.groups[0].a[fused.columns].double().t()
                expected = h @ fused.b.double().t() * adapter.groups[0].scale
                torch.testing.assert_close(part[:, columns].double(), expected, atol=1e-5, rtol=1e-4)
            for row, found in enumerate(part, start):
                assert torch.equal(found, alone.setdefault((id(adapter), row), found)), f"step {number}"
            start += count


def test_products_that_depend_on_their_rows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(TINY)
    forward = open_forward(base)
    assert isinstance(forward, LlamaForward) and forward.serving_problem() is None
    serve = DenseWeight.serve
    monkeypatch.setattr(DenseWeight, "serve", lambda weight, x: serve(weight, x) + 1e-6 * (len(x) == 31))
    assert "depend on how many rows" in str(LlamaForward(forward.decoder, forward.modules, "fp32").serving_problem())
    monkeypatch.undo()
    monkeypatch.setattr(stacks, "products_are_alike", lambda groups, dtype: False)
    assert "products of adapters" in str(LlamaForward(forward.decoder, forward.modules, "fp32").serving_problem())


def test_weights_are_packed_for_serving_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """oneDNN's copy computes the formula; training's products keep their bits; without room there is no copy."""
    caplog.set_level("INFO", logger="lora.engine")
    stream = torch.Generator().manual_seed(2)
    x, *parts = (torch.randn(rows, 72, generator=stream) for rows in (37, 40, 24))
    weight, expected = DenseWeight(parts), DenseWeight(parts).forward(x)
    packing.pack_for_serving([weight], torch.float32)
    assert weight.is_packed and re.search(r"event=serving_packed copy_bytes=[1-9]", caplog.text)
    assert torch.equal(weight.forward(x), expected)
    exact = (x.double() @ torch.cat(parts).double().t()).float()
    for rows in (1, 5, 37):
        torch.testing.assert_close(weight.serve(x[:rows]), exact[:rows], atol=1e-5, rtol=1e-5)

    weight.unpack()
    monkeypatch.setattr(packing, "free_host_bytes", lambda: weight.nbytes)
    packing.pack_for_serving([weight], torch.float32)
    assert not weight.is_packed and "event=serving_unpacked reason=memory" in caplog.text


def test_packed_weights_whose_rows_depend_on_each_other_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = open_forward(base_of(TINY))
    assert isinstance(forward, LlamaForward)
    serve = DenseWeight.serve
    monkeypatch.setattr(
        DenseWeight, "serve", lambda weight, x: serve(weight, x) + 1e-6 * (weight.is_packed and len(x) == 31)
    )
    assert forward.serving_problem() is None
    assert not any(weight.is_packed for weight in forward.decoder.layers[0].weights)  # type: ignore[attr-defined]


@pytest.mark.slow
def test_ten_thousand_events_and_no_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests come, go on, are given up and end in any order, in fewer slots than there are requests, by steps that
    are queued ahead of the tokens before them and by others, some of whose draws turn out to be others.
    """
    monkeypatch.setattr(sampling, "_LIKELY", 16)
    monkeypatch.setattr(engine, "SURPRISES", 1.0)
    base = base_of(TINY)
    forward = open_forward(base)
    requests = some_requests(forward, 14, 60)
    ends = frozenset(range(0, 264, 12))
    expected = [upto(ends, answers(base, forward, [request], slots=1)[0].tokens) for request in requests]
    assert 0 < sum(len(tokens) < request.max_tokens for tokens, request in zip(expected, requests, strict=True)) < 9
    generator = Generator(base, forward, slots=5, max_len=512, mixed_tokens=24, prefill_tokens=64)
    generator.end_tokens = ends
    dice, live, ended, ahead = random.Random(2), dict[int, tuple[int, list[int]]](), 0, 0
    for _ in range(10_000):
        chance = dice.random()
        monkeypatch.setitem(AHEAD, "cpu", dice.random() < 0.7)
        if chance < 0.12 and len(live) < 12:
            which = dice.randrange(len(requests))
            live[generator.add(requests[which])] = which, []
        elif chance < 0.15 and live:
            given_up = dice.choice(list(live))
            generator.abort(given_up)
            del live[given_up]
        else:
            for event in generator.step():
                which, tokens = live[event.request]
                tokens.append(event.token)
                assert tokens == expected[which][: len(tokens)]
                if event.finish_reason is not None:
                    assert tokens == expected[which]
                    del live[event.request]
                    ended += 1
            ahead += generator._queued is not None
        assert generator.running + generator.waiting == len(live) and generator.running <= 5
    assert ended > 500 and ahead > 1000


def upto(ends: frozenset[int], tokens: list[int]) -> list[int]:
    """To the first of these."""
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))]
