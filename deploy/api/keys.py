"""Who asks: API keys and their limits, checked without a look at the database.

    keys = KeyRing(table, settings.tenant)       what the table has now
    await keys.follow(seconds)                   for ever, beside the requests
    api.add_middleware(KeyCheck, keys=keys)      every request has a caller, or is refused

While there is no key, who asks from this machine may do everything. A key that is revoked opens nothing, and what was
closed by the first key stays closed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import os
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Request, Security
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from deploy.api.errors import ApiError
from jobs.store.api_keys import ApiKey, KeyTable, Scope, hash_of

log = logging.getLogger("ray.serve.lora")

_PUBLIC_PATHS = re.compile(r"/(healthz|openapi\.json|docs(/[^/]*)?|web/.*)?")
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_BEHIND_HAPROXY = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"  # Serve's own, which says nothing of who asks
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_BEARER = HTTPBearer(auto_error=False, description="an API key: sk-lora-...")  # for the document: `KeyCheck` checks
_CREATE = "python -m deploy keys create"
_MOST_BODY_BYTES = 4 * 2**20  # of what is read as a whole
_FORMS = re.compile(r"/v1/(files|uploads/[^/]+/parts)")  # go to disk


class RateLimit:
    """So many a minute: a bucket that is full at first, fills evenly, and may be overdrawn by what was not foreseen."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    def take(self, amount: float) -> None:
        self._level = self._now() - amount

    def remaining(self) -> int:
        return max(0, math.floor(self._now()))

    def seconds_until(self, amount: float) -> float:
        """Return how long it takes until so much is there."""
        return max(0.0, (amount - self._now()) * 60 / self.per_minute)

    def _now(self) -> float:
        now = self._clock()
        self._level = min(float(self.per_minute), self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level


@dataclass(frozen=True)
class Caller:
    """Who asks: a tenant, what for, and how much is left of the limits of its key."""

    tenant: str
    scopes: frozenset[Scope]
    key_id: str | None = None
    running_jobs: int | None = None
    requests: RateLimit | None = None
    tokens: RateLimit | None = None

    def admit(self) -> None:
        """Count a request. Raises ApiError (429) where a limit is used up."""
        for limit, what in ((self.requests, "requests"), (self.tokens, "tokens")):
            if limit is not None and limit.remaining() < 1:
                seconds = limit.seconds_until(1)
                message = f"this key may use {limit.per_minute:,} {what} a minute; ask again in {_duration(seconds)}"
                headers = {"retry-after": str(math.ceil(seconds)), **self.headers()}
                raise ApiError(429, message, "rate_limit_exceeded", retry=True, headers=headers)
        if self.requests is not None:
            self.requests.take(1)

    def use_tokens(self, number: int) -> None:
        """Count what an answer came to, of its prompt too."""
        if self.tokens is not None:
            self.tokens.take(number)

    def headers(self) -> dict[str, str]:
        """Return OpenAI's headers of what is left."""
        found = {}
        for limit, what in ((self.requests, "requests"), (self.tokens, "tokens")):
            if limit is not None:
                found[f"x-ratelimit-limit-{what}"] = str(limit.per_minute)
                found[f"x-ratelimit-remaining-{what}"] = str(limit.remaining())
                found[f"x-ratelimit-reset-{what}"] = _duration(limit.seconds_until(limit.per_minute))
        return found


class KeyRing:
    """The keys of the table, as of a moment ago, and what is left of their limits."""

    def __init__(self, table: KeyTable, tenant: str) -> None:
        """Read the table. `tenant` is who asks without a key, while there is none. Raises DatabaseUnavailableError."""
        self._table = table
        self._local = Caller(tenant, frozenset({Scope.ADMIN}))
        self._known: dict[str, tuple[ApiKey, Caller]] = {}  # by the secret's hash
        self._closed = False
        self.load()
        if not self._closed:
            log.warning("event=no_keys only clients on this machine are answered; make a key for others: %s", _CREATE)

    def load(self) -> None:
        """Read the table again. Raises DatabaseUnavailableError."""
        keys = self._table.list()
        self._known = {key.sha256: self._entry(key) for key in keys if key.revoked_at is None}
        self._closed = bool(keys)

    async def follow(self, seconds: float) -> None:
        """Read the table so often, for ever; while it cannot be read, what is known goes on."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await asyncio.to_thread(self.load)
            except Exception as error:  # whatever it is, keys must not stay what they are for ever
                log.warning("event=keys_not_read error=%r", error)

    def caller(self, headers: Headers, client: str | None) -> Caller:
        """Return who sends a request with these headers from this address. Raises ApiError (401)."""
        if not self._closed:
            if is_of_this_machine(headers, client):
                return self._local
            sentence = f"there is no API key yet, so only clients on this machine are answered: make one with {_CREATE}"
            raise _unauthorized(sentence)
        kind, _, secret = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not secret.strip():
            raise _unauthorized("there is no API key in this request: send it as Authorization: Bearer sk-lora-...")
        entry = self._known.get(hash_of(secret.strip()))
        if entry is None:
            raise _unauthorized("this API key is unknown or revoked: use another one, or ask your operator for one")
        return entry[1]

    def _entry(self, key: ApiKey) -> tuple[ApiKey, Caller]:
        """Keep what is left of a key's limits from one look at the table to the next."""
        known = self._known.get(key.sha256)
        if known is not None and known[0] == key:
            return known
        requests, tokens = (
            None if number is None else RateLimit(number) for number in (key.requests_per_minute, key.tokens_per_minute)
        )
        return key, Caller(key.tenant, key.scopes, key.id, key.running_jobs, requests, tokens)


class KeyCheck:
    """ASGI middleware: puts the caller into `request.state`, and what is left of its limits into the answer. Of a body
    that is no file, no more is read than memory has room for.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            caller = self._checked(scope)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return

        is_form = _FORMS.fullmatch(scope["path"]) is not None
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += 0 if is_form else len(message.get("body", b""))
            if taken > _MOST_BODY_BYTES:
                raise ApiError(
                    413, f"the body is larger than {_MOST_BODY_BYTES >> 20} MiB: send less", "body_too_large"
                )
            return message

        async def send_limits(message: Message) -> None:
            if message["type"] == "http.response.start" and caller is not None:
                MutableHeaders(scope=message).update(caller.headers())
            await send(message)

        await self._app(scope, bounded, send_limits)

    def _checked(self, scope: AsgiScope) -> Caller | None:
        headers = Headers(scope=scope)
        if not _REQUEST_ID.fullmatch(headers.get("x-request-id", "-")):
            message = "x-request-id must be at most 128 letters, digits and signs, without spaces"
            raise ApiError(400, message, "invalid_value", "x-request-id")
        if _PUBLIC_PATHS.fullmatch(scope["path"]):
            return None
        caller = self._keys.caller(headers, scope["client"][0] if scope.get("client") else None)
        caller.admit()
        scope.setdefault("state", {})["caller"] = caller
        return caller


def caller_of(request: Request) -> Caller:
    """Return who sent a request that `KeyCheck` let pass."""
    caller: Caller = request.state.caller
    return caller


def needs(*scopes: Scope) -> Callable[..., Awaitable[None]]:
    """Return a dependency of routes for callers with one of these scopes; of others it raises ApiError (403)."""

    async def check(request: Request, _: Annotated[object, Security(_BEARER)]) -> None:
        if caller_of(request).scopes.isdisjoint({*scopes, Scope.ADMIN}):
            wanted = " or ".join(scopes)
            raise ApiError(403, f"this API key lacks the scope {wanted}: use one that has it", "missing_scope")

    return check


def is_of_this_machine(headers: Headers, client: str | None) -> bool:
    """Return whether a request comes from a program on this machine, and not through it.

    A proxy's word for where it comes from is never taken as a proof, and that there is a proxy as one of the contrary.
    A page of another site that is open in a browser here is none of ours either, whatever name it has us by.
    """
    if _BEHIND_HAPROXY or client is None or any(name in headers for name in _FORWARDED):
        return False
    urls = [f"//{headers.get('host', '')}", *headers.getlist("origin")]
    return _is_loopback(client) and all(map(_names_loopback, urls))


def _names_loopback(url: str) -> bool:
    try:
        name = urlsplit(url).hostname
    except ValueError:
        return False
    return name == "localhost" or _is_loopback(name or "")


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def _unauthorized(sentence: str) -> ApiError:
    return ApiError(401, sentence, "invalid_api_key", headers={"www-authenticate": "Bearer"})


def _duration(seconds: float) -> str:
    """Write it as OpenAI does: `6m0s`, `1.5s`, `20ms`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes)}m{rest:.0f}s" if minutes else f"{rest:g}s"
