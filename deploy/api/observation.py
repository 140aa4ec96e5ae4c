"""What the gateway counts and traces: every answer by route and status, and failures of the service's own by code."""

from __future__ import annotations

from functools import cache

from ray.util.metrics import Counter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster import metrics
from cluster.metrics import MetricSpec
from cluster.tracing import span, traceparent


@cache
def _counter(spec: MetricSpec) -> Counter:
    return Counter(spec.name, spec.help, spec.labels)


def count_error(code: str) -> None:
    """Count a request that failed through no fault of the client's."""
    _counter(metrics.API_ERRORS).inc(1, tags={"code": code})


class ObserveRequests:
    """ASGI middleware around the application. A route counts as it is declared, whatever is in its path; a trace goes
    on from the client's, where it sends one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with span("request", Headers(scope=scope).get("traceparent"), method=scope["method"]) as request:
            scope.setdefault("state", {})["traceparent"] = traceparent(request)

            status: int | None = None  # of one that is given up before it is answered

            async def observed(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await self._app(scope, receive, observed)
            except Exception:
                status = 500  # what nobody expected is answered outside of this, or an answer breaks off
                raise
            finally:
                if status is not None:
                    route = getattr(scope.get("route"), "path", "none")
                    _counter(metrics.API_REQUESTS).inc(1, tags={"route": route, "status": str(status)})
                    request.set_attributes({"route": route, "status": status})
