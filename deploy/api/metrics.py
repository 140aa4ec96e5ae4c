"""What the gateway counts: every answer by route and status, and failures of the service's own by their code."""

from __future__ import annotations

from functools import cache

from ray.util.metrics import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster import metrics
from cluster.metrics import MetricSpec


@cache
def _counter(spec: MetricSpec) -> Counter:
    return Counter(spec.name, spec.help, spec.labels)


def count_error(code: str) -> None:
    """Count a request that failed through no fault of the client's."""
    _counter(metrics.API_ERRORS).inc(1, tags={"code": code})


class CountRequests:
    """ASGI middleware around the application: a route counts as it is declared, whatever is in its path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                _counter(metrics.API_REQUESTS).inc(1, tags={"route": route, "status": str(message["status"])})
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
