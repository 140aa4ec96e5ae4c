"""Rows of a data set: recognised by their columns, and checked without a tokenizer.

    messages              [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]
    conversations         [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}, ...], and `system`, a
                          string, where there is one (ShareGPT)
    prompt, completion    two strings, or two lists of messages
    instruction, output   two strings, and `input`, a third one, where there is one (Alpaca)
    text                  a string
    chosen, rejected      preferences, and `prompt`, where there is one; or `input`, `preferred_output` and
                          `non_preferred_output`, as OpenAI has them (`preferences.py`)

One data set has one of them, of those that its method learns from; other columns are ignored. Every mistake is reported
at once, each with its line (or the number of the row, from 1, where rows have no lines), the column and what to change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from lora_core.config import Method
from lora_core.data.json_values import shown
from lora_core.data.messages import ROLES, kind
from lora_core.data.preferences import are_plainly_right, preference_problems, unused_input_keys
from lora_core.data.row_problems import conversation_problems, text_problems
from lora_core.data.sharegpt import unused_keys

Row = dict[str, Any]
NumberedRow = tuple[int, Row]
RowFormat = Literal[
    "messages",
    "conversations (ShareGPT)",
    "prompt/completion",
    "instruction/output",
    "text",
    "chosen/rejected",
    "preferred_output (OpenAI)",
]
Formats = Mapping[RowFormat, tuple[str, ...]]
"""Formats, each with the columns that a row must have. The first that fits counts: Alpaca's own file has a rendered
`text` as well, UltraChat's a `prompt` beside `messages`."""

SUPERVISED: Formats = {
    "messages": ("messages",),
    "conversations (ShareGPT)": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction", "output"),
    "text": ("text",),
}
PREFERENCES: Formats = {
    "chosen/rejected": ("chosen", "rejected"),
    "preferred_output (OpenAI)": ("input", "preferred_output", "non_preferred_output"),
}
REQUIRED_COLUMNS: Formats = {**SUPERVISED, **PREFERENCES}
FORMATS: Mapping[Method, Formats] = {"supervised": SUPERVISED, "dpo": PREFERENCES}
"""What each method learns from: UltraFeedback has `messages` beside `chosen` and `rejected`."""

OF_MESSAGES: tuple[RowFormat, ...] = ("messages", "conversations (ShareGPT)", "preferred_output (OpenAI)")
"""Formats with lists of messages in any case, which a cell of CSV cannot hold."""

OPTIONAL_COLUMNS: dict[RowFormat, tuple[str, ...]] = {
    "conversations (ShareGPT)": ("system",),
    "instruction/output": ("input",),
    "chosen/rejected": ("prompt",),
}
REPORTED_PROBLEMS = 100
NAMED_COLUMNS = 10

Problem = tuple[int, str]
"""(number of the row, what to say about it)"""


class RowNumber(int):
    """The number of a row that has no line of its own: in Parquet, or in one JSON array."""


class FileRows(list[NumberedRow]):
    """The rows of a file; `unread` are the columns that it has besides and that are in none of them."""

    def __init__(self, rows: Iterable[NumberedRow] = (), unread: Iterable[str] = ()) -> None:
        super().__init__(rows)
        self.unread = tuple(unread)

    def part(self, indices: Iterable[int]) -> FileRows:
        """Return some of them."""
        return FileRows((self[index] for index in indices), self.unread)


def location(number: int) -> str:
    """Say where a user finds a row."""
    return f"{'row' if isinstance(number, RowNumber) else 'line'} {number}"


