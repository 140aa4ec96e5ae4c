"""API keys over HTTP: who is answered, for what, how often, and what of other tenants they see."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.datastructures import Headers

from cluster.registry import PUBLIC, AdapterRegistry
from cluster.settings import Settings
from cluster.storage.directory import open_storage
from deploy.__main__ import main
from deploy.api import keys as api_keys
from deploy.api.keys import Caller, KeyRing, RateLimit, is_of_this_machine
from jobs.store.api_keys import KeyTable, Scope
from jobs.store.database import Database
from tests.support.api_server import Hello, running_gateway

HELLO: Any = [{"role": "user", "content": "Hi"}]


class Site:
    """A running gateway, and its keys."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home, base_models={"tiny": "/nowhere"}, key_seconds=0.05, notice_seconds=0.02)
        self.keys = KeyTable(Database(self.settings.database_url))
        self.registry = AdapterRegistry(open_storage(self.settings.storage_url))
        self.url = ""
        self.base = Hello()
        self.gateway: Any = None

    def client(self, secret: str, **headers: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=secret, max_retries=0, default_headers=headers)

    def key(self, tenant: str, *scopes: Scope, **limits: int) -> openai.OpenAI:
        """The client of a new key, which counts already."""
        _, secret = self.keys.create(tenant, frozenset(scopes or {Scope.ADMIN}), **limits)
        self.gateway._keys.load()
        return self.client(secret)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    with running_gateway(site.settings) as (site.url, site.base, site.gateway):
        check_without_keys(site)  # before the first one is made
        yield site


