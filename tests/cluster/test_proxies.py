"""No proxy of the environment stands between the processes of one machine."""

from __future__ import annotations

import os
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest
import requests
from botocore.utils import get_environ_proxies
from openai import DefaultHttpxClient

from cluster.proxies import reach_this_machine_directly
from cluster.storage.directory import open_storage

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    # Set and taken away: so that monkeypatch takes away again what is set in a test.
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield


@pytest.fixture(scope="module")
def here() -> Iterator[str]:
    """The URL of a server on this machine."""

    class Yes(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not into the tests' output."""

    with HTTPServer(("", 0), Yes) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://{{}}:{server.server_port}/"
        server.shutdown()
        thread.join()


def own_address() -> str:
    """One of this machine that is not loopback, as Ray uses it, where there is one."""
    found = [a.address for name in psutil.net_if_addrs().values() for a in name if a.family.name == "AF_INET"]
    return max(found, key=lambda address: not address.startswith("127."))


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", own_address()])
def test_this_machine_is_reached_past_a_proxy(monkeypatch: pytest.MonkeyPatch, here: str, name: str, host: str) -> None:
    monkeypatch.setenv(name, NOBODY)
    reach_this_machine_directly()
    url = here.format(host)
    with DefaultHttpxClient(timeout=5) as client:
        assert client.get(url).status_code == 204
    assert requests.get(url, timeout=5).status_code == 204
    assert urllib.request.urlopen(url, timeout=5).status == 204
    assert get_environ_proxies(url) == {}
    assert NOBODY in requests.utils.get_environ_proxies("http://hub.example/").values()
    assert NOBODY in get_environ_proxies("http://hub.example/").values()


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_exceptions_that_are_set_stay(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", NOBODY)
    monkeypatch.setenv(name, "hub.example, .lab")
    for _ in range(2):
        reach_this_machine_directly()
    hosts = os.environ["no_proxy"].split(",")
    assert hosts[:5] == ["hub.example", ".lab", "localhost", "127.0.0.1", "::1"]
    assert len(hosts) == len(set(hosts))
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"]


@pytest.mark.parametrize("excepted", ["*", None])
def test_nothing_is_set_where_it_would_change_nothing_or_hide_the_systems_own(
    monkeypatch: pytest.MonkeyPatch, excepted: str | None
) -> None:
    if excepted is not None:
        monkeypatch.setenv("http_proxy", NOBODY)
        monkeypatch.setenv("no_proxy", excepted)
    reach_this_machine_directly()
    assert os.environ.get("no_proxy") == excepted
    assert "NO_PROXY" not in os.environ


def test_a_bucket_on_this_machine_is_reached_past_a_proxy(monkeypatch: pytest.MonkeyPatch, s3_url: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", NOBODY)
    storage = open_storage(s3_url)
    storage.put("key", b"content")
    assert storage.get("key") == b"content"
