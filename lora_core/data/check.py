"""`python -m lora_core.data.check FILE`: what is wrong with a data set, as JSON.

Every mistake is found that training would name before it has a tokenizer.

A file with a row a line is read in parts by as many processes as there are cores, and no part is ever in memory as a
whole; files of other kinds are. Mistakes are counted, and the first hundred told, as `DatasetError` has them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path, PurePath
from typing import BinaryIO

from lora_core.data.files import has_lines, read_line, read_rows
from lora_core.data.format import (
    REPORTED_PROBLEMS,
    DatasetError,
    FormatCounts,
    RowFormat,
    check_rows,
    format_of,
    is_plainly_right,
    problems_of_row,
)

WHOLE_BYTES = 512 * 2**20
"""The most of a file that has no lines: Parquet, CSV and arrays are read as a whole, and take several times as much."""
MEMORY_BYTES = 8 * WHOLE_BYTES
"""The most that each process of this command takes: of equal strings, a Parquet file of KB may hold any number."""
LINE_BYTES = 16 * 2**20
PART_BYTES = 8 * 2**20  # less is not worth a process

_DECODER = json.JSONDecoder()


class _Formats(dict[tuple[str, ...], RowFormat | None]):
    """The formats of rows by their columns, as far as they are known."""


@dataclass(frozen=True)
class FileCheck:
    """What a file holds, and the first of its problems; `more` is the number of the others."""

    format: str | None = None
    rows: int = 0
    problems: tuple[str, ...] = ()
    more: int = 0

    @property
    def details(self) -> str | None:
        """Say what is wrong, a line each; None where nothing is."""
        return str(_error(list(self.problems), self.more)) if self.problems else None


@dataclass
class _Part:
    """What a part of a file's lines has. `wrong` is whether there is a mistake for sure, or perhaps."""

    lines: int = 0
    rows: int = 0
    wrong: bool = False
    counts: FormatCounts = field(default_factory=FormatCounts)
    problems: list[str] = field(default_factory=list)
    more: int = 0


def check_file(path: Path, name: str, processes: int = 1) -> FileCheck:
    """Check a file, which its problems call `name`: its kind is told by the end of that."""
    suffix = PurePath(name).suffix
    try:
        if has_lines(path, suffix):
            return _check_lines(path, name, processes)
        if path.stat().st_size > WHOLE_BYTES:
            advice = f"at most {WHOLE_BYTES >> 20} MiB are read of a file that has no row a line; convert it to .jsonl"
            return FileCheck(problems=(f"dataset {name}: {advice}",))
        rows = read_rows(path, suffix)
        return FileCheck(check_rows(rows), len(rows))
    except DatasetError as error:
        problems = tuple(problem.replace(str(path), name) for problem in error.problems)
        return FileCheck(problems=problems, more=error.more)
    except MemoryError:
        return out_of_memory(name)


def out_of_memory(name: str) -> FileCheck:
    """Return what is said of a file for which there was not enough memory."""
    return FileCheck(problems=(f"dataset {name}: it takes too much memory to check; convert it to .jsonl",))


