"""Webhooks as OpenAI's client registers and verifies them, and what is not connected to."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.webhooks import WebhookEndpoint as OpenAIEndpoint

from deploy.api import webhook_sender
from jobs.job import JobStatus
from jobs.store import webhooks
from jobs.store.webhooks import EVENT_TYPES, WebhookTable
from tests.support.api_site import Site, running_site

KINDS: Any = list(EVENT_TYPES)


class Receiver(ThreadingHTTPServer):
    """What is told, with the statuses that it answers first."""

    def __init__(self) -> None:
        self.told: list[tuple[dict[str, str], str]] = []
        self.statuses: list[int] = []
        self.connections, self.paths = 0, set[str]()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"])).decode()
                receiver.told.append((dict(self.headers.items()), body))
                receiver.paths.add(self.path)
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 204)
                self.send_header("location", f"{receiver.url}/elsewhere")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def get_request(self) -> Any:
        self.connections += 1
        return super().get_request()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook"

    def wait(self, number: int) -> None:
        until(lambda: len(self.told) >= number)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        thread = threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield receiver
        receiver.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_sender, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(webhooks, "FIRST_RETRY_SECONDS", 0.05)
    monkeypatch.setattr(webhooks, "CLAIM_SECONDS", 2.0)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("webhooks")) as site:
        yield site


def test_how_jobs_end_is_told_so_that_openais_client_believes_it(site: Site, receiver: Receiver) -> None:
    assert site.client.webhooks.event_types.list().data == KINDS
    made = site.client.webhooks.create(name="CI", url=receiver.url, event_types=KINDS)
    (listed,) = site.client.webhooks.list()
    OpenAIEndpoint.model_validate(listed.to_dict(), strict=True)
    assert (listed.id, listed.url, made.signing_secret[-4:]) == (made.id, receiver.url, listed.signing_secret_hint[-4:])
    assert made.signing_secret not in listed.to_json()
    succeeded, cancelled, failed = (site.create(name).id for name in ("succeeds", "is-cancelled", "fails"))
    receiver.statuses = [500, 307, 503]
    site.train(succeeded)
    receiver.wait(4)
    assert len({headers["webhook-id"] for headers, _ in receiver.told}) == 1 and receiver.paths == {"/hook"}
    site.client.fine_tuning.jobs.cancel(cancelled)
    receiver.wait(5)
    assert site.queue.move(failed, JobStatus.QUEUED, JobStatus.FAILED, message="x", error="x")
    receiver.wait(6)
    told = receiver.told[3:]
    events = [site.client.webhooks.unwrap(body, headers, secret=made.signing_secret) for headers, body in told]
    assert [(event.type, event.data.id) for event in events] == [
        ("fine_tuning.job.succeeded", succeeded), ("fine_tuning.job.cancelled", cancelled),
        ("fine_tuning.job.failed", failed),
    ]  # fmt: skip
    assert [event.id for event in events] == [headers["webhook-id"] for headers, _ in told]
    headers, body = told[0]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        site.client.webhooks.unwrap(body.replace(succeeded, failed), headers, secret=made.signing_secret)
    rotated = site.client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    receiver.statuses = [418]
    sample = site.client.webhooks.test(made.id, event_type="fine_tuning.job.failed")
    assert (sample.status_code, sample.webhook_endpoint_id) == (418, made.id)
    headers, body = receiver.told[-1]
    for secret in (made.signing_secret, rotated.signing_secret):
        assert site.client.webhooks.unwrap(body, headers, secret=secret).type == "fine_tuning.job.failed"
    assert site.client.webhooks.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no webhook endpoint"):
        site.client.webhooks.retrieve(made.id)


def test_what_was_not_told_is_told_after_a_restart(tmp_path: Path, receiver: Receiver) -> None:
    receiver.statuses = [500] * 1000
    with running_site(tmp_path) as site:
        site.client.webhooks.create(name="CI", url=receiver.url, event_types=KINDS)
        job = site.create("restarted").id
        site.client.fine_tuning.jobs.cancel(job)
        receiver.wait(1)
    (headers, _), *_ = receiver.told
    receiver.told, receiver.statuses = [], []
    with running_site(tmp_path):
        receiver.wait(1)
    assert [(told["webhook-id"], json.loads(body)["data"]) for told, body in receiver.told] == [
        (headers["webhook-id"], {"id": job})
    ]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://127.1.2.3", ""), ("http://8.8.8.8/hook", "must begin with https"), ("https://10.0.0.1", "private"),
        ("https://[::1]:8443", "private address:"), ("https://[::ffff:10.0.0.1]", "private address:"),
        ("https://169.254.169.254/latest", "private"), ("https://0.0.0.0", "private"), ("https://100.64.0.1", "privat"),
        ("https://[64:ff9b::a00:1]", "private"), ("https://[2002:a00:1::]", "private"), ("https://224.0.0.1", "privat"),
        ("https://[::10.0.0.1]", "private"), ("https://[fec0::1]", "private"),
        ("https://167772161", "private address:"), ("https://10.1", "private address:"),
        ("https://0xa000001", "private address:"), ("ftp://8.8.8.8", "write https"), ("8.8.8.8", "write https"),
        ("https://user@8.8.8.8", "without a user"), ("https://", "cannot be"), ("https://no.invalid", "cannot be"),
    ],
)  # fmt: skip
def test_private_addresses_are_refused(site: Site, url: str, reason: str) -> None:
    def create() -> Any:
        return site.client.webhooks.create(name="x", url=url, event_types=KINDS)

    if not reason:  # of a network that the operator has named
        site.client.webhooks.delete(create().id)
        return
    with pytest.raises(openai.BadRequestError, match=reason) as caught:
        create()
    assert caught.value.param == "url"


def test_a_name_that_means_another_address_later_is_not_connected_to(
    site: Site, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is checked is what is connected to, whatever the name's server says in between."""
    table = WebhookTable(site.database)
    sender = webhook_sender.WebhookSender(table, [])
    looked_up: list[str] = []

    async def lie(self: Any, host: str, *_: Any, **__: Any) -> Any:
        looked_up.append(host)
        address = "8.8.8.8" if len(looked_up) == 1 else "127.0.0.1"
        return [(2, 1, 6, "", (address, receiver.server_address[1]))]

    async def send() -> None:
        monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", lie)
        url = f"https://rebinds.example:{receiver.server_address[1]}/hook"
        await sender.check(url)
        endpoint = table.create("acme", "x", url, EVENT_TYPES)
        table.delete(endpoint)
        await sender.post(endpoint, "evt_1", "{}")

    with pytest.raises(OSError, match="Cannot connect"):
        asyncio.run(send())
    assert (len(looked_up), receiver.connections) == (2, 0)
