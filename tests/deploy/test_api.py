"""OpenAI's API without a cluster: what is accepted, what is said of mistakes, and how answers are put."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from threading import current_thread
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from deploy.api import gateway, schemas
from deploy.api.completion_objects import ChatCompletion, TextCompletion
from deploy.api.errors import ApiError
from deploy.api.responses import ChatResponse, ModelName, TextResponse, parse_model
from deploy.api.schemas import ChatRequest, TextRequest, parse_request
from deploy.serving.protocol import Completion, Delta, StreamStart, TokenIds, TokenLogprob
from lora_core.data.json_values import unusable
from lora_core.inference.sampling_params import SamplingParams
from lora_core.inference.tool_calls import ToolCall

HELLO = [{"role": "user", "content": "Hello"}]


TOOL = {"type": "function", "function": {"parameters": {"type": "object"}, "name": "f", "strict": True}}
SHOWN = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**parameters: Any) -> ChatRequest:
    return parse_request(json.dumps({"model": "m", "messages": HELLO, **parameters}).encode(), ChatRequest)


def refusal(kind: type[Any] = ChatRequest, **parameters: Any) -> ApiError:
    body = {"model": "m", **({"messages": HELLO} if kind is ChatRequest else {"prompt": "x"}), **parameters}
    with pytest.raises(ApiError) as caught:
        parse_request(json.dumps(body).encode(), kind)
    assert caught.value.status == 400 and not caught.value.retry
    return caught.value


def test_supported_parameters_reach_the_question() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "audio": None},
        {"role": "user", "content": "d"},
    ]
    asked = chat(
        messages=messages,
        max_completion_tokens=7,
        temperature=0,
        top_p=0.5,
        stop="END",
        seed=3,
        stream=True,
        top_k=40,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=-1,
        logit_bias={"5": 100},
        n=3,
        logprobs=True,
        top_logprobs=2,
    ).generate_request("triage", "d1g")
    assert asked.prompt == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab", "name": "Ann"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    )
    assert (asked.adapter, asked.digest, asked.max_tokens, asked.sampling.temperature) == (
        "triage",
        "d1g",
        7,
        0.0,
    )
    assert (asked.stop, asked.n, asked.logprobs, asked.echo) == (("END",), 3, 2, False)
    assert asked.sampling == SamplingParams(
        temperature=0.0, top_p=0.5, top_k=40, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=-1.0, logit_bias={5: 100.0}, seed=3,
    )  # fmt: skip
    defaults = chat(temperature=None, stop=["a", "b"]).generate_request(None, None)
    assert (defaults.sampling, defaults.max_tokens) == (SamplingParams(), None)
    assert (defaults.stop, defaults.n, defaults.logprobs) == (("a", "b"), 1, None)


@pytest.mark.parametrize(
    ("choice", "tools", "forced"),
    [
        (None, (SHOWN,), ()),
        ("auto", (SHOWN,), ()),
        ("none", (), ()),
        ("required", (SHOWN,), ("f",)),
        ({"type": "function", "function": {"name": "f"}}, (SHOWN,), ("f",)),
    ],
)
def test_tools_reach_the_question(choice: Any, tools: Any, forced: Any) -> None:
    asked = chat(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False).generate_request(None, None)
    assert (asked.tools, asked.forced_tools, asked.parallel_tool_calls) == (tools, forced, not tools)
    if tools:
        assert list(asked.tools[0]["function"]) == ["name", "parameters"], "in the order of OpenAI's documents"


def test_formats_reach_the_question() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": {"type": "array"}}}
    wanted: dict[str, Any] = {"json_object": {"type": "object"}, "text": None}
    for kind, expected in wanted.items():
        assert chat(response_format={"type": kind}).generate_request(None, None).json_schema == expected
    assert chat(response_format=schema).generate_request(None, None).json_schema == {"type": "array"}


def test_text_completions_default_to_16_tokens_as_openai_has_it() -> None:
    request = parse_request(b'{"model": "m", "prompt": "once"}', TextRequest)
    asked = request.generate_request(None, None)
    assert (asked.prompt, asked.max_tokens, asked.logprobs, asked.echo) == ("once", 16, None, False)
    scoring = parse_request(b'{"model": "m", "prompt": "a", "echo": true, "logprobs": 0, "max_tokens": 0}', TextRequest)
    asked = scoring.generate_request(None, None)
    assert (asked.max_tokens, asked.logprobs, asked.echo) == (0, 0, True)
    tokens = parse_request(b'{"model": "m", "prompt": [5, 0]}', TextRequest)
    assert tokens.generate_request(None, None).prompt == TokenIds((5, 0))


@pytest.mark.parametrize(
    "parameters",
    [
        {"n": 1, "logprobs": False, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "tools": []},
        {"response_format": {"type": "text"}, "tool_choice": "none", "top_logprobs": 0, "modalities": ["text"]},
        {"n": None, "tools": None, "seed": None, "functions": None, "stream_options": None, "stop": None},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True},
        {"max_tokens": 5, "max_completion_tokens": 5},
    ],
)
def test_parameters_without_effect_are_accepted(parameters: dict[str, Any]) -> None:
    chat(**parameters)


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("prediction", {"type": "content"}),
        ("audio", {"voice": "x"}),
        ("reasoning_effort", "high"),
    ],
)
def test_a_parameter_that_would_change_the_answer_is_refused_by_name(parameter: str, value: Any) -> None:
    error = refusal(**{parameter: value})
    assert (error.param, error.code) == (parameter, "unsupported_parameter")
    assert error.message == f"{parameter} is not supported here; leave it out"
    assert error.body()["error"] == {
        "message": error.message, "type": "invalid_request_error", "param": parameter, "code": "unsupported_parameter"
    }  # fmt: skip


@pytest.mark.parametrize("parameter", ["suffix", "best_of"])
def test_so_is_one_of_text_completions(parameter: str) -> None:
    value = {"suffix": "end", "best_of": 4}[parameter]
    assert refusal(TextRequest, **{parameter: value}).param == parameter


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"temperature": 2.5}, "temperature must be at most 2"),
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature should be"),
        ({"top_p": 0}, "top_p must be more than 0"),
        ({"top_k": -2}, "top_k must be at least -1"),
        ({"min_p": 1.5}, "min_p must be at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be more than 0"),
        ({"presence_penalty": 3}, "presence_penalty must be at most 2"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5 must be at most 100"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": "5"}, "max_tokens must be a whole number"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens and max_completion_tokens differ"),
        ({"stream": "yes"}, "stream must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options is only allowed when stream is true"),
        ({"stop": [""]}, "stop.0 must not be empty"),
        ({"seed": 2**63}, "seed must be less than"),
        ({"messages": []}, "messages must not be empty"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: missing; add a string"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role: `wizard` is unknown; use system"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content: a list; write"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [{}]}]}, "messages.0.tool_calls: calls are"),
        ({"messages": HELLO * 10_001}, "messages must have at most 10000 entries"),
        ({"messages": ["hi"]}, "messages.0 must be a block of options"),
        ({"max_token": 5}, "max_token is no parameter here; did you mean max_tokens?"),
        ({"model": None}, "model must be text"),
        ({"n": 0}, "n must be at least 1"),
        ({"n": 129}, "n must be at most 128"),
        ({"logprobs": 2}, "logprobs must be true or false"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs must be at most 20"),
        ({"top_logprobs": 2}, "top_logprobs is only allowed when logprobs is true"),
        ({"response_format": {"type": "xml"}}, "response_format.type must be one of"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema is missing",
        ),
        ({"response_format": {"type": "json_object"}, "tools": [TOOL]}, "response_format and tools do not go together"),
        ({"tools": [{"type": "function"}]}, "tools.0.function is missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tool_choice": "required"}, "tool_choice is required, and there are no tools"),
        ({"tool_choice": "always"}, 'tool_choice must be none, auto, required or {"type": "function"'),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
            "tool_choice names g, which",
        ),
    ],
)
def test_bad_values_get_a_sentence(parameters: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(**parameters).message


def test_bad_values_of_text_completions_do_too() -> None:
    error = refusal(TextRequest, echo=1, logprobs=21, max_tokens=-1)
    for sentence in ("echo must be true or false", "logprobs must be at most 20", "max_tokens must be at least 0"):
        assert sentence in error.message
    assert "or echo must be true" in refusal(TextRequest, max_tokens=0).message
    for prompt in (7, [], ["a"], [1, -1], [2**31], [True]):
        error = refusal(TextRequest, prompt=prompt)
        assert (error.param, error.message) == ("prompt", "prompt must be text, or a list of the ids of tokens")


def test_everything_wrong_is_said_at_once() -> None:
    error = refusal(temperature=9, top_p=-1, audio={}, colour="red", messages=[{"role": "x", "content": 1}])
    for name in ("temperature", "top_p", "audio is", "colour is", "messages.0.role", "messages.0.content"):
        assert name in error.message, error.message
    for body in (b"{", b"[]", b'"x"', b"\xff"):
        with pytest.raises(ApiError, match="JSON"):
            parse_request(body, ChatRequest)


OUT_OF_RANGE = "should be a finite number of at most 64 bits"
HALF = r"\ud83d"  # half of an emoji, as a client sends it that cut a text between the two
REQUEST = r'{"model": "m", "messages": [{"role": "user", "content": "a"}], %s}'


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (rf'{{"model": "m", "messages": [{{"role": "user", "content": "cut {HALF}"}}]}}', "messages.0.content"),
        (
            rf'{{"model": "m", "messages": [{{"role": "user", "content": [{{"type": "text", "text": "{HALF}"}}]}}]}}',
            "messages.0.content.0.text",
        ),
        (rf'{{"model": "m", "messages": [{{"role": "{HALF}", "content": "a"}}]}}', "messages.0.role"),
        (rf'{{"model": "m", "messages": [{{"role": "user", "content": "a", "{HALF}": 1}}]}}', rf"messages.0.{HALF}"),
        (rf'{{"model": "m:{HALF}", "messages": [{{"role": "user", "content": "a"}}]}}', "model"),
        (REQUEST % rf'"{HALF}": 1', HALF),
        (REQUEST % rf'"user": "{HALF}"', "user"),
        (REQUEST % rf'"stop": ["a", "{HALF}"]', "stop.1"),
        (REQUEST % rf'"metadata": {{"a": {{"{HALF}": 1}}}}', rf"metadata.a.{HALF}"),
        (REQUEST % rf'"stream": true, "stream_options": {{"{HALF}": 1}}', rf"stream_options.{HALF}"),
        (REQUEST % rf'"tools": [{{"type": "{HALF}"}}]', "tools.0.type"),
        (REQUEST % '"user": "RAW"', "user"),
        (REQUEST % f'"seed": {"9" * 5000}', "seed"),
        (REQUEST % f'"metadata": {{"a": -{"9" * 5000}}}', "metadata.a"),
        (REQUEST % f'"max_tokens": {2**64}', "max_tokens"),
        (REQUEST % f'"metadata": {{"a": [1, {2**64}]}}', "metadata.a.1"),
        (REQUEST % '"temperature": 1e999', "temperature"),
        (REQUEST % '"user": NaN', "user"),
        ("[" * 100_000, None),
        (REQUEST % f'"metadata": {"[" * 100_000}', None),
        ('{"a":' * 100_000, None),
    ],
)
@pytest.mark.parametrize("kind", [ChatRequest, TextRequest])
def test_what_no_text_or_number_can_be_is_a_400_that_can_be_sent(kind: type[Any], body: str, param: str | None) -> None:
    raw = body.encode().replace(b"RAW", b"\xed\xa0\xbd")  # the same half in UTF-8, which json takes
    with pytest.raises(ApiError) as caught:
        parse_request(raw, kind)
    answer = caught.value.response()
    error = json.loads(bytes(answer.body))["error"]
    assert (answer.status_code, answer.headers["x-should-retry"], error["param"]) == (400, "false", param)
    assert param is None or error["message"].startswith(param)


def test_a_prompt_with_half_a_character_is_named() -> None:
    with pytest.raises(ApiError, match="prompt has half of a surrogate pair") as caught:
        parse_request(rb'{"model": "m", "prompt": "cut \ud83d"}', TextRequest)
    assert caught.value.param == "prompt"


def test_a_large_request_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read in a thread, and for what is right in it nothing is built."""
    monkeypatch.setattr(schemas, "_SMALL_BYTES", 1000)
    readers, read = set[str](), schemas.read_document
    monkeypatch.setattr(schemas, "read_document", lambda body: [readers.add(current_thread().name), read(body)][1])
    for text in ("x", "x" * 1000):
        body = json.dumps({"model": "m", "prompt": text}).encode()
        assert asyncio.run(schemas.read_request(body, TextRequest)).prompt == text
    assert len(readers) == 2
    document = {"prompt": [0] * 100_000, "messages": ["a"] * 100_000, "seed": {str(n): 2**63 for n in range(1000)}}
    tracemalloc.start()
    assert list(unusable(document)) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**17
    assert list(unusable([0, {"a": [1, [2**64, "b"]], "b": -(2**64)}]))[:1] == [("1.a.1.0", OUT_OF_RANGE)]


