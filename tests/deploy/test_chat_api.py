"""OpenAI's API: what is accepted and answered, and one Serve application on a real Ray, asked with the stock client."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cluster import metrics as every_metric
from cluster.metrics import MetricSpec
from cluster.registry import AdapterRegistry, AdapterVersion
from cluster.settings import Settings
from cluster.storage.directory import open_storage
from deploy import app as application
from deploy.api import gateway
from deploy.api.responses import ChatResponse, ModelName, TextResponse, parse_model
from deploy.api.schemas import ApiError, ChatRequest, TextRequest, parse_request
from deploy.serving.protocol import Completion, Delta, StreamStart
from lora_core.adapters.adapter import Adapter
from lora_core.adapters.peft_format import adapter_files
from lora_core.inference.sampling_params import SamplingParams
from lora_core.models.base import BaseModel, load_base
from lora_core.models.hooks.bank import AdapterBank
from tests.support.machine import clean_environment, free_port
from tests.support.models import logits_of, random_adapter
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
HELLO = [{"role": "user", "content": "Hello"}]


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
    ).generate_request("triage", "latest")
    assert asked.prompt == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab", "name": "Ann"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    )
    assert (asked.adapter, asked.version, asked.max_tokens, asked.sampling.temperature) == (
        "triage",
        "latest",
        7,
        0.0,
    )
    assert asked.stop == ("END",)
    assert asked.sampling == SamplingParams(
        temperature=0.0, top_p=0.5, top_k=40, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=-1.0, logit_bias={5: 100.0}, seed=3,
    )  # fmt: skip
    defaults = chat(temperature=None, stop=["a", "b"]).generate_request(None, "latest")
    assert (defaults.sampling, defaults.max_tokens) == (SamplingParams(), None)
    assert defaults.stop == ("a", "b")


def test_text_completions_default_to_16_tokens_as_openai_has_it() -> None:
    request = parse_request(b'{"model": "m", "prompt": "once"}', TextRequest)
    asked = request.generate_request(None, "latest")
    assert (asked.prompt, asked.max_tokens) == ("once", 16)


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
        ("n", 2),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
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


@pytest.mark.parametrize("parameter", ["echo", "suffix", "best_of", "logprobs"])
def test_so_is_one_of_text_completions(parameter: str) -> None:
    value = {"echo": True, "suffix": "end", "best_of": 4, "logprobs": 0}[parameter]
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
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages.0.tool_calls: calls are"),
        ({"messages": ["hi"]}, "messages.0 must be a block of options"),
        ({"max_token": 5}, "max_token is no parameter here; did you mean max_tokens?"),
        ({"model": None}, "model must be text"),
    ],
)
def test_bad_values_get_a_sentence(parameters: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(**parameters).message


def test_everything_wrong_is_said_at_once() -> None:
    error = refusal(temperature=9, top_p=-1, n=3, colour="red", messages=[{"role": "x", "content": 1}])
    for name in ("temperature", "top_p", "n is", "colour is", "messages.0.role", "messages.0.content"):
        assert name in error.message, error.message
    for body in (b"{", b"[]", b'"x"', b"\xff"):
        with pytest.raises(ApiError, match="JSON"):
            parse_request(body, ChatRequest)


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
    answer = gateway._answer_error(caught.value)
    error = json.loads(bytes(answer.body))["error"]
    assert (answer.status_code, answer.headers["x-should-retry"], error["param"]) == (400, "false", param)
    assert param is None or error["message"].startswith(param)


def test_a_prompt_with_half_a_character_is_named() -> None:
    with pytest.raises(ApiError, match="prompt has half of a surrogate pair") as caught:
        parse_request(rb'{"model": "m", "prompt": "cut \ud83d"}', TextRequest)
    assert caught.value.param == "prompt"


def test_every_error_can_be_sent() -> None:
    """Where its words come from elsewhere."""
    answer = gateway._answer_error(ApiError(404, "no \ud83d", "model_not_found", "\udc00"))
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
    whole = response.whole(Completion(StreamStart("d", 1), "abc", "length", 2))
    assert whole["choices"][0]["text"] == "abc" and whole["object"] == "text_completion"


def test_too_many_questions_and_lost_replicas_may_be_tried_again() -> None:
    async def fails(error: Exception) -> None:
        raise error

    for error, status in ((BackPressureError(5, 4), 429), (DeploymentUnavailableError(DeploymentID("a")), 503)):
        with pytest.raises(ApiError) as caught:
            asyncio.run(gateway._asked(fails(error)))
        assert (caught.value.status, caught.value.retry) == (status, True)


def test_the_application_is_imported_without_torch() -> None:
    code = "import sys, deploy.app; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_replicas_ask_for_a_share_of_a_gpu_only_where_there_are_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application, "_has_gpus", lambda: False)
    assert application._resources(Settings(home=tmp_path)) == {"num_cpus": 0}
    assert application._resources(Settings(home=tmp_path, gpus_per_replica=1))["num_gpus"] == 1
    monkeypatch.setattr(application, "_has_gpus", lambda: True)
    assert application._resources(Settings(home=tmp_path)) == {"num_cpus": 0, "num_gpus": 0.4}


@pytest.mark.parametrize(("visible", "there"), [(None, True), ("0", True), ("", False), ("-1", False)])
def test_gpus_that_are_hidden_from_ray_are_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, there: bool
) -> None:
    monkeypatch.setattr(application.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(application.Path, "glob", lambda path, pattern: iter([path / "nvidia0"]))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert application._has_gpus() is there


# One application on a Ray of its own.


class App:
    """The running application, the registry behind it, and the base as this process sees it."""

    def __init__(self, port: int, metrics_port: int, home: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=2, timeout=60)
        self.registry = AdapterRegistry(open_storage((home / "storage").as_uri()))
        self.base: BaseModel = load_base(str(home / "tiny"), precision="fp32", cache_dir=home / "cache")
        self.bank = AdapterBank(self.base.model)
        self._metrics_port = metrics_port

    def publish(self, name: str, seed: int, **manifest: Any) -> tuple[Adapter, AdapterVersion]:
        adapter = random_adapter(self.bank, seed)
        files = adapter_files(adapter, self.bank, "tiny")
        own = {"base_fingerprint": self.base.fingerprint, "precision": "fp32"}
        return adapter, self.registry.publish("tiny", name, files, {**own, **manifest})

    def ask(self, model: str, prompt: str, **options: Any) -> Any:
        options = {"temperature": 0, "max_tokens": 4, **options}
        messages = [{"role": "user", "content": prompt}]
        return self.client.chat.completions.create(model=model, messages=messages, **options)

    def text(self, model: str, prompt: str, **options: Any) -> str:
        return str(self.ask(model, prompt, **options).choices[0].message.content)

    def metrics(self) -> dict[str, float]:
        """name{labels of ours} -> value."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics") as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_lora_")]
        ours = re.compile(r'(base|adapter|finish_reason|result|stage)="([^"]*)"')
        return {
            f"{line.split('{')[0]}{{{','.join(f'{k}={v}' for k, v in sorted(ours.findall(line)))}}}": float(
                line.split()[-1]
            )
            for line in lines
        }


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    home = tmp_path_factory.mktemp("served")
    save_tiny_model("llama", home / "tiny", seed=6)
    port = free_port()
    environment = clean_environment("AWS_") | {
        "LORA_HOME": str(home),
        "LORA_BASE_MODELS": json.dumps({"tiny": str(home / "tiny")}),
        "LORA_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",  # or Ray would make a token in this user's home
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory(prefix="lora-ray-", dir="/tmp") as folder:  # a socket's path must be short
        log = home / "serve.log"
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.serve_app", str(port), folder],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("wb"), text=True,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, log.read_text()
            yield App(port, json.loads(line)["metrics_port"], home)
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def clear_answer(app: App, adapter: Adapter | None, tokens: int = 4) -> tuple[str, str]:
    """A question and its greedy answer, each token of it likelier than any other by far more than rounding makes."""
    for number in range(2000):
        prompt = f"question {number}"
        messages = [{"role": "user", "content": prompt}]
        ids = list(app.base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        start = len(ids)
        while len(ids) < start + tokens:
            logits = logits_of(app.base, torch.tensor([ids]), app.bank, adapter)[0, -1]
            first, second = logits.topk(2).values
            if first - second < 0.3 * logits.std() or int(logits.argmax()) >= 256:
                break
            ids.append(int(logits.argmax()))
        else:
            return prompt, str(app.base.tokenizer.decode(ids[start:]))
    raise AssertionError("no clear answer")


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_base_and_adapters_answer_side_by_side(app: App) -> None:
    adapters = {"tiny": None, "tiny:one": app.publish("one", 1), "tiny:two": app.publish("two", 2)}
    wanted = {model: clear_answer(app, published and published[0]) for model, published in adapters.items()}
    jobs = [(model, *wanted[model]) for model in wanted] * 4
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda job: app.ask(job[0], job[1]), jobs))
    for (model, _, text), answer in zip(jobs, answers, strict=True):
        assert answer.choices[0].message.content == text and answer.choices[0].finish_reason == "length"
        published = adapters[model]
        assert answer.system_fingerprint == (published[1].digest if published else app.base.fingerprint)
        assert answer.model == model and answer.usage.completion_tokens == 4
    assert app.text("tiny", wanted["tiny:one"][0]) != wanted["tiny:one"][1], "the adapter must change the answer"


