"""Rows of a data set: read from .jsonl or .parquet, recognised by their columns, checked without a tokenizer.

    messages              [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]
    prompt, completion    two strings, or two lists of messages
    instruction, output   two strings, and `input`, a third one, where there is one (Alpaca)
    text                  a string

One data set has one of them; other columns are ignored. Every mistake in the file is reported at once, each with its
line (in Parquet the number of the row, from 1), the column and what to change.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from lora_core.messages import for_template, kind, message_problems, text_problem

Row = dict[str, Any]
NumberedRow = tuple[int, Row]
RowFormat = Literal["messages", "prompt/completion", "instruction/output", "text"]

# The first that fits counts: Alpaca's own file has a rendered `text` as well, UltraChat's a `prompt` beside `messages`.
REQUIRED_COLUMNS: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction", "output"),
    "text": ("text",),
}
OPTIONAL_COLUMNS: dict[RowFormat, tuple[str, ...]] = {"instruction/output": ("input",)}
KNOWN_FORMATS = "`messages`, or `prompt` and `completion`, or `instruction` and `output`, or `text`"
REPORTED_PROBLEMS = 100
EMPTY = "empty; write the text, or leave the row out"

_Problem = tuple[int, str]
"""(line number, what to say about it)"""


class DatasetError(ValueError):
    """What a user has to change in a data set: the first hundred `problems` and the number of the others."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems[:REPORTED_PROBLEMS])
        self.more = len(problems) - len(self.problems)
        super().__init__(self.problems)  # what pickle hands to __init__ again, before it restores `more`

    def __str__(self) -> str:
        rest = [f"and {self.more} more"] if self.more else []
        return "\n".join([*self.problems, *rest])


