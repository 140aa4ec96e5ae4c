"""One trace leads from the client through the gateway to the engine, and is none while nobody collects."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from starlette.types import Message, Receive, Scope, Send

from cluster.settings import Settings
from deploy.api import observation
from tests.support.adapter_service import Service, about, run
from tests.support.api_server import running_gateway
from tests.support.trace_collector import collected

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def ask(url: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    answer = requests.post(f"{url}/v1/chat/completions", json=body, headers={"traceparent": CLIENT}, timeout=10)
    assert answer.status_code == 200


def test_a_request_is_traced_from_the_client_to_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(tmp_path)
    version = service.publish("one", 1)
    with running_gateway(Settings(home=tmp_path / "gateway")) as (url, base, _):
        ask(url)
        assert base.asked is not None and base.asked.traceparent is None
        with collected(monkeypatch) as spans:
            ask(url)
            handed = base.asked.traceparent
            run(service.server.answer(dataclasses.replace(about(version), traceparent=handed)))
    assert {span.trace_id.hex() for span in spans.values()} == {CLIENT.split("-")[1]}
    parents = {name: span.parent_span_id.hex() for name, span in spans.items()}
    answer = spans["answer"].span_id.hex()
    assert parents == {
        "request": CLIENT.split("-")[2],
        "answer": spans["request"].span_id.hex(),
        "adapter": answer,
        "generate": answer,
    }
    said = {attribute.key: attribute.value for attribute in spans["request"].attributes}
    assert (said["route"].string_value, said["status"].int_value) == ("/v1/chat/completions", 200)


def test_what_nobody_expected_counts_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its 500 is answered outside of what counts; so counts an answer that breaks off, and not one that is given up."""
    counted: list[str] = []
    counter = SimpleNamespace(inc=lambda _, tags: counted.append(tags["status"]))
    monkeypatch.setattr(observation, "_counter", lambda spec: counter)

    async def ask(status: int | None, error: type[BaseException] | None) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if status is not None:
                await send({"type": "http.response.start", "status": status})
            if error is not None:
                raise error

        async def send(message: Message) -> None:
            return None

        scope = {"type": "http", "method": "GET", "headers": []}
        with contextlib.suppress(RuntimeError, asyncio.CancelledError):
            await observation.ObserveRequests(app)(scope, None, send)  # type: ignore[arg-type]

    for status, error in (
        (200, None),
        (404, None),
        (None, RuntimeError),
        (200, RuntimeError),
        (None, asyncio.CancelledError),
    ):
        asyncio.run(ask(status, error))
    assert counted == ["200", "404", "500", "500"]