class DatasetError(ValueError):
    """What a user has to change in a data set: the first hundred `problems` and the number of the others."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems[:REPORTED_PROBLEMS])
        self.more = len(problems) - len(self.problems)
        super().__init__(self.problems)  # what pickle hands to __init__ again, before it restores `more`

    def __str__(self) -> str:
        rest = [f"and {self.more} more"] if self.more else []
        return "\n".join([*self.problems, *rest])


def check_rows(rows: Sequence[NumberedRow], formats: Formats = REQUIRED_COLUMNS) -> RowFormat:
    """Return the format that the rows have in common.

    Raises:
        DatasetError: rows of none of `formats` or of another one than most, wrong types, nothing to learn in a row.
    """
    problems = problems_of(rows, formats)
    if problems:
        raise DatasetError([text for _, text in problems])
    row_format = _common_format(rows, formats)
    assert row_format is not None, "read_rows gives at least one row"
    return row_format


def ignored_columns(rows: Sequence[NumberedRow], row_format: RowFormat) -> tuple[str, ...]:
    """Return the columns that the format does not use, and what turns of ShareGPT, or OpenAI's `input`, have besides,
    sorted.
    """
    ignored = {column for _, row in rows for column in row} - {*used_columns(row_format)}
    if isinstance(rows, FileRows):
        ignored |= {*rows.unread}
    if row_format == "conversations (ShareGPT)":
        ignored |= {f"conversations.{key}" for _, row in rows for key in unused_keys(row["conversations"])}
    if row_format == "preferred_output (OpenAI)":
        ignored |= {f"input.{key}" for _, row in rows for key in unused_input_keys(row)}
    return tuple(sorted(ignored))


def used_columns(row_format: RowFormat) -> tuple[str, ...]:
    """Return the columns that rows of the format must have, and those that they may."""
    return (*REQUIRED_COLUMNS[row_format], *OPTIONAL_COLUMNS.get(row_format, ()))


def without_nulls(row: Row) -> Row:
    """Leave out nulls: Parquet has one where JSON has no key, and both mean the same."""
    return {column: value for column, value in row.items() if value is not None}


def format_of(row: Collection[str], formats: Formats = REQUIRED_COLUMNS) -> RowFormat | None:
    """Return the first format that a row has all columns of."""
    return next((name for name, columns in formats.items() if all(c in row for c in columns)), None)


class FormatCounts:
    """How many rows are of each of some formats, and how many have a column of it."""

    def __init__(self, formats: Formats = REQUIRED_COLUMNS) -> None:
        self.formats = formats
        self.complete: Counter[RowFormat] = Counter()
        self.partial: Counter[RowFormat] = Counter()

    def add(self, row: Row) -> RowFormat | None:
        """Count a row; returns its format, where it is complete."""
        if (row_format := format_of(row, self.formats)) is not None:
            self.complete[row_format] += 1
        elif format_of(row) is None:
            self.partial.update(name for name, columns in self.formats.items() if not row.keys().isdisjoint(columns))
        return row_format

    def most(self) -> RowFormat | None:
        """Return what most rows are; where no row is complete, what most have a column of."""
        counts = self.complete or self.partial
        return counts.most_common(1)[0][0] if counts else None


def _common_format(rows: Sequence[NumberedRow], formats: Formats) -> RowFormat | None:
    counts = FormatCounts(formats)
    for _, row in rows:
        counts.add(row)
    return counts.most()


def no_known_format(columns: Collection[str], formats: Formats = REQUIRED_COLUMNS) -> str:
    """Say what is wrong with rows of other columns than one of `formats` has."""
    names = ", ".join(f"`{shown(column)}`" for column in list(columns)[:NAMED_COLUMNS]) or "none"
    rest = f" and {len(columns) - NAMED_COLUMNS} more" if len(columns) > NAMED_COLUMNS else ""
    what, own = "no known format", format_of(columns)
    if own is not None:
        method = next(method for method, of_method in FORMATS.items() if own in of_method)
        what = f"{own} is what method {method} learns from; set train.method to it"
    known = ", or ".join(_listed(required) for required in formats.values())
    return f"column {names}{rest}: {what}{', or' if own else ';'} use {known}"


def _listed(columns: Sequence[str]) -> str:
    *most, last = (f"`{column}`" for column in columns)
    return f"{', '.join(most)} and {last}" if most else last


def problems_of(rows: Sequence[NumberedRow], formats: Formats = REQUIRED_COLUMNS) -> list[Problem]:
    """Find every mistake in the rows."""
    row_format = _common_format(rows, formats)
    return [(number, text) for number, row in rows for text in problems_of_row(number, row, row_format, formats)]


def problems_of_row(
    number: int, row: Row, row_format: RowFormat | None, formats: Formats = REQUIRED_COLUMNS
) -> Iterator[str]:
    """Yield every mistake in a row of a file whose rows have this format, or none of `formats`."""
    if row_format is None:
        yield f"{location(number)}: {no_known_format(row, formats)}"
        return
    for column, advice in _row_problems(row, row_format):
        yield f"{location(number)}: column {column}: {advice}"


def is_plainly_right(row: Row, row_format: RowFormat) -> bool:
    """Return whether a row whose texts are of whole characters has no mistake, where a short look shows that: most rows
    of most files are so, and finding every mistake takes ten times as long.
    """
    if row_format == "messages":
        return _is_plain_conversation(row["messages"])
    if row_format in PREFERENCES:
        return are_plainly_right(row)
    texts = [row[column] for column in REQUIRED_COLUMNS[row_format]]
    may_be_empty = row_format == "prompt/completion"
    return (
        row_format in ("prompt/completion", "text")
        and all(type(text) is str for text in texts)
        and all(text.strip() for text in texts[may_be_empty:])
    )


def _is_plain_conversation(messages: Any) -> bool:
    if type(messages) is not list:
        return False
    answered = False
    for index, message in enumerate(messages):
        if type(message) is not dict or len(message) != 2:
            return False
        role, content = message.get("role"), message.get("content")
        if type(content) is not str or not content.strip() or role not in ROLES:
            return False
        answered = answered or (role == "assistant" and index > 0)
    return answered


def _row_problems(row: Row, row_format: RowFormat) -> Iterator[tuple[str, str]]:
    """Yield (column, what to change) of every mistake in a row."""
    missing = [column for column in REQUIRED_COLUMNS[row_format] if column not in row]
    for column in missing:
        own = format_of(row)
        mixed = f": this row is {own}, most are {row_format}, and a data set has one format" if own else "; add it"
        yield f"`{column}`", f"missing{mixed}"
    if missing:
        return
    if row_format == "messages":
        yield from conversation_problems("messages", row["messages"], answer_from=1)
    elif row_format == "conversations (ShareGPT)":
        yield from _conversation_problems(row)
    elif row_format == "prompt/completion":
        yield from _prompt_completion_problems(row)
    elif row_format == "instruction/output":
        yield from text_problems("instruction", row["instruction"])
        yield from text_problems("input", row.get("input", ""), may_be_empty=True)
        yield from text_problems("output", row["output"])
    elif row_format in PREFERENCES:
        yield from preference_problems(row)
    else:
        yield from text_problems("text", row["text"])


def _conversation_problems(row: Row) -> Iterator[tuple[str, str]]:
    turns, system = row["conversations"], row.get("system", "")
    yield from text_problems("system", system, may_be_empty=True)
    yield from conversation_problems("conversations", turns, answer_from=0 if system else 1)
    first = turns[0] if isinstance(turns, list) and turns else None
    if system and isinstance(first, dict) and "system" in (first.get("from"), first.get("role")):
        yield "`system`", "the conversation begins with a system turn of its own; leave one of the two out"


def _prompt_completion_problems(row: Row) -> Iterator[tuple[str, str]]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        yield from conversation_problems("prompt", prompt, answer_from=None)
        yield from conversation_problems("completion", completion, answer_from=0)
    elif isinstance(prompt, list) or isinstance(completion, list):
        kinds = f"`prompt` is {kind(prompt)} and `completion` {kind(completion)}"
        yield "`completion`", f"{kinds}; make both strings or both lists of messages"
    else:
        yield from text_problems("prompt", prompt, may_be_empty=True)
        yield from text_problems("completion", completion)
