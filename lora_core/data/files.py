"""The rows of a data set's file, each with its line, or its number where rows have no lines.

    .jsonl, .json    an object a line; or one array of objects; or one object
    .csv, .parquet   tables.py

A file without suffix is what its content looks like. All unreadable rows are reported at once, beside the mistakes in
the others.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path

from lora_core.data.format import (
    REQUIRED_COLUMNS,
    DatasetError,
    FileRows,
    Formats,
    Problem,
    Row,
    RowNumber,
    format_of,
    location,
    no_known_format,
    problems_of,
    without_nulls,
)
from lora_core.data.messages import kind
from lora_core.data.tables import Read, read_csv, read_parquet

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

_HEAD = 4096
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def read_rows(path: Path | str, suffix: str | None = None, formats: Formats = REQUIRED_COLUMNS) -> FileRows:
    """Read the rows of a file with their lines, or numbers, nulls left out. `suffix` is that of the name that it had,
    where its path has another; `formats` are those that rows may have.

    Raises:
        DatasetError: no such file, another kind of file, no rows, or rows that cannot be read. Where rows are
            unreadable, the mistakes that `check_rows` finds in the other ones are reported with them.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError([f"dataset {path}: there is no such file"])
    suffix = path.suffix if suffix is None else suffix
    if suffix and suffix.lower() not in SUFFIXES:
        advice = f"convert it to {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise DatasetError([f"dataset {path}: `{suffix}` is not read; {advice}"])
    rows, problems = _read(path, suffix.lower(), formats)
    if problems:
        problems = sorted([*problems, *problems_of(rows, formats)], key=lambda problem: problem[0])
        raise DatasetError([text for _, text in problems])
    if not rows:
        raise DatasetError([f"dataset {path}: the file has no rows; write one for each example"])
    return rows


def _read(path: Path, suffix: str, formats: Formats) -> Read:
    head = _head(path)
    if suffix == ".parquet" or (not suffix and head.startswith(b"PAR1")):
        return read_parquet(path, formats)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DatasetError([f"dataset {path}: the file is UTF-16; save it as UTF-8"])
    start = head.removeprefix(codecs.BOM_UTF8).strip()
    if suffix == ".csv" or (not suffix and start and start[:1] not in (b"{", b"[")):
        return read_csv(path)
    if start.startswith(b"["):
        return _read_array(path)
    if _may_be_one_object(head):
        row = _whole_object(path)
        if row is not None:
            return FileRows([(RowNumber(1), without_nulls(row))]), []
    return _read_lines(path)


def has_lines(path: Path, suffix: str) -> bool:
    """Return whether the file has a row a line for sure, which is told by its name's suffix and its first row."""
    head = _head(path)
    start = head.removeprefix(codecs.BOM_UTF8).strip()
    return suffix.lower() in ("", ".jsonl", ".json") and start.startswith(b"{") and not _may_be_one_object(head)


def _may_be_one_object(head: bytes) -> bool:
    start = head.removeprefix(codecs.BOM_UTF8).strip()
    return start.startswith(b"{") and head.endswith(b"\n") and not start.endswith(b"}")


def _head(path: Path) -> bytes:
    """Return the beginning of the first line that is not blank, with its end where that is near."""
    with path.open("rb") as stream:
        while line := stream.readline(_HEAD):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                return line
    return b""


def _collect(number: int, value: object, rows: FileRows, problems: list[Problem]) -> None:
    if isinstance(value, dict):
        rows.append((number, without_nulls(value)))
    else:
        problems.append((number, _no_object(number, value)))


def _no_object(number: int, value: object) -> str:
    return f"{location(number)}: {kind(value)}; write an object with the columns as keys"


def _read_lines(path: Path) -> Read:
    rows = FileRows()
    problems: list[Problem] = []
    with path.open("rb") as stream:
        # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
        for number, line in enumerate(stream, start=1):
            row = read_line(number, line)
            if isinstance(row, str):
                problems.append((number, row))
            elif row is not None:
                rows.append((number, row))
    return rows, problems


def read_line(number: int, line: bytes) -> Row | str | None:
    """Return the row that a line is, nulls left out; what to say of it where it is none; None where it is blank."""
    # Windows editors write a mark; joining files moves it into the middle.
    line = line.removesuffix(b"\n").removeprefix(codecs.BOM_UTF8)
    if not line.strip():
        return None
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = _unreadable(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"not JSON ({error.msg} at character {error.colno}); write one JSON object on the line"
        return f"line {number}: {reason}"
    return without_nulls(value) if isinstance(value, dict) else _no_object(number, value)


def _unreadable(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        where = f"at line {error.lineno}, character {error.colno}"
        return f"not JSON ({error.msg} {where}); write one array of objects, or an object a line"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is not UTF-8; save the file as UTF-8"
    if isinstance(error, RecursionError):
        return "lists or objects nest too deep to be read; flatten them, or leave them out"
    return "a number has more digits than can be read; shorten it, or leave it out"


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DatasetError([f"dataset {path}: line {line} is not UTF-8; save the file as UTF-8"]) from error


def _read_array(path: Path) -> Read:
    rows = FileRows()
    problems: list[Problem] = []
    elements, number = _elements(_text(path)), 0
    try:
        for number, value in enumerate(elements, start=1):
            _collect(RowNumber(number), value, rows, problems)
    except (ValueError, RecursionError) as error:  # where the next element would begin is unknown
        number = RowNumber(number + 1)
        problems.append((number, f"{location(number)}: {_unreadable(error)}"))
    return rows, problems


def _elements(text: str) -> Iterator[object]:
    """Parse the elements of the one array that `text` is."""
    at, mark = _behind_space(text, 0), "["
    if text.startswith("]", first := _behind_space(text, at + 1)):
        at = first
    while text.startswith(mark, at):
        value, at = _DECODER.raw_decode(text, _behind_space(text, at + 1))
        yield value
        at, mark = _behind_space(text, at), ","
    if not text.startswith("]", at):
        raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    at = _behind_space(text, at + 1)
    if at < len(text):
        raise json.JSONDecodeError("More behind the array", text, at)


def _behind_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None, "it matches nothing too"
    return found.end()


def _whole_object(path: Path) -> Row | None:
    """Return the one object that is the file; None where it is something else, which lines tell of."""
    try:
        row = json.loads(_text(path))
    except (ValueError, RecursionError):
        return None
    assert isinstance(row, dict), "it begins with a brace"
    if format_of(without_nulls(row)) is None:
        advice = "write its rows as one array, or a row a line"
        raise DatasetError([f"dataset {path}: the file is one object: {no_known_format(row)}; or {advice}"])
    return row
