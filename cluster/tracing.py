"""OpenTelemetry's spans: a request from the gateway to the engine, a job from its submission to its publication.

Off, unless OTEL_EXPORTER_OTLP_ENDPOINT says where they go (OTLP over HTTP); everything else is OpenTelemetry's own, too
(OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, ...). Processes hand a trace on as `traceparent`, the W3C's header.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import INVALID_SPAN, Span, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_fixed: ContextVar[tuple[int, int] | None] = ContextVar("fixed", default=None)
_propagator = TraceContextTextMapPropagator()


class _Ids(RandomIdGenerator):
    """Random ones, but for the root of a job's trace: who knows the job can find it."""

    def generate_trace_id(self) -> int:
        fixed = _fixed.get()
        return fixed[0] if fixed else super().generate_trace_id()

    def generate_span_id(self) -> int:
        fixed = _fixed.get()
        return fixed[1] if fixed else super().generate_span_id()


@cache
def _tracer() -> Tracer | None:
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    os.environ.setdefault("OTEL_SERVICE_NAME", "lora")
    provider = TracerProvider(id_generator=_Ids())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("lora")


@contextmanager
def span(name: str, parent: str | None, **attributes: str | int | float) -> Iterator[Span]:
    """Trace a block, below the `traceparent` of whoever asked for it; what it raises is recorded. It is never the
    current span: a stream's block is entered and left in several contexts.
    """
    tracer = _tracer()
    if tracer is None:
        yield INVALID_SPAN
        return
    opened = tracer.start_span(
        name, _propagator.extract({"traceparent": parent} if parent else {}), attributes=attributes
    )
    try:
        yield opened
    except BaseException as error:
        opened.set_status(Status(StatusCode.ERROR, repr(error)))
        raise
    finally:
        opened.end()


def traceparent(of: Span) -> str | None:
    """Return what hands a trace on; None where there is none."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, set_span_in_context(of, Context()))
    return carrier.get("traceparent")


def record_job(
    job_id: str,
    began: float,
    ended: float,
    parts: Sequence[tuple[str, float, float]],
    error: str | None,
    **attributes: str | int,
) -> None:
    """Trace a job that is over: the whole, and parts of it by name, beginning and end in seconds since 1970. The trace
    id is the beginning of the sha256 of the job's.
    """
    tracer = _tracer()
    if tracer is None:
        return
    digest = hashlib.sha256(job_id.encode()).digest()
    token = _fixed.set((int.from_bytes(digest[:16]), int.from_bytes(digest[16:24])))
    try:
        root = tracer.start_span("job", Context(), attributes={"job": job_id, **attributes}, start_time=_ns(began))
    finally:
        _fixed.reset(token)
    for name, start, end in parts:
        tracer.start_span(name, set_span_in_context(root, Context()), start_time=_ns(start)).end(_ns(end))
    if error is not None:
        root.set_status(Status(StatusCode.ERROR, error))
    root.end(_ns(ended))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