def test_a_stream_is_the_same_answer(app: App) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "seed": 5, "top_p": 0.9}
    whole = app.ask("tiny", "Tell me", **options)
    chunks = list(app.ask("tiny", "Tell me", **options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and len(chunks) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and {chunk.system_fingerprint for chunk in chunks} == {app.base.fingerprint}
    other = app.text("tiny", "Tell me", **{**options, "seed": 6})
    assert other != text
    stopped = app.ask("tiny", "Tell me", **options, stop=[text[3:5]])
    assert stopped.choices[0].message.content == text[: text.index(text[3:5])]
    assert stopped.choices[0].finish_reason == "stop"


def test_plain_text_is_continued(app: App) -> None:
    answer = app.client.completions.create(model="tiny", prompt="Hello", max_tokens=6, temperature=0)
    parts = app.client.completions.create(model="tiny", prompt="Hello", max_tokens=6, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == answer.choices[0].text != ""
    assert answer.usage is not None and answer.usage.prompt_tokens == 5


def test_a_new_version_is_served_soon_and_an_old_one_by_name(app: App) -> None:
    first = app.publish("moving", 3)
    prompt, text = clear_answer(app, first[0])
    assert app.text("tiny:moving", prompt) == text
    second = app.publish("moving", 4)
    wait_for(lambda: app.ask("tiny:moving", prompt).system_fingerprint == second[1].digest, 5)
    assert app.text(f"tiny:moving@{first[1].version}", prompt) == text


def test_errors_are_openais(app: App) -> None:
    app.publish("known", 8)
    with pytest.raises(openai.NotFoundError) as missing:
        app.ask("tiny:unknown", "x")
    assert missing.value.code == "model_not_found" and missing.value.param == "model" and missing.value.request_id
    assert "the model 'tiny:unknown' does not exist; there are: tiny, " in missing.value.message
    with pytest.raises(openai.NotFoundError, match="there are: tiny"):
        app.ask("other", "x", stream=True)
    with pytest.raises(openai.NotFoundError, match=r"there is no version 0000 of tiny:known; published: \w{16}"):
        app.ask("tiny:known@0000", "x")
    with pytest.raises(openai.BadRequestError) as bad:
        app.ask("tiny", "x", temperature=3, n=2)
    assert "temperature must be" in bad.value.message and "n is not supported" in bad.value.message
    with pytest.raises(openai.BadRequestError, match="context of 4096") as long:
        app.ask("tiny", "x" * 5000, stream=True)
    assert long.value.code == "context_length_exceeded"
    app.publish("foreign", 9, base_fingerprint="0" * 64)
    began = time.monotonic()
    with pytest.raises(openai.ConflictError, match="was trained on another base") as refused:
        app.ask("tiny:foreign", "x")
    assert time.monotonic() - began < 0.9, "the client must not try again"  # it would wait 0.5 s and 1 s
    assert refused.value.response.headers["x-should-retry"] == "false" and refused.value.code == "adapter_refused"
    with pytest.raises(openai.NotFoundError) as path:
        app.client.get("/nothing", cast_to=object)
    assert path.value.code == "unknown_url"


def test_models_are_listed_and_found(app: App) -> None:
    _, version = app.publish("listed", 10)
    wait_for(lambda: "tiny:listed" in [model.id for model in app.client.models.list()])
    models = {model.id: model for model in app.client.models.list()}
    assert models["tiny"].object == "model" and models["tiny:listed"].created == int(version.manifest["created_at"])
    assert app.client.models.retrieve("tiny:listed").model_extra == {"root": "tiny", "digest": version.digest}
    assert app.client.models.retrieve(f"tiny:listed@{version.version}").id == f"tiny:listed@{version.version}"
    for unknown in ("tiny:nothing", "org/model", "tiny:listed@0000"):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            app.client.models.retrieve(unknown)
    with urllib.request.urlopen(f"{app.url}/healthz") as answer:
        assert answer.status == 200


def test_a_client_that_leaves_frees_its_place_and_metrics_say_so(app: App) -> None:
    aborted = "ray_lora_requests_total{adapter=,base=tiny,finish_reason=abort}"
    stream = app.ask("tiny", "Go on", max_tokens=4000, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: app.metrics().get(aborted) == 1.0, 30)
    wait_for(lambda: app.metrics()["ray_lora_num_requests_running{base=tiny}"] == 0)
    metrics = app.metrics()
    names = {name.split("{")[0] for name in metrics}
    for spec in vars(every_metric).values():
        if isinstance(spec, MetricSpec) and spec.source == "ray":
            assert spec.exported + ("_count" if spec.kind == "histogram" else "") in names, spec.name
    assert metrics["ray_lora_requests_total{adapter=one,base=tiny,finish_reason=length}"] >= 4
    assert metrics["ray_lora_generation_tokens_total{adapter=one,base=tiny}"] >= 16
    assert metrics["ray_lora_adapter_cache_total{result=hit}"] > 0
    assert metrics["ray_lora_time_to_first_token_seconds_count{base=tiny}"] > 20
    stages = [name for name in metrics if name.startswith("ray_lora_adapter_load_seconds_count")]
    assert {name[name.index("stage=") + 6 : -1] for name in stages} == {"fetch", "parse", "probe"}
