"""Log-probabilities of prompts and answers: the model's own, whatever shapes the sample, as training computes them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.inference import logprobs
from lora_core.inference.engine import Generator
from lora_core.inference.generation import GeneratedToken, GenerationRequest, PromptTooLongError
from lora_core.inference.logprobs import TokenLogprob, token_logprobs
from lora_core.inference.sampling_params import SamplingParams
from lora_core.models.base import BaseModel
from lora_core.models.forward import ForwardPath, open_forward
from lora_core.models.hooks.bank import AdapterBank
from lora_core.models.step import Step
from lora_core.training.engine import TrainEngine
from tests.support.models import decoder_base, documents, job, logits_of, random_adapter, tiny_base, train_to_the_end
from tests.support.tiny_models import byte_tokenizer

SHAPED = SamplingParams(
    temperature=1.7, top_k=9, repetition_penalty=1.5, frequency_penalty=0.5, logit_bias={7: 4.0}, seed=3
)
PROMPT = [int(token) for token in torch.randint(3, 50, (23,), generator=torch.Generator().manual_seed(1))]


def served_base() -> BaseModel:
    return replace(decoder_base("llama", torch.float32), tokenizer=byte_tokenizer())


def answer_all(generator: Generator, requests: Sequence[GenerationRequest]) -> list[list[GeneratedToken]]:
    generator.end_tokens = frozenset()
    events: dict[int, list[GeneratedToken]] = {generator.add(request): [] for request in requests}
    while generator.running or generator.waiting:
        for event in generator.step():
            events[event.request].append(event)
    return list(events.values())


def close_to(scored: TokenLogprob, log_p: Tensor, token: int, top: int) -> bool:
    values, indices = log_p.topk(top)
    expected = [(token, log_p[token]), *zip(indices.tolist(), values, strict=True)]
    found = [(scored.token, scored.logprob), *scored.top]
    return [one for one, _ in found] == [one for one, _ in expected] and all(
        abs(one - float(other)) < 1e-5 for (_, one), (_, other) in zip(found, expected, strict=True)
    )


def test_scores_by_their_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_ROWS", 3)
    logits = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)) * 4
    tokens, tops = list(range(8)), [0, 1, 5, 0, 40, 60, 2, 0]
    for row, scored in enumerate(token_logprobs(logits, tokens, tops)):
        log_p = torch.log_softmax(logits[row].double(), -1)
        assert close_to(scored, log_p, row, min(tops[row], 40))


@pytest.mark.parametrize("path", ["llama", "hooks"])
def test_of_prompts_and_answers_in_any_mix(path: ForwardPath) -> None:
    """In chunks, over beginnings that others have read, for those who ask alone; however the answer is drawn."""
    base = served_base()
    forward = open_forward(base, path)
    adapter = random_adapter(forward.modules, 5)
    common: dict[str, Any] = {"sampling": SHAPED, "max_tokens": 5}
    bound = {"adapter": forward.load(adapter), "digest": "one"}
    requests = [
        GenerationRequest(prompt=PROMPT, **common, **bound, logprobs=3, prompt_logprobs=2),
        GenerationRequest(prompt=PROMPT, **common),
        GenerationRequest(prompt=[*PROMPT[:20], 9], **common, logprobs=0, **bound),
        GenerationRequest(prompt=PROMPT, **{**common, "max_tokens": 0}, prompt_logprobs=1),
        GenerationRequest(prompt=PROMPT[:1], **common, prompt_logprobs=1),
    ]
    generator = Generator(base, forward, slots=3, max_len=64, prefill_tokens=13, mixed_tokens=5)
    bank = AdapterBank(base.model) if path == "llama" else forward.modules
    assert isinstance(bank, AdapterBank)
    for request, events in zip(requests * 2, answer_all(generator, requests * 2), strict=True):
        answer = [event.token for event in events if event.token is not None]
        assert len(answer) == request.max_tokens and events[-1].finish_reason == "length"
        ids = [*request.prompt, *answer]
        logits = logits_of(base, torch.tensor([ids]), bank, adapter if request.adapter else None)
        log_p = torch.log_softmax(logits[0].double(), -1)
        start = len(request.prompt)
        for position, event in enumerate(events if answer else [], start):
            if request.logprobs is None:
                assert event.logprob is None
            else:
                assert event.logprob is not None
                assert close_to(event.logprob, log_p[position - 1], ids[position], request.logprobs)
            assert event is events[0] or not event.prompt_logprobs
        of_prompt = events[0].prompt_logprobs
        assert len(of_prompt) == (0 if request.prompt_logprobs is None else start - 1)
        for position, scored in enumerate(of_prompt, 1):
            assert close_to(scored, log_p[position - 1], ids[position], request.prompt_logprobs or 0)


def test_nothing_is_sampled_where_no_token_is_wanted() -> None:
    base = served_base()
    generator = Generator(base, open_forward(base), slots=1, max_len=len(PROMPT))
    scoring = GenerationRequest(prompt=PROMPT, max_tokens=0, prompt_logprobs=0)
    ((event,),) = answer_all(generator, [scoring])  # in a context without room for an answer
    assert (event.token, event.text, event.finish_reason, event.completion_tokens) == (None, "", "length", 0)
    with pytest.raises(PromptTooLongError):
        generator.add(replace(scoring, max_tokens=1))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_validation_in_training_is_what_is_served(family: str) -> None:
    """Through both paths: the mean over the labels of the validation rows, in packed rows and as requests."""
    validation = documents(7, seed=60)
    engine = TrainEngine(decoder_base(family, torch.float32) if family == "llama" else tiny_base(family))
    assert engine.forward.name == ("llama" if family == "llama" else "hooks")
    live = engine.add(job(validation=validation, epochs=4, lora={"r": 8}))
    train_to_the_end(engine, "job")
    trained = live.progress.evaluation
    assert trained is not None and live.progress.before is not None
    assert trained.loss != pytest.approx(live.progress.before.loss, rel=1e-3), "the adapter must matter"
    base = replace(engine.base, tokenizer=byte_tokenizer())
    with torch.no_grad():
        adapter = engine.forward.load(live.adapter)
    generator = Generator(base, engine.forward, slots=3, max_len=64, prefill_tokens=17)
    requests = [
        GenerationRequest(prompt=example.ids, adapter=adapter, max_tokens=0, prompt_logprobs=0)
        for example in validation
    ]
    scored = [events[0].prompt_logprobs for events in answer_all(generator, requests)]
    kept = [
        token.logprob
        for example, tokens in zip(validation, scored, strict=True)
        for token, is_label in zip(tokens, example.labels_mask[1:], strict=True)
        if is_label
    ]
    assert len(kept) == trained.tokens
    assert -sum(kept) / len(kept) == pytest.approx(trained.loss, abs=1e-5)


class CountingForward:
    """Counts the tokens that are computed."""

    def __init__(self, base: BaseModel) -> None:
        self._forward, self.tokens = open_forward(base), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)

    def step(self, step: Step) -> Tensor:
        self.tokens += len(step.ids)
        return self._forward.step(step)


def test_choices_read_their_prompt_once_and_have_streams_of_their_own() -> None:
    base = served_base()
    forward: Any = CountingForward(base)
    generator = Generator(base, forward, slots=4, max_len=64)
    generator.end_tokens = frozenset()
    asked = GenerationRequest(prompt=PROMPT, sampling=SamplingParams(seed=5), max_tokens=6, prompt_logprobs=0)
    alone = [
        [event.token for event in answer_all(generator, [replace(asked, sampling=SamplingParams(seed=5 + index))])[0]]
        for index in range(6)
    ]
    assert len(set(map(tuple, alone))) == 6
    generator = Generator(base, forward, slots=4, max_len=64)  # which has read nothing
    generator.end_tokens = frozenset()
    forward.tokens = 0
    first = generator.add(asked)
    choices = [replace(asked, sampling=asked.sampling.of_choice(index), prompt_logprobs=None) for index in range(1, 6)]
    numbers = [first, *(generator.add(choice, after=first) for choice in choices)]
    given_up = numbers.pop(3)
    assert (generator.running, generator.waiting) == (0, 6)
    generator.abort(given_up)
    assert generator.waiting == 5
    tokens: dict[int, list[int | None]] = {number: [] for number in numbers}
    while generator.running or generator.waiting:
        for event in generator.step():
            tokens[event.request].append(event.token)
    assert list(tokens.values()) == [alone[index] for index in (0, 1, 2, 4, 5)]
    assert forward.tokens == len(PROMPT) + 4 + 5 * 5  # others read its last token, and none computes its own last


def test_who_waits_for_a_prompt_that_is_given_up_reads_it() -> None:
    base = served_base()
    generator = Generator(base, open_forward(base), slots=4, max_len=64)
    asked = GenerationRequest(prompt=PROMPT, sampling=SamplingParams(temperature=0.0), max_tokens=3)
    first = generator.add(asked)
    second = generator.add(asked, after=first)
    generator.abort(first)
    late = generator.add(asked, after=first)
    events = list(itertools.islice((event for _ in range(9) for event in generator.step()), 6))
    assert {event.request for event in events} == {second, late}
