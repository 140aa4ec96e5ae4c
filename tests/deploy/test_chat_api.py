"""One Serve application on a real Ray, asked with OpenAI's own client."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from cluster import metrics as every_metric
from cluster.metrics import MetricSpec
from cluster.registry import AdapterRegistry, AdapterVersion
from cluster.settings import Settings
from cluster.storage.directory import open_storage
from jobs.store.api_keys import KeyTable, Scope
from jobs.store.database import Database
from lora_core.adapters.adapter import Adapter
from lora_core.adapters.peft_format import adapter_files
from lora_core.models.base import BaseModel, load_base
from lora_core.models.hooks.bank import AdapterBank
from tests.support.models import logits_of, random_adapter
from tests.support.serve_app import running_app
from tests.support.tiny_models import save_tiny_model

pytestmark = pytest.mark.alone


class App:
    """The running application, the registry behind it, and the base as this process sees it."""

    def __init__(self, port: int, metrics_port: int, home: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=2, timeout=60)
        self.registry = AdapterRegistry(open_storage((home / "storage").as_uri()))
        self.keys = KeyTable(Database(Settings(home=home).database_url))
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
        ours = re.compile(r'(base|adapter|finish_reason|result|stage|tier)="([^"]*)"')
        return {
            f"{line.split('{')[0]}{{{','.join(f'{k}={v}' for k, v in sorted(ours.findall(line)))}}}": float(
                line.split()[-1]
            )
            for line in lines
        }


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    home = tmp_path_factory.mktemp("served")
    base = save_tiny_model("llama", home / "tiny", seed=6)
    settings = {"LORA_THREADS": "1", "LORA_MAX_ONGOING_REQUESTS": "16", "LORA_MAX_QUEUED_REQUESTS": "16"}
    settings |= {"LORA_CLUSTER": "elsewhere", "LORA_MAX_WORKERS": "1"}  # jobs wait for a scheduler that does not come
    with running_app(home, {"tiny": base}, settings) as running:
        yield App(running.port, running.metrics_port, home)


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


def test_choices_and_logprobs_reach_the_client(app: App) -> None:
    options: dict[str, Any] = {"n": 2, "temperature": 1.0, "seed": 3, "logprobs": True, "top_logprobs": 1}
    whole = app.ask("tiny", "Tell me", **options)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in whole.choices)
    chunks = list(app.ask("tiny", "Tell me", **options, stream=True))
    for choice in whole.choices:
        pieces = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
        tokens = [token for piece in pieces if piece.logprobs for token in piece.logprobs.content]
        assert [(token.token, token.bytes) for token in tokens] == [
            (token.token, token.bytes) for token in choice.logprobs.content
        ]
    scored = app.client.completions.create(model="tiny", prompt="Hello", echo=True, logprobs=1, max_tokens=0)
    logprobs = scored.choices[0].logprobs
    assert scored.choices[0].text == "Hello" and logprobs is not None and logprobs.token_logprobs is not None
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    assert logprobs.token_logprobs[0] is None and all(value < 0 for value in logprobs.token_logprobs[1:])


def test_a_new_version_is_served_soon_and_an_old_one_by_name(app: App) -> None:
    first = app.publish("moving", 3)
    prompt, text = clear_answer(app, first[0])
    assert app.text("tiny:moving", prompt) == text
    second = app.publish("moving", 4)
    wait_for(lambda: app.ask("tiny:moving", prompt).system_fingerprint == second[1].digest)
    assert app.text(f"tiny:moving@{first[1].version}", prompt) == text


def test_too_much_at_once_is_told_to_come_back(app: App) -> None:
    client = app.client.with_options(max_retries=0)

    def ask(_: int) -> openai.RateLimitError | None:
        try:
            client.completions.create(model="tiny", prompt="Hello", max_tokens=120, temperature=0)
        except openai.RateLimitError as error:
            return error
        return None

    with ThreadPoolExecutor(64) as pool:
        refused = [error for error in pool.map(ask, range(64)) if error is not None]
    assert 0 < len(refused) < 64
    headers = refused[0].response.headers
    assert (headers["retry-after"], headers["x-should-retry"], refused[0].code) == ("1", "true", "overloaded")


def test_errors_are_openais(app: App) -> None:
    app.publish("known", 8)
    with pytest.raises(openai.NotFoundError) as missing:
        app.ask("tiny:unknown", "x")
    assert missing.value.code == "model_not_found" and missing.value.param == "model" and missing.value.request_id
    assert "the model 'tiny:unknown' does not exist; there are: tiny, " in missing.value.message
    with pytest.raises(openai.NotFoundError, match="there are: tiny"):
        app.ask("other", "x", stream=True)
    with pytest.raises(openai.NotFoundError, match="no version or alias 0000 of tiny:known; published: latest"):
        app.ask("tiny:known@0000", "x")
    with pytest.raises(openai.BadRequestError) as bad:
        app.ask("tiny", "x", temperature=3, n=0)
    assert "temperature must be" in bad.value.message and "n must be at least 1" in bad.value.message
    with pytest.raises(openai.BadRequestError, match="context of 4096") as long:
        app.ask("tiny", "x" * 5000, stream=True)
    assert long.value.code == "context_length_exceeded"
    app.publish("foreign", 9, base_fingerprint="0" * 64)
    with pytest.raises(openai.ConflictError, match="was trained on another base") as refused:
        app.ask("tiny:foreign", "x")
    assert refused.value.request.headers["x-stainless-retry-count"] == "0", "the client must not try again"
    assert refused.value.response.headers["x-should-retry"] == "false" and refused.value.code == "adapter_refused"
    with pytest.raises(openai.NotFoundError) as path:
        app.client.get("/nothing", cast_to=object)
    assert path.value.code == "unknown_url"


def test_models_are_listed_and_found(app: App) -> None:
    _, version = app.publish("listed", 10)
    wait_for(lambda: "tiny:listed" in [model.id for model in app.client.models.list()])
    models = {model.id: model for model in app.client.models.list()}
    assert models["tiny"].object == "model" and models["tiny:listed"].created == int(version.manifest["created_at"])
    extra = {"root": "tiny", "digest": version.digest, "version": 1, "aliases": ["latest"]}
    assert (app.client.models.retrieve("tiny:listed").model_extra or {}).items() >= extra.items()
    assert app.client.models.retrieve(f"tiny:listed@{version.version}").id == f"tiny:listed@{version.version}"
    for unknown in ("tiny:nothing", "org/model", "tiny:listed@0000"):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            app.client.models.retrieve(unknown)
    with urllib.request.urlopen(f"{app.url}/healthz") as answer:
        assert answer.status == 200
    capacity: Any = app.client.get("/capacity", cast_to=object)
    (base,) = capacity["bases"]
    (replica,) = base["replicas"]
    assert base["resident"] and replica["adapters"] >= 1 and replica["free_adapter_slots"] > 0, capacity


def test_a_job_is_checked_beside_the_answers_and_goes_into_the_queue(app: App, tmp_path: Path) -> None:
    """In a process that the first of them starts. What jobs and models answer is tested without Ray."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "item: ", "completion": "code"}\n' * 8)
    jobs, file = app.client.fine_tuning.jobs, app.client.files.create(file=rows, purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="num_workers is 2, but this cluster has room for 1"):
        jobs.create(model="tiny", training_file=file.id, extra_body={"num_workers": 2})
    job = jobs.create(model="tiny", training_file=file.id, suffix="queued")
    assert (job.status, job.training_file) == ("queued", file.id) and [one.id for one in jobs.list()] == [job.id]
    assert jobs.cancel(job.id).status == "cancelled"


