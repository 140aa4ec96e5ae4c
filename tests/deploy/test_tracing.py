"""One trace leads from the client through the gateway to the engine, and is none while nobody collects."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import requests

from cluster.settings import Settings
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