def check_without_keys(site: Site) -> None:
    """Whatever a client sends as one, it is answered on this machine, and only there."""
    assert [model.id for model in site.client("none").models.list()] == ["tiny"]
    for headers in ({"X-Forwarded-For": "127.0.0.1"}, {"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        with pytest.raises(openai.AuthenticationError, match="make one with python -m deploy keys create"):
            site.client("none", **headers).models.list()


@pytest.mark.parametrize(
    ("client", "headers", "local"),
    [
        ("127.0.0.1", {"host": "localhost:8000"}, True),
        ("::1", {"host": "[::1]:8000"}, True),
        ("::ffff:127.0.0.1", {"host": "127.0.0.1", "origin": "http://localhost:3000"}, True),
        ("10.0.0.7", {"host": "localhost:8000"}, False),
        ("10.0.0.7", {"host": "localhost:8000", "x-forwarded-for": "127.0.0.1"}, False),
        ("127.0.0.1", {"host": "localhost", "forwarded": "for=127.0.0.1"}, False),
        ("127.0.0.1", {"host": "["}, False),
        ("127.0.0.1", {"host": "localhost", "origin": "null"}, False),
        ("127.0.0.1", {}, False),
        (None, {"host": "localhost"}, False),
    ],
)
def test_only_programs_on_this_machine_are_local(client: str | None, headers: dict[str, str], local: bool) -> None:
    assert is_of_this_machine(Headers(headers), client) is local


def test_nobody_is_local_behind_serves_own_haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "_BEHIND_HAPROXY", True)
    assert not is_of_this_machine(Headers({"host": "localhost"}), "127.0.0.1")


def test_missing_unknown_and_revoked_keys_are_401(site: Site) -> None:
    key, secret = site.keys.create("acme", frozenset({Scope.INFER}))
    follows(lambda: bool(site.client(secret).chat.completions.create(model="tiny", messages=HELLO).choices))
    site.keys.revoke(key.id)
    follows(lambda: not site.client(secret).models.list(), openai.AuthenticationError)
    for wrong, said in ((secret, "unknown or revoked"), ("sk-lora-made-up", "unknown or revoked"), ("", "no API key")):
        client = site.client(wrong) if wrong else site.client("x", Authorization="Basic eA==")
        with pytest.raises(openai.AuthenticationError, match=said) as caught:
            client.models.list()
        assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")
        assert caught.value.response.headers["www-authenticate"] == "Bearer"


def follows(ask: Callable[[], bool], wanted: type[openai.AuthenticationError] | None = None) -> None:
    """Ask until the gateway has read its keys again, and answers, or refuses, as is wanted."""
    deadline = time.monotonic() + 20
    while True:
        try:
            done = ask()
        except openai.AuthenticationError as error:
            done = isinstance(error, wanted or ())
        if done:
            return
        assert time.monotonic() < deadline, "the keys were not read again"
        time.sleep(0.02)


def test_a_missing_scope_is_403(site: Site) -> None:
    trains = site.key("acme", Scope.TRAIN)
    assert trains.models.list().data
    with pytest.raises(openai.PermissionDeniedError, match="lacks the scope infer") as caught:
        trains.chat.completions.create(model="tiny", messages=HELLO)
    assert caught.value.code == "missing_scope"
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_requests_and_tokens_are_limited(site: Site) -> None:
    twice = site.key("acme", requests_per_minute=2)
    left = [twice.models.with_raw_response.list().headers["x-ratelimit-remaining-requests"] for _ in range(2)]
    assert left == ["1", "0"]
    with pytest.raises(openai.RateLimitError, match="2 requests a minute; ask again in") as caught:
        twice.models.list()
    headers = caught.value.response.headers
    assert (caught.value.code, headers["x-ratelimit-limit-requests"]) == ("rate_limit_exceeded", "2")
    assert 0 < int(headers["retry-after"]) <= 30 and headers["x-ratelimit-reset-requests"].endswith("s")
    assert headers["x-should-retry"] == "true"
    for stream in (False, True):
        chats = site.key("acme", tokens_per_minute=1)
        answer = chats.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
        assert not isinstance(answer, openai.Stream) or len(list(answer)) > 1
        with pytest.raises(openai.RateLimitError, match=r"1 tokens a minute; ask again in [678]m") as caught:
            chats.models.list()
        assert caught.value.response.headers["x-ratelimit-remaining-tokens"] == "0"


def test_a_limit_fills_evenly_and_may_be_overdrawn() -> None:
    now = 0.0
    limit = RateLimit(60, lambda: now)
    limit.take(90)
    assert (limit.remaining(), limit.seconds_until(1)) == (0, 31.0)
    now = 35.0
    assert (limit.remaining(), limit.seconds_until(60)) == (5, 55.0)
    now = 1000.0
    assert limit.remaining() == 60


def test_a_tenant_sees_its_own_adapters_and_those_published_to_all(site: Site) -> None:
    versions = {
        (tenant, name): site.registry.of(tenant).publish("tiny", name, {"weights": f"{tenant}{name}".encode()}, {})
        for tenant, name in (("acme", "mine"), ("acme", "both"), ("other", "theirs"), (PUBLIC, "both"), (PUBLIC, "all"))
    }
    acme, other = site.key("acme"), site.key("other")
    assert {model.id for model in acme.models.list()} == {"tiny", "tiny:mine", "tiny:both", "tiny:all"}
    assert {model.id for model in other.models.list()} == {"tiny", "tiny:theirs", "tiny:both", "tiny:all"}
    for client, name, owner in (
        (acme, "mine", "acme"), (acme, "both", "acme"), (acme, "all", PUBLIC),
        (other, "both", PUBLIC), (other, "theirs", "other"),
    ):  # fmt: skip
        client.chat.completions.create(model=f"tiny:{name}", messages=HELLO)
        assert site.base.asked is not None
        assert (site.base.asked.tenant, site.base.asked.digest) == (owner, versions[owner, name].digest)
        extra = client.models.retrieve(f"tiny:{name}").model_extra or {}
        assert (extra["root"], extra["digest"]) == ("tiny", versions[owner, name].digest)
    site.registry.of(PUBLIC).move("prod", versions[PUBLIC, "both"])
    other.chat.completions.create(model="tiny:both@prod", messages=HELLO)
    with pytest.raises(openai.NotFoundError, match="no version or alias prod of tiny:both"):
        acme.chat.completions.create(model="tiny:both@prod", messages=HELLO)  # its own has none
    hidden = f"tiny:mine@{versions['acme', 'mine'].version}"
    for model in ("tiny:mine", hidden):
        for ask in (partial(other.chat.completions.create, messages=HELLO), other.models.retrieve):
            with pytest.raises(openai.NotFoundError) as caught:
                ask(model=model)
            assert caught.value.code == "model_not_found" and "tiny:mine," not in str(caught.value)


def test_the_health_check_needs_no_key_and_any_other_path_does(site: Site) -> None:
    client = site.client("made-up")
    root = client.with_options(base_url=site.url)
    assert root.get("/healthz", cast_to=dict[str, str]) == {"status": "ok"}
    assert "swagger" in root.get("/docs", cast_to=str)
    assert "/web/app.js" in root.get("/", cast_to=str)
    for path in ("/web", "/docs/a/b", "/v1/nothing"):
        with pytest.raises(openai.AuthenticationError):
            root.get(path, cast_to=object)
    with pytest.raises(openai.BadRequestError, match="x-request-id must be") as caught:
        site.key("acme").models.list(extra_headers={"x-request-id": "two words"})
    assert caught.value.param == "x-request-id"


def test_a_body_that_is_read_as_a_whole_has_a_limit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "_MOST_BODY_BYTES", 2000)
    client, long = site.key("acme"), "x" * 3000
    as_form: Any = {"headers": {"content-type": "multipart/form-data; boundary=b"}}
    asks: list[Callable[[], Any]] = [
        partial(client.chat.completions.create, model="tiny", messages=[{"role": "user", "content": long}]),
        partial(client.uploads.create, bytes=1, filename=long, mime_type="x", purpose="fine-tune"),
        partial(client.post, "/chat/completions", cast_to=object, files={"file": long.encode()}, options=as_form),
    ]
    for ask in asks:
        with pytest.raises(openai.APIStatusError, match="the body is larger than 0 MiB") as caught:
            ask()
        assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")
    assert client.files.create(file=("a.jsonl", b'{"text": "x"}\n' * 300), purpose="fine-tune").status == "processed"