def test_a_client_that_leaves_frees_its_place_and_metrics_say_so(app: App) -> None:
    aborted = "ray_lora_requests_total{adapter=,base=tiny,finish_reason=abort}"
    endless: dict[str, Any] = {"max_tokens": 4000, "temperature": 0, "n": 2, "logit_bias": {"256": -100, "258": -100}}
    stream = app.ask("tiny", "Go on", **endless, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: app.metrics().get(aborted) == 1.0, 30)
    with pytest.raises(openai.APITimeoutError):  # who waits for a whole answer, and leaves
        app.client.with_options(timeout=1.5, max_retries=0).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Go on"}], **endless
        )
    wait_for(lambda: app.metrics().get(aborted) == 2.0, 30)
    wait_for(lambda: app.metrics()["ray_lora_num_requests_running{base=tiny}"] == 0)
    metrics = app.metrics()
    names = {name.split("{")[0] for name in metrics}
    for spec in vars(every_metric).values():
        if isinstance(spec, MetricSpec) and spec.source == "serving" and spec is not every_metric.API_ERRORS:
            assert spec.exported + ("_count" if spec.kind == "histogram" else "") in names, spec.name
    assert metrics["ray_lora_requests_total{adapter=one,base=tiny,finish_reason=length}"] >= 4
    assert metrics["ray_lora_generation_tokens_total{adapter=one,base=tiny}"] >= 16
    assert metrics["ray_lora_adapter_cache_total{result=hit,tier=device}"] > 0
    assert metrics["ray_lora_time_to_first_token_seconds_count{base=tiny}"] > 20
    stages = [name for name in metrics if name.startswith("ray_lora_adapter_load_seconds_count")]
    assert {name[name.index("stage=") + 6 : -1] for name in stages} == {"fetch", "parse", "probe"}


def test_with_the_first_key_nobody_is_answered_without_one(app: App) -> None:
    """The last test of this file: nothing opens the service again."""
    rows = b'{"text": "one"}\n' * 200_000  # in many messages, and checked in another process
    file = app.client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    assert (file.status, app.client.files.content(file.id).read()) == ("processed", rows)
    answer = app.client.models.with_raw_response.list(extra_headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1", "once, and the client's own"
    _, secret = app.keys.create("default", frozenset({Scope.INFER}), tokens_per_minute=1000)

    def refused() -> bool:
        try:
            return not app.client.models.list()
        except openai.AuthenticationError as error:
            return bool(error.request_id) and error.code == "invalid_api_key"

    wait_for(refused)
    raw = app.client.with_options(api_key=secret).chat.completions.with_raw_response.create(
        model="tiny:one", messages=[{"role": "user", "content": "Hi"}], max_tokens=2
    )
    assert raw.parse().choices[0].message and 0 < int(raw.headers["x-ratelimit-remaining-tokens"]) <= 1000
