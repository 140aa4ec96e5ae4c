"""What a log line is: text for people, or a JSON object with job, session, tenant and all else that it names.

A line's fields are those of its format, `job=%s event=assigned session=%s`, so that nothing is said twice.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from typing import Any, Literal

LogFormat = Literal["text", "json"]

_PLACE = r"%[-#0 +]*\d*(?:\.\d+)?[a-z]"
_PART = re.compile(rf"\b([a-z_]+)=({_PLACE}|\S+)|{_PLACE}")
_TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a line says of what: numbers as numbers, and all else as it is printed."""
    arguments = iter(record.args if isinstance(record.args, tuple) else ())
    found: dict[str, Any] = {}
    for part in _PART.finditer(str(record.msg)):  # in order, so that each place takes its own argument, named or not
        name, written = part.groups()
        value = next(arguments, None) if written is None or re.fullmatch(_PLACE, written) else written
        if name is not None:
            plain = value is None or (isinstance(value, int | float) and math.isfinite(value))  # JSON has no NaN
            found[name] = value if plain else str(value)
    return found


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        milliseconds = f"{int(record.msecs):03d}"
        line: dict[str, Any] = {
            **fields_of(record),
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{milliseconds}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class NamedFields(logging.Filter):
    """For a formatter of somebody else's, which writes what a record has: Serve's, with the request's id."""

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in fields_of(record).items():
            if not hasattr(record, name):
                setattr(record, name, value)
        return True


def formatter(form: LogFormat) -> logging.Formatter:
    """Return what writes lines so."""
    return JsonFormatter() if form == "json" else logging.Formatter(_TEXT)