def test_a_check_costs_microseconds(tmp_path: Path) -> None:
    table = KeyTable(Database(f"sqlite:///{tmp_path}/lora.db"))
    secrets = [table.create("acme", frozenset({Scope.INFER}), requests_per_minute=10**9)[1] for _ in range(50)]
    ring, headers = KeyRing(table, "default"), Headers({"authorization": f"Bearer {secrets[7]}"})
    began = time.perf_counter()
    for _ in range(1000):
        caller: Caller = ring.caller(headers, "10.0.0.1")
        caller.admit()
    assert (time.perf_counter() - began) / 1000 < 1e-3  # 5 microseconds on an idle machine


def test_keys_are_made_listed_and_revoked_by_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_HOME", str(tmp_path))
    limits = ["--requests-per-minute", "5", "--running-jobs", "2"]
    assert main(["keys", "create", "--tenant", "acme", "--name", "CI", "--scope", "infer", *limits]) == 0
    assert main(["keys", "create"]) == 0
    first, second = capsys.readouterr().out.split()
    table = KeyTable(Database(Settings(home=tmp_path).database_url))
    made = table.list()
    assert [(key.tenant, sorted(key.scopes), key.requests_per_minute) for key in made] == [
        ("acme", ["infer"], 5), ("default", ["infer", "train"], None)
    ]  # fmt: skip
    assert first.startswith("sk-lora-") and len(first) == len(second) == 51 and first != second
    assert all(secret not in (tmp_path / "lora.db").read_bytes().decode("latin-1") for secret in (first, second))
    assert main(["keys", "revoke", made[0].id]) == 0 and main(["keys", "list"]) == 0
    out = capsys.readouterr()
    assert f"{made[0].id}  " in out.out and "revoked  CI" in out.out and "no limits" in out.out
    assert first not in out.out
    assert main(["keys", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(key["id"], key["scopes"], "sha256" in key) for key in listed] == [
        (made[0].id, ["infer"], False), (made[1].id, ["infer", "train"], False)
    ]  # fmt: skip
    assert main(["keys", "revoke", made[0].id]) == 2
    assert "there is no key" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["keys", "create", "--running-jobs", "0"])


def test_limits_outlive_a_look_at_the_table_and_the_service_stays_closed(tmp_path: Path) -> None:
    table = KeyTable(Database(f"sqlite:///{tmp_path}/lora.db"))
    ring, here = KeyRing(table, "default"), Headers({"host": "localhost"})
    assert ring.caller(here, "127.0.0.1").tenant == "default"
    key, secret = table.create("acme", frozenset({Scope.INFER}), requests_per_minute=2)
    headers = Headers({"authorization": f"Bearer {secret}"})
    ring.load()
    ring.caller(headers, "10.0.0.1").admit()
    ring.load()
    assert ring.caller(headers, "10.0.0.1").headers()["x-ratelimit-remaining-requests"] == "1"
    table.revoke(key.id)
    ring.load()
    for client, sent in (("127.0.0.1", here), ("10.0.0.1", headers)):
        with pytest.raises(api_keys.ApiError):
            ring.caller(sent, client)
