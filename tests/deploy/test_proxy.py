"""Serve's own proxy, with what we put around it: how much of a body it takes before the gateway asks for it."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve._private.http_util import MessageQueue, _apply_middlewares, validate_http_proxy_callback_return
from ray.serve._private.proxy import HTTPProxy
from ray.serve._private.utils import call_function_from_import_path
from ray.serve.context import _RequestContext, _serve_request_context

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