def _check_lines(path: Path, name: str, processes: int) -> FileCheck:
    """Look at every row shortly, and only where that does not show that all is well, for every mistake."""
    size = path.stat().st_size
    parts = max(1, min(processes, size // PART_BYTES))
    ends = [size * number // parts for number in range(parts + 1)]
    ranges = list(pairwise(ends))
    with ProcessPoolExecutor(parts, mp_context=get_context("fork")) as pool:  # of no process before it is asked
        run: Callable[..., Iterator[_Part]] = map if parts == 1 else pool.map
        counted = list(run(partial(_count, path), *zip(*ranges, strict=True)))
        total = FormatCounts()
        for part in counted:
            total.complete.update(part.counts.complete)
            total.partial.update(part.counts.partial)
        rows, row_format = sum(part.rows for part in counted), total.most()
        if row_format is not None and total.complete[row_format] == rows and not any(part.wrong for part in counted):
            return FileCheck(row_format, rows)
        first = [1 + sum(part.lines for part in counted[:number]) for number in range(parts)]
        found = list(run(partial(_find, path, row_format), *zip(*ranges, strict=True), first))
    problems = [problem for part in found for problem in part.problems]
    number = sum(len(part.problems) + part.more for part in found)
    if not number and not rows:
        problems, number = [f"dataset {name}: the file has no rows; write one for each example"], 1
    told = problems[:REPORTED_PROBLEMS]
    return FileCheck(row_format, rows, tuple(told), number - len(told))


def _count(path: Path, start: int, end: int) -> _Part:
    """Count the lines that begin in this range, their rows and formats, and see whether all are right."""
    part, formats = _Part(), _Formats()
    for line in _lines(path, start, end):
        part.lines += 1
        if (row_format := _plain_format(line, formats)) is not None:
            part.rows += 1
            part.counts.complete[row_format] += 1
        else:
            _count_carefully(part, line)
    return part


def _plain_format(line: bytes, formats: _Formats) -> RowFormat | None:
    """Return the format of a line's row, where a short look shows that it has no mistake in that: most rows are so, and
    a longer look takes three times as long.

    It has no text with half a character: that can only come of an escape of one, as bytes that are one are no UTF-8.
    """
    if len(line) > LINE_BYTES or b"\\ud" in line or b"\\uD" in line:
        return None
    try:
        text = line.decode()
        row, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if type(row) is not dict or text[end:].strip(" \t\r\n") or None in row.values():
        return None
    if (columns := tuple(row)) not in formats:
        if len(formats) > 1000:  # rows of ever other columns
            formats.clear()
        formats[columns] = format_of(row)
    row_format = formats[columns]
    return row_format if row_format is not None and is_plainly_right(row, row_format) else None


def _count_carefully(part: _Part, line: bytes) -> None:
    row = read_line(part.lines, line)
    if isinstance(row, str) or len(line) > LINE_BYTES:
        part.wrong = True
    elif row is not None:
        part.rows += 1
        row_format = part.counts.add(row)
        problems = problems_of_row(part.lines, row, row_format)
        part.wrong = part.wrong or next(problems, None) is not None


def _find(path: Path, row_format: RowFormat | None, start: int, end: int, number: int) -> _Part:
    """Find every mistake in the lines that begin in this range, of which the first has this number."""
    part, formats = _Part(), _Formats()
    for at, line in enumerate(_lines(path, start, end), number):
        if row_format is not None and _plain_format(line, formats) == row_format:
            continue
        for problem in _problems(at, line, row_format):
            if len(part.problems) < REPORTED_PROBLEMS:
                part.problems.append(problem)
            else:
                part.more += 1
    return part


def _problems(number: int, line: bytes, row_format: RowFormat | None) -> Iterator[str]:
    if len(line) > LINE_BYTES:
        yield f"line {number}: longer than {LINE_BYTES >> 20} MiB; write shorter rows, each on a line of its own"
        return
    row = read_line(number, line)
    if isinstance(row, str):
        yield row
    elif row is not None:
        yield from problems_of_row(number, row, row_format)


def _lines(path: Path, start: int, end: int) -> Iterator[bytes]:
    """Yield the lines that begin in this range; of one that is too long, its beginning."""
    with path.open("rb") as stream:
        at = start
        if start:
            stream.seek(start - 1)
            at += _skip_line(stream) - 1
        while at < end and (line := stream.readline(LINE_BYTES + 1)):
            at += len(line) + (_skip_line(stream) if len(line) > LINE_BYTES and not line.endswith(b"\n") else 0)
            yield line


def _skip_line(stream: BinaryIO) -> int:
    """Go to the end of a line; returns how far that was."""
    skipped = 0
    while line := stream.readline(LINE_BYTES):
        skipped += len(line)
        if line.endswith(b"\n"):
            break
    return skipped


def _error(problems: list[str], more: int) -> DatasetError:
    error = DatasetError(problems)
    error.more = more
    return error


def main(arguments: list[str] | None = None) -> int:
    """Print what `check_file` finds; returns 1 where that is a mistake."""
    parser = argparse.ArgumentParser(prog="python -m lora_core.data.check", description="Check a data set's file.")
    parser.add_argument("file", type=Path, help="of .jsonl, .json, .csv or .parquet")
    parser.add_argument("--name", help="what the file is called in what is said of it; its path")
    chosen = parser.parse_args(arguments)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    check = check_file(chosen.file, chosen.name or str(chosen.file), len(os.sched_getaffinity(0)))
    print(json.dumps(asdict(check)))
    return 1 if check.problems else 0


if __name__ == "__main__":
    sys.exit(main())
