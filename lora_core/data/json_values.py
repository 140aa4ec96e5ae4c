"""What JSON and YAML can spell and nothing can use: half a character, a number without bounds.

`"\\ud83d"` is half of a surrogate pair: a string in Python that no tokenizer reads and no file or answer can hold.
Whole numbers of thousands of digits, `NaN` and `1e999` are read too, and fail far from where they were written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

HALF_A_CHARACTER = "half of a surrogate pair, such as \\ud83d alone; write the whole character"

_DIGITS = 400  # float() makes infinity of as many, and int() raises beyond 4,300
_LONG = re.compile(rb"[0-9]{%d}" % _DIGITS)
_SHOWN = 60

_Place = tuple[Any, object] | None
"""The place that it is in, and its key or index there; None is that of all values."""


def whole_number(digits: str) -> int | float:
    """Parse an integer; infinite where Python would not read it, so that whoever checks the value can name it."""
    return int(digits) if len(digits) < _DIGITS else float(digits)


def parser_of_integers(document: bytes) -> Callable[[str], int | float] | None:
    """Return the `parse_int` of `json.loads` for a document: `whole_number`, or Python's own, which takes a fifth of
    the time, where no number is that long.
    """
    return whole_number if _LONG.search(document) else None


def finite(value: Any) -> Any:
    """Return figures as JSON can hold them: null in the place of what is no finite number, as of training that
    diverged.
    """
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def encodable(text: str) -> bool:
    """Return whether there is no half character in it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def unusable(value: object) -> Iterator[tuple[str, str]]:
    """Yield (path, what is wrong) of each such text, key and number in parsed values; a path is `messages.0.content`.

    Without recursion, since the values may nest as deep as a parser goes; and with a path only where there is something
    to say, since a request may have a million numbers.
    """
    waiting: list[tuple[_Place, object]] = [(None, value)]
    while waiting:
        place, one = waiting.pop()
        if isinstance(one, str) and not encodable(one):
            yield _path(place), f"has {HALF_A_CHARACTER}"
        elif isinstance(one, int | float) and not (math.isfinite(one) if isinstance(one, float) else abs(one) < 2**64):
            yield _path(place), "should be a finite number of at most 64 bits"
        elif isinstance(one, Mapping):
            wrong = [key for key in one if isinstance(key, str) and not encodable(key)]
            yield from ((_path((place, key)), f"has {HALF_A_CHARACTER}") for key in wrong)
            waiting += reversed([((place, key), part) for key, part in one.items() if not _plainly_usable(part)])
        elif isinstance(one, list):
            rest = [] if _are_token_ids(one) else enumerate(one)
            waiting += reversed([((place, at), part) for at, part in rest if not _plainly_usable(part)])


def _are_token_ids(values: list[Any]) -> bool:
    """Return whether these are plain numbers of 64 bits, as the longest lists mostly are."""
    return set(map(type, values)) == {int} and min(values) > -(2**64) and max(values) < 2**64


def _plainly_usable(value: object) -> bool:
    """Return whether a short look shows that there is nothing to say of a value."""
    return value.isascii() if type(value) is str else type(value) is int and -(2**64) < value < 2**64


def _path(place: _Place) -> str:
    keys = []
    while place is not None:
        place, key = place
        keys.append(shown(str(key)))
    return ".".join(reversed(keys))


def shown(name: str) -> str:
    """Return a user's word as a message can hold it: on one line, of whole characters, and not too long."""
    text = repr(name)[1:-1]
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
