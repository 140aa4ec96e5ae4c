"""What receives spans over OTLP, as a collector does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from cluster import tracing


@contextlib.contextmanager
def collected(patch: pytest.MonkeyPatch) -> Iterator[dict[str, Span]]:
    """Spans of this process by name: complete when the block, in which tracing is on, is left."""
    spans: dict[str, Span] = {}

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                raise AssertionError("not asked for")
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.update({span.name: span for scope in resource.scope_spans for span in scope.spans})
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    tracing._tracer.cache_clear()
    try:
        yield spans
        tracer = tracing._tracer()
        assert tracer is not None
        tracer.span_processor.force_flush()
    finally:
        tracing._tracer.cache_clear()
        server.shutdown()
