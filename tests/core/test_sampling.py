"""Sampling: the distribution it draws from, and that nothing but a request's own logits, rules and seed has a say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_core.inference.sampling import Sampler, sample, settled
from lora_core.inference.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def sampled(logits: Tensor, samplers: list[Sampler]) -> Tensor:
    """As a generator does it whose steps are not queued ahead."""
    tokens, draws = sample(logits, samplers)
    settled(tokens, draws)
    return tokens


def logits_of(seed: int, rows: int, vocabulary: int = 1000, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def nucleus(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution by its definition: sort, leave out, add up, cut, divide."""
    p = torch.softmax(logits.double() / params.temperature, -1)
    values, order = p.sort(descending=True)
    values[params.top_k if params.top_k > 0 else len(values) :] = 0
    values[values < params.min_p * values[0]] = 0
    before = values.cumsum(-1) - values
    kept = torch.where(before < params.top_p * values.sum(), values, 0.0)
    return torch.zeros_like(p).scatter(-1, order, kept / kept.sum())


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.5},
        {"temperature": 2.0, "top_p": 0.999},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 1.0, "top_k": 300, "top_p": 0.95},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "min_p": 0.01, "top_k": 50, "top_p": 0.9},
    ],
)
@pytest.mark.parametrize(
    "spread", [0.1, 3.0]
)  # nearly flat, so that more than the first candidates are needed; and peaked
def test_frequencies_are_the_distribution(rules: dict[str, Any], spread: float) -> None:
    logits = logits_of(1, 1, vocabulary=400, spread=spread)
    sampler = Sampler(params := SamplingParams(**rules, seed=3))
    draws = 30_000
    tokens = sampled(logits.expand(draws, -1), [sampler] * draws)
    expected = nucleus(logits[0], params)
    seen = torch.bincount(tokens, minlength=400) / draws
    assert set(tokens.tolist()) <= set(expected.nonzero()[:, 0].tolist()), "a token outside the nucleus"
    deviation = (seen - expected) / (expected * (1 - expected) / draws).sqrt().clamp_min(1e-9)
    assert deviation[expected > 0].abs().max() < 5  # standard deviations


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 3.0), st.floats(0.01, 1.0), st.floats(0.05, 5.0))
def test_a_row_is_drawn_alike_alone_and_beside_others(
    seed: int, temperature: float, top_p: float, spread: float
) -> None:
    logits = logits_of(seed, 5, spread=spread)
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed)
    others = [
        SamplingParams(temperature=9.0, seed=1),
        GREEDY,
        SamplingParams(top_p=0.3),
        SamplingParams(temperature=5.0, top_p=0.99),
    ]
    alone, beside = Sampler(params), Sampler(params)
    for _ in range(3):
        (expected,) = sampled(logits[2:3], [alone]).tolist()
        rows = [Sampler(others[0]), Sampler(others[1]), beside, Sampler(others[2]), Sampler(others[3])]
        assert sampled(logits, rows)[2] == expected


def test_greedy_is_argmax_and_draws_nothing() -> None:
    logits = logits_of(2, 4)
    params = SamplingParams(temperature=1.0, seed=5)
    fresh, used = Sampler(params), Sampler(GREEDY)
    assert sampled(logits, [used, used, used, used]).tolist() == logits.argmax(-1).tolist()
    used.params = params
    assert used.uniform() != fresh.uniform()  # its stream was not seeded with 5
    almost = SamplingParams(temperature=1e-30)
    assert sampled(logits, [Sampler(almost)] * 4).tolist() == logits.argmax(-1).tolist()


def test_the_seed_fixes_the_stream_and_no_seed_does_not() -> None:
    logits = logits_of(3, 1)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [int(sampled(logits, [sampler])) for _ in range(8)]

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_a_row_that_is_not_finite_harms_no_other() -> None:
    logits = logits_of(3, 4)
    params = SamplingParams(temperature=1.0, seed=1)
    expected = sampled(logits, [Sampler(params) for _ in range(4)]).tolist()
    logits[1], logits[2, 3] = torch.nan, torch.inf
    drawn = sampled(logits, [Sampler(params) for _ in range(4)]).tolist()
    assert [drawn[0], drawn[3]] == [expected[0], expected[3]] and all(0 <= token < 1000 for token in drawn)


def test_a_tiny_top_p_is_greedy() -> None:
    logits = logits_of(4, 3)
    samplers = [Sampler(SamplingParams(temperature=2.0, top_p=1e-9, seed=s)) for s in range(3)]
    assert sampled(logits, samplers).tolist() == logits.argmax(-1).tolist()


def test_penalties_and_bias_by_their_formulas() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.0, 0.0]])
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=2.0,
        presence_penalty=0.25,
        frequency_penalty=0.5,
        logit_bias={4: 3.0, 1: -1.0},
    )
    sampler = Sampler(params, prompt=[1, 2])
    for token in (0, 0, 3):
        sampler.accept(token)
    expected = torch.tensor([2.0 / 2 - 0.25 - 2 * 0.5, -2.0 * 2, 0.5 / 2, 1.0 / 2 - 0.25 - 0.5, 3.0])
    assert torch.allclose(sampler.adjusted(logits[0]), expected)
    assert int(sampled(logits, [sampler])) == 4 and int(sampled(logits, [Sampler(GREEDY)])) == 0
    sampler.accept(4)
    assert float(sampler.adjusted(logits[0])[4]) == pytest.approx(3.0 / 2 - 0.25 - 0.5), (
        "what was chosen counts from now on"
    )
    assert torch.equal(logits, torch.tensor([[2.0, -1.0, 0.5, 1.0, 0.0]])), "others' logits are as they were"


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1, "top_k": -2}, "top_p must be above 0 and at most 1 .1.1.; top_k must be at least -1"),
        ({"min_p": -0.1}, "min_p must be between"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"presence_penalty": float("inf")}, "presence_penalty must be finite"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias must be finite"),
    ],
)
def test_impossible_rules_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(**wrong)
