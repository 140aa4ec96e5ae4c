"""Backpressure in Serve's HTTP proxy: a body is taken from its client no faster than the gateway takes it.

Serve's own proxy reads as fast as the client sends, and has in memory what the gateway has not asked for yet: of an
upload of 2 GiB all of it, in two processes and several times. Serve puts what `middlewares` returns around every proxy
where the environment of its Ray has RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deploy.proxy:middlewares.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.context import _get_serve_request_context
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PACED = "lora_paced"
"""The key of `scope["state"]` that says so to the gateway: nothing that a client sends is there."""

_MOST_WAITING = 16  # messages of at most 256 KiB
_LOOK_SECONDS = 0.002


class PacedBodies:
    """ASGI middleware around Serve's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        proxy: Any = app
        while not hasattr(proxy, "asgi_receive_queues"):
            proxy = proxy._app
        self._queues: dict[str, Any] = proxy.asgi_receive_queues

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def paced() -> Message:
            # In the task that fills this request's queue: Serve has said whose it is.
            queue = self._queues.get(_get_serve_request_context()._internal_request_id)
            while queue is not None and len(queue._message_queue) > _MOST_WAITING:
                await asyncio.sleep(_LOOK_SECONDS)
            return await receive()

        if scope["type"] == "http":
            scope.setdefault("state", {})[PACED] = True
        await self._app(scope, paced, send)


def middlewares() -> list[Middleware]:
    """Return what Serve puts around its proxy."""
    return [Middleware(PacedBodies)]
