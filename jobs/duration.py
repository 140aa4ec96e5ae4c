"""Durations as people write them: `90m`, `2h`, `1h30m`."""

from __future__ import annotations

import re

_UNITS = {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)([dhms])")
DURATION = rf"^(?:{_PART.pattern})+$"


def seconds_of(text: str) -> float:
    """Return the seconds that a duration has.

    Raises:
        ValueError: it is none; the message ends a sentence about it.
    """
    if re.fullmatch(DURATION, text) is None:
        raise ValueError(f"must be seconds, or a duration such as 90m, 2h or 1h30m, not the text {text[:60]!r}")
    return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))


def duration_text(seconds: float | None) -> str:
    """Write a duration in whole units, but for its seconds; None is `none`."""
    if seconds is None:
        return "none"
    parts, left = "", seconds
    for unit, size in _UNITS.items():
        count = left // size if size > 1 else left
        parts += f"{count:g}{unit}" if count else ""
        left -= count * size
    return parts or "0s"
