"""An adapter server without Ray around it: what it answers, in which forms, and what it gives up."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from cluster.settings import Settings
from deploy.serving import decode_loop
from deploy.serving import metrics as ray_metrics
from deploy.serving.decode_loop import DecodeLoop, DecodeLoopError
from deploy.serving.protocol import Completion, Delta, ErrorResponse, StreamStart, TokenIds
from deploy.serving.server import AdapterServer
from lora_core.inference.engine import Generator
from lora_core.inference.generation import GeneratedToken, GenerationRequest
from lora_core.inference.sampling_params import SamplingParams
from lora_core.models.places import place_of
from tests.support.adapter_service import ENDLESS, QUESTION, Service, about, run, until
from tests.support.tiny_models import save_tiny_model, with_more_tokens


def test_a_stream_is_the_answer_in_pieces(service: Service) -> None:
    async def both() -> tuple[Completion, list[Any]]:
        return await service.server.answer(QUESTION), [item async for item in service.server.stream(QUESTION)]

    answer, items = run(both())
    start, *deltas = items
    assert start == answer.start == StreamStart(service.trained.fingerprint, 21)
    assert "".join(delta.text for delta in deltas) == answer.choices[0].text != ""
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert deltas[-1].completion_tokens == answer.choices[0].completion_tokens == 12


def test_choices_are_those_of_their_seeds_with_the_prompt_and_its_scores(service: Service) -> None:
    seeded = SamplingParams(temperature=1.0, seed=4)
    asked = dataclasses.replace(QUESTION, prompt="€ and more", sampling=seeded, n=3, logprobs=2, echo=True)
    alone = [dataclasses.replace(asked, sampling=seeded.of_choice(index), n=1) for index in range(3)]

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(service.server.answer(one) for one in (asked, *alone)))

    answer, *others = run(all_of_them())
    assert [choice.text for choice in answer.choices] == [one.choices[0].text for one in others]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    for choice in answer.choices:
        assert choice.text.startswith("€ and more") and choice.completion_tokens == 12
        first, *scored = choice.logprobs
        assert (first.data, first.logprob, first.top) == (b"\xe2", None, ())
        assert len(scored) == 11 + 12 and all(len(token.top) == 2 and token.logprob <= 0 for token in scored)
        specials = {token.data: b"" for token in scored if token.data.startswith(b"<|")}
        shown = b"".join(specials.get(token.data, token.data) for token in choice.logprobs)
        assert shown.decode(errors="replace") == choice.text
    scoring = dataclasses.replace(asked, n=1, max_tokens=0)
    (only,) = run(service.server.answer(scoring)).choices
    assert (only.text, only.completion_tokens, only.finish_reason) == ("€ and more", 0, "length")
    assert [token.text for token in only.logprobs] == [token.text for token in answer.choices[0].logprobs[:12]]
    ids = TokenIds(tuple(service.server._tokenizer("€ and more")["input_ids"]))
    assert run(service.server.answer(dataclasses.replace(scoring, prompt=ids))).choices == (only,)
    refused = run(service.server.answer(dataclasses.replace(scoring, prompt=TokenIds((5, 9999)))))
    assert refused.status == 400 and "the token `unknown`, whose id is 9999" in refused.message


TICKET: dict[str, Any] = {
    "type": "object",
    "properties": {"level": {"enum": [1, 2, 30]}},
    "required": ["level"],
    "additionalProperties": False,
}
BARE_CALLS = "{% for t in tools or [] %}{{ t }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
TAGGED_CALLS = BARE_CALLS.replace("{{ t }}", "{{ t }}<tool_call>")


def test_formats_are_followed_and_a_bad_schema_fails_alone(service: Service) -> None:
    formed = dataclasses.replace(QUESTION, json_schema=TICKET, n=2, sampling=SamplingParams(seed=1), max_tokens=200)
    bad = dataclasses.replace(formed, json_schema={"type": "objekt"})

    async def side_by_side() -> list[Any]:
        return await asyncio.gather(*(service.server.answer(asked) for asked in (formed, bad, QUESTION)))

    answer, refused, free = run(side_by_side())
    for choice in answer.choices:
        assert json.loads(choice.text)["level"] in (1, 2, 30) and choice.finish_reason == "stop"
    assert isinstance(refused, ErrorResponse) and (refused.status, refused.code) == (400, "invalid_json_schema")
    assert "objekt" in refused.message
    assert free == run(service.server.answer(QUESTION))


def test_tools_are_called_where_the_template_shows_them(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = {"type": "function", "function": {"name": "open", "parameters": TICKET}}
    sampling = SamplingParams(seed=1)
    asked = dataclasses.replace(
        QUESTION, tools=(tool,), forced_tools=("open",), max_tokens=200, n=2, sampling=sampling, logprobs=0
    )
    refused = run(service.server.answer(asked))
    assert isinstance(refused, ErrorResponse) and refused.status == 400 and "shows no tools" in refused.message
    choices: list[Delta] = []
    for template in (TAGGED_CALLS, BARE_CALLS):
        monkeypatch.setattr(service.server._tokenizer, "chat_template", template)
        choices += run(service.server.answer(asked)).choices
    for choice in choices:
        (call,) = choice.tool_calls
        assert (call.name, choice.text, choice.finish_reason) == ("open", "", "stop")
        assert json.loads(call.arguments)["level"] in (1, 2, 30)
        assert len(choice.logprobs) == choice.completion_tokens
    free = run(service.server.answer(dataclasses.replace(asked, forced_tools=(), max_tokens=12)))
    assert free.choices[0].text and not free.choices[0].tool_calls


def test_unknown_names_and_impossible_questions(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    known = service.publish("known", 60)
    missing = run(service.server.answer(about(dataclasses.replace(known, digest="0" * 64))))
    assert missing.status == 404 and "there is no version 0000000000000000 of tiny:known" in missing.message
    long = dataclasses.replace(QUESTION, prompt=({"role": "user", "content": "x" * 5000},))
    refused = run(service.server.answer(long))
    assert (refused.status, refused.code) == (400, "context_length_exceeded") and "5019 tokens" in refused.message
    monkeypatch.setattr(service.server._tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    refused = run(service.server.answer(QUESTION))
    assert refused.status == 400 and "roles must alternate" in refused.message
    monkeypatch.setattr(service.server._tokenizer, "chat_template", None)
    assert "no chat template" in run(service.server.answer(QUESTION)).message
    assert run(service.server.answer(dataclasses.replace(QUESTION, prompt=""))).message == "the prompt is empty"
    text = run(service.server.answer(dataclasses.replace(QUESTION, prompt="Hi")))
    assert text.start.prompt_tokens == 2


def test_a_token_that_the_base_has_no_row_for_harms_nobody_else(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Gemma 3 1B's tokenizer has one for images: an index past the embedding would end everybody's step."""
    generator = service.server._loop._generator
    more = with_more_tokens(service.trained.tokenizer)
    monkeypatch.setattr(service.server, "_tokenizer", more)
    monkeypatch.setattr(generator.base, "tokenizer", more)
    patient = dataclasses.replace(QUESTION, max_tokens=200)

    async def ask() -> None:
        before = await service.server.answer(patient)
        innocent = asyncio.create_task(service.server.answer(patient))
        await until(lambda: generator.running == 1)
        for prompt in ("<|more|>", ({"role": "user", "content": "what is <|more|>?"},)):
            refused = await service.server.answer(dataclasses.replace(QUESTION, prompt=prompt))
            assert (refused.status, refused.code) == (400, "invalid_prompt")
            assert (
                "the token `<|more|>`, whose id is 264, and this base model's embedding has 264 rows" in refused.message
            )
        assert await innocent == before == await service.server.answer(patient)

    run(ask())


