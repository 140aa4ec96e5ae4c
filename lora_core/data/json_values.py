"""What JSON and YAML can spell and nothing can use: half a character, a number without bounds.

`"\\ud83d"` is half of a surrogate pair: a string in Python that no tokenizer reads and no file or answer can hold.
Whole numbers of thousands of digits, `NaN` and `1e999` are read too, and fail far from where they were written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

HALF_A_CHARACTER = "half of a surrogate pair, such as \\ud83d alone; write the whole character"

_DIGITS = 400  # float() makes infinity of as many, and int() raises beyond 4,300
_SHOWN = 60


def whole_number(digits: str) -> int | float:
    """Parse an integer; infinite where Python would not read it, so that whoever checks the value can name it."""
    return int(digits) if len(digits) < _DIGITS else float(digits)


def encodable(text: str) -> bool:
    """Return whether there is no half character in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def unusable(value: object) -> Iterator[tuple[str, str]]:
    """Yield (path, what is wrong) of each such text, key and number in parsed values; a path is `messages.0.content`.

    Without recursion, since the values may nest as deep as a parser goes.
    """
    waiting: list[tuple[str, object]] = [("", value)]
    while waiting:
        path, one = waiting.pop()
        if isinstance(one, str) and not encodable(one):
            yield path, f"has {HALF_A_CHARACTER}"
        elif isinstance(one, int | float) and not (math.isfinite(one) if isinstance(one, float) else abs(one) < 2**64):
            yield path, "should be a finite number of at most 64 bits"
        elif isinstance(one, Mapping):
            inner = [(f"{path}.{shown(str(key))}".removeprefix("."), key, part) for key, part in one.items()]
            yield from (
                (at, f"has {HALF_A_CHARACTER}") for at, key, _ in inner if isinstance(key, str) and not encodable(key)
            )
            waiting += reversed([(at, part) for at, _, part in inner])
        elif isinstance(one, list):
            waiting += reversed([(f"{path}.{index}".removeprefix("."), part) for index, part in enumerate(one)])


def shown(name: str) -> str:
    """Return a user's word as a message can hold it: on one line, of whole characters, and not too long."""
    text = repr(name)[1:-1]
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
