"""Serve's own proxy, with what we put around it: how much of a body it takes before the gateway asks for it."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest
from ray.serve._private.http_util import MessageQueue, _apply_middlewares, validate_http_proxy_callback_return
from ray.serve._private.proxy import HTTPProxy
from ray.serve._private.utils import call_function_from_import_path
from ray.serve.context import _RequestContext, _serve_request_context
from starlette.requests import ClientDisconnect, Request

from cluster.embedded_ray import PACED as ENVIRONMENT
from deploy import proxy


def test_a_body_waits_for_the_gateway() -> None:
    taken = 0
    seen: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        assert taken < 1000, "and so on for ever"
        return {"type": "http.request", "body": b"x", "more_body": True}

    class Proxy:
        """What HTTPProxy does of a request, with its own queue and its own task."""

        asgi_receive_queues: dict[str, MessageQueue] = {}  # noqa: RUF012

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope)
            queue = self.asgi_receive_queues["mine"] = MessageQueue()
            _serve_request_context.set(_RequestContext(_internal_request_id="mine"))
            task = asyncio.create_task(HTTPProxy.proxy_asgi_receive(self, receive, queue))  # type: ignore[arg-type]
            for rounds in range(1, 4):
                await asyncio.sleep(0.1)
                assert taken == rounds * (proxy._MOST_WAITING + 1), "as many as may wait, and no more"
                assert len(queue.get_messages_nowait()) == proxy._MOST_WAITING + 1
            task.cancel()

    path = ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
    around = validate_http_proxy_callback_return(call_function_from_import_path(path))
    app: Any = _apply_middlewares(Proxy(), around)  # type: ignore[arg-type]
    scope = {"type": "http", "headers": []}
    asyncio.run(app(scope, receive, None))
    assert seen[0]["state"][proxy.PACED] is True


def test_a_small_body_comes_with_the_head_of_its_request() -> None:
    async def sent(messages: list[dict[str, Any]], length: int) -> tuple[bytes, list[dict[str, Any]], bool]:
        """What the gateway reads, what the proxy may still fetch, and whether it came with the head."""
        waiting, fetched, scopes = list(messages), [], []

        class Proxy:
            asgi_receive_queues: dict[str, MessageQueue] = {}  # noqa: RUF012

            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                _serve_request_context.set(_RequestContext(_internal_request_id="none"))
                scopes.append(pickle.loads(pickle.dumps(scope)))  # as it goes to the gateway
                fetched.extend([await receive() for _ in messages])

        async def receive() -> Any:
            return waiting.pop(0)

        app: Any = proxy.PacedBodies(Proxy())  # type: ignore[arg-type]
        await app({"type": "http", "headers": [(b"content-length", str(length).encode())]}, receive, None)
        again = iter(fetched)

        async def receive_there() -> Any:
            return next(again)

        body = await proxy.whole_body(Request(scopes[0], receive_there))
        return body, fetched, next(again, None) is not None

    def body(content: bytes, more: bool = False) -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": more}

    whole, halves, gone = [body(b"{}")], [body(b"{", True), body(b"}")], [{"type": "http.disconnect"}]
    assert asyncio.run(sent(whole, 2)) == (b"{}", whole, True)
    assert asyncio.run(sent(halves, 2)) == (b"{}", halves, False)
    assert asyncio.run(sent(whole, 2**20)) == (b"{}", whole, False)
    with pytest.raises(ClientDisconnect):
        asyncio.run(sent(gone, 2))