def test_who_stops_listening_gives_the_request_up(service: Service) -> None:
    async def leave() -> None:
        async with aclosing(service.server.stream(ENDLESS)) as items:
            assert isinstance(await anext(items), StreamStart)
            assert isinstance(await anext(items), Delta)
            assert not service.idle
        await until(lambda: service.idle)
        task = asyncio.create_task(service.server.answer(ENDLESS))
        await until(lambda: not service.idle)
        task.cancel()
        await until(lambda: service.idle)
        task = asyncio.create_task(service.server.answer(ENDLESS))
        await asyncio.sleep(0)  # it is on its way to the decode loop, which has not taken it yet
        task.cancel()
        await asyncio.sleep(0.05)
        await until(lambda: service.idle)
        assert not service.server._loop._handles

    run(leave())


def test_more_questions_than_slots_are_all_answered(service: Service) -> None:
    versions = [service.publish(f"crowd-{i}", 70 + i) for i in range(3)]

    async def crowd() -> list[Any]:
        requests = [QUESTION, *map(about, versions)] * 5
        return await asyncio.gather(*(service.server.answer(asked) for asked in requests))

    answers = run(crowd())
    assert len(answers) == 20 and {answer.choices[0].completion_tokens for answer in answers} == {12}
    assert len({answer.start.digest for answer in answers}) == 4


