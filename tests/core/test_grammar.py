"""Answers in a grammar: whatever a model would rather say, they follow it, and nobody beside them notices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch

from lora_core.inference.engine import Generator
from lora_core.inference.generation import FailedRequest, GenerationRequest
from lora_core.inference.grammar import Grammar, GrammarCompiler, GrammarError, GrammarState
from lora_core.inference.sampling_params import SamplingParams
from lora_core.inference.tool_calls import CallFormat, ToolCallParser
from lora_core.models.base import BaseModel
from lora_core.models.forward import open_forward
from tests.support.models import decoder_base
from tests.support.tiny_models import VOCABULARY, byte_tokenizer, with_more_tokens

ENDS = [256, 258]
TICKET: dict[str, Any] = {
    "type": "object",
    "properties": {"level": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["bug", "wish"]}},
    "required": ["level", "kind"],
    "additionalProperties": False,
}
COMPILER = GrammarCompiler(byte_tokenizer(), VOCABULARY, ENDS)


def allowed(grammar: Grammar, text: str) -> set[int]:
    """What may follow a text, by its bytes."""
    state = grammar.start()
    for token in text.encode():
        state.accept(byte_id(token))
    assert state.error is None
    return set(state.allowed().nonzero()[:, 0].tolist())


def byte_id(byte: int) -> int:
    (token,) = byte_tokenizer()(chr(byte))["input_ids"]
    return int(token)


def served_base() -> BaseModel:
    return replace(decoder_base("llama", torch.float32, vocab_size=VOCABULARY), tokenizer=byte_tokenizer())


def request(seed: int, grammar: Grammar | None, tokens: int = 200) -> GenerationRequest:
    sampling = SamplingParams(temperature=1.5, seed=seed, repetition_penalty=1.1)
    return GenerationRequest(prompt=[5, 6, 7 + seed], sampling=sampling, max_tokens=tokens, grammar=grammar)


def texts_of(generator: Generator, requests: list[GenerationRequest]) -> list[tuple[str, str | None]]:
    numbers = [generator.add(one) for one in requests]
    texts, reasons = dict.fromkeys(numbers, ""), dict[int, str | None](dict.fromkeys(numbers))
    while generator.running or generator.waiting:
        for event in generator.step():
            assert not isinstance(event, FailedRequest)
            texts[event.request] += event.text
            reasons[event.request] = event.finish_reason
    return [(texts[number], reasons[number]) for number in numbers]


def test_answers_are_what_the_schema_says_beside_those_without_one() -> None:
    base = served_base()
    generator = Generator(base, open_forward(base), slots=8, max_len=256)
    ticket, free = COMPILER.json(TICKET), [request(seed, None, tokens=20) for seed in range(2)]
    alone = texts_of(generator, free)
    *texts, first, second = texts_of(generator, [*(request(seed, ticket) for seed in range(6)), *free])
    assert [first, second] == alone
    assert len({text for text, _ in texts}) > 3
    for text, reason in texts:
        jsonschema.validate(json.loads(text), TICKET)
        assert reason == "stop", "an object is over with its brace"


def test_what_may_come_next() -> None:
    number = COMPILER.json({"type": "integer"})
    digits = {byte_id(ord(digit)) for digit in "0123456789"}
    assert allowed(number, "") == digits | {byte_id(ord("-"))}
    assert allowed(number, "12") == digits | set(ENDS)
    anything = COMPILER.json({"type": "object"})
    assert allowed(anything, "") == {byte_id(ord("{"))}
    spaces = {byte_id(ord(space)) for space in " \n\r\t"}
    assert spaces < allowed(anything, "{" + 39 * " ") and not spaces & allowed(anything, "{" + 40 * " ")
    done = anything.start()
    for token in b"{}":
        assert not done.is_complete
        done.accept(byte_id(token))
    assert done.is_complete


def test_a_tokenizer_may_know_more_than_the_head_has_rows() -> None:
    grammar = GrammarCompiler(with_more_tokens(byte_tokenizer()), VOCABULARY, ENDS).json({"type": "string"})
    assert grammar.start().allowed().shape == (VOCABULARY,)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"type": "string", "pattern": "(["}, "regex parse error"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"type": "object", "unevaluatedProperties": False}, "Unimplemented keys"),
        ({"enum": []}, "Unsatisfiable"),
    ],
)
def test_a_schema_that_no_answer_can_follow_is_refused_with_the_reason(schema: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(GrammarError, match=reason):
        COMPILER.json(schema)
    with pytest.raises(GrammarError, match=reason):
        COMPILER.call(
            {"good": {}, "bad": {"properties": {"a": schema}, "required": ["a"]}}, CallFormat(True, "arguments")
        )


def test_an_answer_that_cannot_go_on_fails_alone() -> None:
    base = served_base()
    generator = Generator(base, open_forward(base), slots=2, max_len=64)
    expected = texts_of(generator, [request(1, None, 8)])
    failing, other = generator.add(request(0, COMPILER.json(TICKET))), generator.add(request(1, None, 8))
    generator.step()
    state = generator._live[failing].sampler.grammar
    assert isinstance(state, GrammarState)
    state.accept(byte_id(ord("x")))  # which the grammar does not allow
    events = [event for _ in range(7) for event in generator.step()]
    (failed,) = (event for event in events if isinstance(event, FailedRequest))
    assert failed.request == failing and "doesn't satisfy the grammar" in str(failed.error)
    assert "\n" not in str(failed.error) and "<state>" not in str(failed.error)
    assert {event.request for event in events} == {failing, other} and generator.running == 0
    assert texts_of(generator, [request(1, None, 8)]) == expected


@pytest.mark.parametrize("form", [CallFormat(True, "arguments"), CallFormat(False, "parameters")])
def test_a_forced_call_is_a_call_of_one_of_the_tools(form: CallFormat) -> None:
    base = served_base()
    generator = Generator(base, open_forward(base), slots=4, max_len=256)
    referring = {"properties": {"t": {"$ref": "#/$defs/T"}}, "required": ["t"], "$defs": {"T": TICKET}}
    grammar = COMPILER.call({"open": TICKET, "move": {**referring, "additionalProperties": False}}, form)
    names = set()
    for text, reason in texts_of(generator, [request(seed, grammar) for seed in range(8)]):
        parser = ToolCallParser(form, ["open", "move"], parallel=True)
        said, calls = parser.push(text)
        rest, more = parser.finish()
        (call,) = [*calls, *more]
        assert said + rest == "" and reason == "stop"
        ticket = json.loads(call.arguments)
        jsonschema.validate(ticket if call.name == "open" else ticket["t"], TICKET)
        names.add(call.name)
    assert names == {"open", "move"}
