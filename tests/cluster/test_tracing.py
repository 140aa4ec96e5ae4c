"""Spans reach a collector over OTLP: who called whom, a job's from what is known of it, and none while it is off."""

from __future__ import annotations

import hashlib

import pytest

from cluster.tracing import record_job, span, traceparent
from tests.support.trace_collector import collected

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_spans_go_on_from_their_callers_and_a_jobs_from_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    with collected(monkeypatch) as spans:
        with (
            span("request", CLIENT, method="POST") as request,
            pytest.raises(KeyError),
            span("answer", traceparent(request)),
        ):
            raise KeyError("gone")
        record_job("job-1", 10.0, 20.0, [("wait", 10.0, 12.0), ("train", 12.0, 20.0)], "no room", tenant="acme")
    outer, inner = spans["request"], spans["answer"]
    assert (outer.trace_id.hex(), outer.parent_span_id.hex()) == (CLIENT.split("-")[1], CLIENT.split("-")[2])
    assert (inner.trace_id, inner.parent_span_id) == (outer.trace_id, outer.span_id)
    assert "gone" in inner.status.message and not outer.status.message
    job = spans["job"]
    assert job.trace_id == hashlib.sha256(b"job-1").digest()[:16]
    assert (job.start_time_unix_nano, job.end_time_unix_nano) == (10 * 10**9, 20 * 10**9)
    assert job.status.message == "no room"
    assert {attribute.key: attribute.value.string_value for attribute in job.attributes}["tenant"] == "acme"
    assert {spans[part].parent_span_id for part in ("wait", "train")} == {job.span_id}
    assert len({span.span_id for span in spans.values()}) == 5


def test_there_is_none_while_nobody_collects() -> None:
    with span("request", CLIENT) as request:
        assert traceparent(request) is None
    record_job("job-1", 0.0, 1.0, [], None)