def read_rows(path: Path | str) -> list[NumberedRow]:
    """The rows of a .jsonl or .parquet file with line numbers, nulls left out; without suffix the content decides.

    Raises:
        DatasetError: no such file, another kind of file, no rows, or lines that are no JSON objects. Where lines are
            unreadable, the mistakes that `check_rows` finds in the other ones are reported with them.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError([f"dataset {path}: there is no such file"])
    if path.suffix not in (".jsonl", ".parquet", ""):
        raise DatasetError([f"dataset {path}: `{path.suffix}` is not read; convert it to .jsonl or .parquet"])
    rows, problems = _read_parquet(path) if _is_parquet(path) else _read_jsonl(path)
    if problems:
        problems = sorted([*problems, *_problems_of(rows)], key=lambda problem: problem[0])
        raise DatasetError([text for _, text in problems])
    if not rows:
        raise DatasetError([f"dataset {path}: the file has no rows; write one for each example"])
    return rows


def check_rows(rows: Sequence[NumberedRow]) -> RowFormat:
    """The format that the rows have in common.

    Raises:
        DatasetError: rows of no known format or of another one than most, wrong types, nothing to learn in a row.
    """
    problems = _problems_of(rows)
    if problems:
        raise DatasetError([text for _, text in problems])
    row_format = _common_format(rows)
    assert row_format is not None, "read_rows gives at least one row"
    return row_format


def ignored_columns(rows: Sequence[NumberedRow], row_format: RowFormat) -> tuple[str, ...]:
    """Columns that the format does not use, sorted."""
    used = {*REQUIRED_COLUMNS[row_format], *OPTIONAL_COLUMNS.get(row_format, ())}
    return tuple(sorted({column for _, row in rows for column in row} - used))


def _is_parquet(path: Path) -> bool:
    if path.suffix:
        return path.suffix == ".parquet"
    with path.open("rb") as stream:
        return stream.read(4) == b"PAR1"


def _read_parquet(path: Path) -> tuple[list[NumberedRow], list[_Problem]]:
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError([f"dataset {path}: it cannot be read as Parquet ({error}); write it again"]) from error
    return [(number, _without_nulls(row)) for number, row in enumerate(rows, start=1)], []


def _read_jsonl(path: Path) -> tuple[list[NumberedRow], list[_Problem]]:
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DatasetError([f"dataset {path}: the file is UTF-16; save it as UTF-8"])
    if content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        raise DatasetError([f"dataset {path}: the file is one JSON array; write each row on a line of its own"])
    rows: list[NumberedRow] = []
    problems: list[_Problem] = []
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON allows inside a string.
    for number, line in enumerate(content.split(b"\n"), start=1):
        line = line.removeprefix(codecs.BOM_UTF8)  # Windows editors write one; joining files moves it into the middle
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            problems.append((number, f"line {number}: byte {error.start + 1} is not UTF-8; save the file as UTF-8"))
        except json.JSONDecodeError as error:
            advice = "write one JSON object on the line"
            problems.append((number, f"line {number}: not JSON ({error.msg} at character {error.colno}); {advice}"))
        else:
            if isinstance(row, dict):
                rows.append((number, _without_nulls(row)))
            else:
                problems.append((number, f"line {number}: {kind(row)}; write an object with the columns as keys"))
    return rows, problems


def _without_nulls(row: Row) -> Row:
    """Parquet has a null where JSON has no key: here both are the same."""
    return {column: value for column, value in row.items() if value is not None}


def _format_of(row: Row) -> RowFormat | None:
    for row_format, columns in REQUIRED_COLUMNS.items():
        if all(column in row for column in columns):
            return row_format
    return None


def _common_format(rows: Sequence[NumberedRow]) -> RowFormat | None:
    """What most rows are; where no row is complete, what most have a column of."""
    complete = Counter(row_format for _, row in rows if (row_format := _format_of(row)))
    partial = Counter(
        row_format
        for _, row in rows
        for row_format, columns in REQUIRED_COLUMNS.items()
        if not row.keys().isdisjoint(columns)
    )
    counts = complete or partial
    return counts.most_common(1)[0][0] if counts else None


def _problems_of(rows: Sequence[NumberedRow]) -> list[_Problem]:
    row_format = _common_format(rows)
    problems = []
    for number, row in rows:
        for column, advice in _row_problems(row, row_format):
            problems.append((number, f"line {number}: column {column}: {advice}"))
    return problems


def _row_problems(row: Row, row_format: RowFormat | None) -> Iterator[tuple[str, str]]:
    """(column, what to change)"""
    if row_format is None:
        names = ", ".join(f"`{column}`" for column in row) or "none"
        yield names, f"no known format; use {KNOWN_FORMATS}"
        return
    missing = [column for column in REQUIRED_COLUMNS[row_format] if column not in row]
    for column in missing:
        own = _format_of(row)
        mixed = f": this row is {own}, most are {row_format}, and a data set has one format" if own else "; add it"
        yield f"`{column}`", f"missing{mixed}"
    if missing:
        return
    if row_format == "messages":
        yield from _message_problems("messages", row["messages"], answer_from=1)
    elif row_format == "prompt/completion":
        yield from _prompt_completion_problems(row)
    elif row_format == "instruction/output":
        yield from _text_problems("instruction", row["instruction"])
        yield from _text_problems("input", row.get("input", ""), may_be_empty=True)
        yield from _text_problems("output", row["output"])
    else:
        yield from _text_problems("text", row["text"])


def _prompt_completion_problems(row: Row) -> Iterator[tuple[str, str]]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        yield from _message_problems("prompt", prompt, answer_from=None)
        yield from _message_problems("completion", completion, answer_from=0)
    elif isinstance(prompt, list) or isinstance(completion, list):
        kinds = f"`prompt` is {kind(prompt)} and `completion` {kind(completion)}"
        yield "`completion`", f"{kinds}; make both strings or both lists of messages"
    else:
        yield from _text_problems("prompt", prompt, may_be_empty=True)
        yield from _text_problems("completion", completion)


def _message_problems(column: str, messages: Any, *, answer_from: int | None) -> Iterator[tuple[str, str]]:
    """`answer_from`: the first index at which an assistant's message is an answer; None where none is needed."""
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else kind(messages)
        yield f"`{column}`", f"{found}; write a list of messages with `role` and `content`"
        return
    wrong = [
        (f"`{column}[{index}]{key}`", advice)
        for index, message in enumerate(messages)
        for key, advice in message_problems(message)
    ]
    yield from wrong
    if answer_from is None or wrong:
        return
    answers = [index for index in range(answer_from, len(messages)) if messages[index]["role"] == "assistant"]
    if not answers:
        after = " that follows another one" if answer_from else ""
        yield f"`{column}`", f"no message of the assistant{after}; add the answer to learn"
    for index in answers:
        if messages[index].get("weight") != 0 and not for_template(messages[index])["content"].strip():
            yield f"`{column}[{index}].content`", EMPTY


def _text_problems(column: str, value: Any, *, may_be_empty: bool = False) -> Iterator[tuple[str, str]]:
    if problem := text_problem(value):
        yield f"`{column}`", problem
    elif not may_be_empty and not value.strip():
        yield f"`{column}`", EMPTY