def test_every_error_can_be_sent() -> None:
    """Where its words come from elsewhere."""
    answer = ApiError(404, "no \ud83d", "model_not_found", "\udc00").response()
    assert json.loads(bytes(answer.body))["error"]["message"] == r"no \ud83d"


def test_many_and_long_unknown_names_are_told_in_short() -> None:
    error = refusal(**{f"k{n}": 1 for n in range(100)}, **{"x" * 100_000: 1})
    assert len(error.message) < 2000 and error.message.endswith("and 71 more")


def test_names_of_models() -> None:
    bases = ["tiny", "smollm2-135m"]
    assert parse_model("tiny", bases) == ModelName("tiny", None, "latest")
    assert parse_model("smollm2-135m:a.b-c", bases) == ModelName("smollm2-135m", "a.b-c", "latest")
    assert parse_model("tiny:a@0123", bases) == ModelName("tiny", "a", "0123")
    for unknown in ("", "tin", "tiny:", "tiny:a@", "tiny:@0123", "other:a", ":a", "tiny@0123"):
        assert parse_model(unknown, bases) is None, unknown


def chunks_of(text: str) -> list[Any]:
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]


@pytest.mark.parametrize("usage", [False, True])
def test_chunks_of_a_stream(usage: bool) -> None:
    response = ChatResponse(chat(stream=True, stream_options={"include_usage": usage}))
    text = response.first_chunk(StreamStart("d1g", 5)) + response.chunks(Delta("He€", None, 2))
    text += response.chunks(Delta("", "stop", 3))
    first, second, *rest = chunks_of(text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""} and first["system_fingerprint"] == "d1g"
    assert second["choices"][0] == {"index": 0, "delta": {"content": "He€"}, "logprobs": None, "finish_reason": None}
    assert rest[0]["choices"][0]["delta"] == {} and rest[0]["choices"][0]["finish_reason"] == "stop"
    assert len({chunk["id"] for chunk in (first, second, *rest)}) == 1
    if usage:
        assert first["usage"] is None and rest[1]["choices"] == []
        assert rest[1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    else:
        assert len(rest) == 1 and "usage" not in first


def test_a_text_stream_carries_the_same_text() -> None:
    response = TextResponse(parse_request(b'{"model": "m", "prompt": "x", "stream": true}', TextRequest))
    text = (
        response.first_chunk(StreamStart("d", 1))
        + response.chunks(Delta("ab", None, 1))
        + response.chunks(Delta("c", "length", 2))
    )
    assert [chunk["choices"][0]["text"] for chunk in chunks_of(text)] == ["ab", "c", ""]
    whole = response.whole(Completion(StreamStart("d", 1), (Delta("abc", "length", 2),)))
    assert whole["choices"][0]["text"] == "abc" and whole["object"] == "text_completion"
    TextCompletion.model_validate(whole, strict=True)


A, EURO, BROKEN = (
    TokenLogprob("a", b"a", -0.5, (TokenLogprob("b", b"b", -0.1), TokenLogprob("a", b"a", -0.5))),
    TokenLogprob("\ufffd", b"\xe2", -1.0, (TokenLogprob("c", b"c", -0.25),)),
    TokenLogprob("x", b"x", float("nan")),
)


def test_logprobs_of_chats() -> None:
    response = ChatResponse(chat(n=2, logprobs=True, top_logprobs=2))
    choices = Delta("a", "stop", 1, 0, (A,)), Delta("x", "stop", 2, 1, (EURO, BROKEN))
    whole = response.whole(Completion(StreamStart("d", 1), choices))
    ChatCompletion.model_validate(whole, strict=True)
    first, second = whole["choices"]
    a = {"token": "a", "bytes": [97], "logprob": -0.5}
    assert first["logprobs"]["content"] == [{**a, "top_logprobs": [{"token": "b", "bytes": [98], "logprob": -0.1}, a]}]
    assert (second["index"], second["logprobs"]["content"][0]["bytes"]) == (1, [0xE2])
    assert second["logprobs"]["content"][1]["logprob"] == -9999.0, "JSON has no NaN"


def test_logprobs_of_text_whole_and_in_chunks() -> None:
    body = b'{"model": "m", "prompt": "x", "stream": true, "n": 2, "echo": true, "logprobs": 2}'
    response = TextResponse(parse_request(body, TextRequest))
    begun = TokenLogprob("<s>", b"<s>", None)
    answer = Completion(StreamStart("d", 1), (Delta("a", "length", 1, 0, (begun, A)),))
    TextCompletion.model_validate(TextResponse(parse_request(body, TextRequest)).whole(answer), strict=True)
    text = response.chunks(Delta("", None, 0, 0, (begun, A))) + response.chunks(Delta("", None, 0, 1, (begun, A)))
    text += response.chunks(Delta("c", "length", 1, 0, (EURO,))) + response.chunks(Delta("d", "stop", 1, 1, (A,)))
    pieces = [chunk["choices"][0] for chunk in chunks_of(text)]
    assert [piece["index"] for piece in pieces] == [0, 1, 0, 0, 1, 1]
    assert pieces[0]["logprobs"] == {
        "tokens": ["<s>", "a"], "token_logprobs": [None, -0.5], "top_logprobs": [None, {"b": -0.1, "a": -0.5}],
        "text_offset": [0, 3],
    }  # fmt: skip
    assert pieces[2]["logprobs"]["text_offset"] == [4] and pieces[4]["logprobs"]["text_offset"] == [4]
    assert pieces[2]["logprobs"]["top_logprobs"] == [{"c": -0.25, "\ufffd": -1.0}]
    assert pieces[3]["logprobs"] is None and pieces[3]["finish_reason"] == "length"


CALLED = ToolCall("f", '{"x": 1}')


def test_calls_of_tools() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    choices = Delta("", "stop", 5, 0, (), (CALLED,)), Delta("a", "length", 5, 1, (), (CALLED, CALLED))
    whole = ChatResponse(chat(n=2)).whole(Completion(StreamStart("d", 1), choices))
    ChatCompletion.model_validate(whole, strict=True)
    first, second = whole["choices"]
    ids = [made.pop("id") for choice in (first, second) for made in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 3 and all(made.startswith("call_") for made in ids)
    assert first["message"] == {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    assert (first["finish_reason"], second["finish_reason"], second["message"]["content"]) == (
        "tool_calls", "length", "a"
    )  # fmt: skip
    response = ChatResponse(chat(stream=True))
    text = response.chunks(Delta("a", None, 1, 0, (), (CALLED,))) + response.chunks(
        Delta("", "stop", 2, 0, (), (CALLED,))
    )
    *made, end = (chunk["choices"][0] for chunk in chunks_of(text))
    assert [call["index"] for piece in made for call in piece["delta"]["tool_calls"]] == [0, 1]
    assert [piece["delta"].get("content") for piece in made] == ["a", None]
    assert (end["delta"], end["finish_reason"]) == ({}, "tool_calls")


def test_a_stream_of_several_choices_ends_once() -> None:
    response = ChatResponse(chat(stream=True, n=2, stream_options={"include_usage": True}))
    text = response.first_chunk(StreamStart("d", 5)) + response.chunks(Delta("a", "stop", 3, 1))
    text += response.chunks(Delta("b", None, 1, 0)) + response.chunks(Delta("c", "length", 4, 0))
    *pieces, usage = chunks_of(text)
    assert [piece["choices"][0]["index"] for piece in pieces] == [0, 1, 1, 1, 0, 0, 0]
    assert usage["usage"] == {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}


def test_too_many_questions_and_lost_replicas_may_be_tried_again() -> None:
    async def fails(error: Exception) -> None:
        raise error

    for error, status in ((BackPressureError(5, 4), 429), (DeploymentUnavailableError(DeploymentID("a")), 503)):
        with pytest.raises(ApiError) as caught:
            asyncio.run(gateway._asked(fails(error)))
        answer = caught.value.response()
        assert (answer.status_code, answer.headers["x-should-retry"], answer.headers["retry-after"]) == (
            status,
            "true",
            "1",
        )
        error = json.loads(bytes(answer.body))["error"]
        assert (error["type"], error["code"]) == (
            ("rate_limit_error", "overloaded") if status == 429 else ("server_error", "server_restarting")
        )