def test_a_replica_says_what_it_holds_and_does(service: Service) -> None:
    version = service.publish("held", 80)
    before = run(service.server.load_report())
    run(service.server.answer(about(version)))
    load = run(service.server.load_report())
    base = service.server._base
    assert (load.place, load.precision, load.slots) == (place_of(base.device), base.precision, 32)
    assert (load.adapters, load.adapter_capacity) == (before.adapters + 1, 2 * 2**30)
    shapes = [service.bank.shapes[name] for name in service.bank.linears]
    assert load.slot_bytes == 16 * base.model.dtype.itemsize * sum(takes + gives for takes, gives in shapes)
    assert 0 < load.adapter_bytes - before.adapter_bytes < load.slot_bytes, "this one is of lower rank"
    assert (load.running, load.waiting) == (0, 0) and load.tokens_per_second >= 1.2 and load.base_bytes > 0


def test_the_rate_is_of_the_last_ten_seconds() -> None:
    now = [0.2]
    rate = ray_metrics.TokenRate(lambda: now[0])
    rate.add(5)
    for now[0], tokens, per_second in ((0.9, 5, 1.0), (9.9, 20, 3.0), (10.0, 0, 2.0), (30.0, 0, 0.0)):
        rate.add(tokens)
        assert rate.per_second == per_second


def test_gauges_are_set_again_before_ray_forgets_them(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray drops one that was not set for 20 s, so a server without work must go on setting its zeros."""
    assert decode_loop._IDLE_SECONDS + ray_metrics._GAUGE_SECONDS <= 10
    monkeypatch.setattr(decode_loop, "_IDLE_SECONDS", 0.02)
    monkeypatch.setattr(ray_metrics, "_GAUGE_SECONDS", 0.01)
    gauges = ray_metrics.QueueGauges("tiny")
    values: list[float] = []
    for gauge in gauges._gauges:
        monkeypatch.setattr(gauge, "set", lambda value, tags: values.append(value))
    loop = DecodeLoop(Generator(service.trained, service.forward, slots=1, max_len=64), threads=1, observe=gauges.show)
    assert run(loop.call(lambda: 5)) == 5
    run(until(lambda: len(values) >= 8))
    assert set(values) == {0}


def test_health_is_the_age_of_the_step_while_there_is_work(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(service.trained, service.forward, slots=1, max_len=64)
    loop = DecodeLoop(generator, threads=1, observe=lambda running, waiting: None, patience=0.05)
    step, stuck = generator.step, threading.Event()

    def hanging() -> list[GeneratedToken]:
        stuck.wait(20)
        return step()

    async def ask() -> None:
        await asyncio.sleep(0.2)
        loop.check_health()  # idle for longer than a step may take
        monkeypatch.setattr(generator, "step", hanging)
        request = GenerationRequest(prompt=[1, 2], max_tokens=1, sampling=SamplingParams(temperature=0.0))
        async with loop.answering([request]) as batches:
            await asyncio.sleep(0.2)
            with pytest.raises(DecodeLoopError, match=r"is stuck: its step has taken \d+ s"):
                loop.check_health()
            stuck.set()
            assert len([batch async for batch in batches]) == 1
        await until(lambda: generator.running == 0)
        await asyncio.sleep(0.2)
        loop.check_health()

    run(ask())


def test_a_base_is_served_in_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "tiny", 6)
    server = AdapterServer(
        "tiny", Settings(home=tmp_path, base_models={"tiny": str(folder)}, threads=1, serve_precision="nf4")
    )
    assert server._base.precision == "nf4" and isinstance(run(server.answer(QUESTION)), Completion)


def test_a_failed_step_fails_the_requests_and_the_health_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(tmp_path)
    service.server.check_health()

    def broken() -> list[Any]:
        raise RuntimeError("out of memory")

    async def ask() -> list[Any]:
        task = asyncio.create_task(service.server.answer(ENDLESS))
        await until(lambda: not service.idle)
        monkeypatch.setattr(service.server._loop._generator, "step", broken)
        return [await task, await service.server.answer(QUESTION)]

    for answer in run(ask()):
        assert isinstance(answer, ErrorResponse) and (answer.status, answer.code) == (503, "server_restarting")
        assert "out of memory" in answer.message
    with pytest.raises(RuntimeError, match="out of memory"):
        service.server.check_health()
