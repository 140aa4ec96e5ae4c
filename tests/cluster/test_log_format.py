"""Log lines as JSON: the fields that a format names, each with its own argument."""

from __future__ import annotations

import json
import logging

import pytest

from cluster.log_format import NamedFields, formatter


def record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    return logging.LogRecord("lora.session", logging.INFO, __file__, 1, message, arguments, None, **more)  # type: ignore[arg-type]


def test_a_line_has_the_fields_that_its_format_names() -> None:
    line = record("job=%s event=moved %s step=%d seconds=%.3f message=%s", "job-1", "x=9", 7, 1.25, "to: a=b c")
    found = json.loads(formatter("json").format(line))
    assert {name: found[name] for name in ("job", "event", "step", "seconds")} == {
        "job": "job-1", "event": "moved", "step": 7, "seconds": 1.25,
    }  # fmt: skip
    assert found["message"] == "job=job-1 event=moved x=9 step=7 seconds=1.250 message=to: a=b c"
    assert (found["level"], found["logger"], found["time"][-1]) == ("info", "lora.session", "Z")
    assert "x" not in found  # what somebody wrote is no field
    odd = json.loads(
        formatter("json").format(record("level=%s loss=%.1f", "other", float("nan"))), parse_constant=pytest.fail
    )
    assert (odd["level"], odd["loss"]) == ("info", "nan")  # JSON has no NaN, and a line's own head stays
    assert formatter("text").format(line).endswith("lora.session " + found["message"])


def test_a_record_keeps_its_own_when_fields_are_added_for_somebody_elses_formatter() -> None:
    line = record("event=answered tenant=%s name=%s", "acme", "other")
    assert NamedFields().filter(line)
    assert (line.tenant, line.event, line.name) == ("acme", "answered", "lora.session")  # type: ignore[attr-defined]
