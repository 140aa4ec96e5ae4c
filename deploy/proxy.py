"""Bodies in Serve's HTTP proxy: small ones travel with the head of their request, others no faster than they are taken.

A body that the gateway has to ask the proxy for is one more call between two processes.

Serve's own proxy reads as fast as the client sends, and has in memory what the gateway has not asked for yet: of an
upload of 2 GiB all of it, in two processes and several times. Serve puts what `middlewares` returns around every proxy
where the environment of its Ray has RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.proxy:middlewares.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.context import _get_serve_request_context
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PACED = "lora_paced"
"""The key of `scope["state"]` that says so to the gateway: nothing that a client sends is there."""

_BODY = "lora_body"
_SMALL_BYTES = 64 * 2**10
_MOST_WAITING = 16  # messages of at most 256 KiB
_LOOK_SECONDS = 0.002


async def whole_body(request: Request) -> bytes:
    """Return the body of a request that may have come with its head."""
    sent: bytes | None = request.scope.get("state", {}).get(_BODY)
    return await request.body() if sent is None else sent


class PacedBodies:
    """ASGI middleware around Serve's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        proxy: Any = app
        while not hasattr(proxy, "asgi_receive_queues"):
            proxy = proxy._app
        self._queues: dict[str, Any] = proxy.asgi_receive_queues

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        first: Message | None = None

        async def paced() -> Message:
            nonlocal first
            if first is not None:
                message, first = first, None
                return message
            # In the task that fills this request's queue: Serve has said whose it is.
            queue = self._queues.get(_get_serve_request_context()._internal_request_id)
            while queue is not None and len(queue._message_queue) > _MOST_WAITING:
                await asyncio.sleep(_LOOK_SECONDS)
            return await receive()

        if scope["type"] == "http":
            state = scope.setdefault("state", {})
            state[PACED] = True
            if 0 < int(Headers(scope=scope).get("content-length", 0)) <= _SMALL_BYTES:
                first = await receive()
                if not first.get("more_body") and first["type"] == "http.request":
                    state[_BODY] = first["body"]
        await self._app(scope, paced, send)


def middlewares() -> list[Middleware]:
    """Return what Serve puts around its proxy."""
    return [Middleware(PacedBodies)]
