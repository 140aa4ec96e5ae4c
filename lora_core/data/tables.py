"""Data sets that are tables: rows of .csv with their lines, rows of .parquet with their numbers.

A CSV file has a header, and text in cells. Of a Parquet file the columns of the format alone are read, so that others
may be of any type, or broken.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import pyarrow
import pyarrow.parquet
from pyarrow import compute

from lora_core.data.format import (
    OF_MESSAGES,
    DatasetError,
    FileRows,
    Formats,
    Problem,
    Row,
    RowNumber,
    format_of,
    location,
    no_known_format,
    used_columns,
    without_nulls,
)
from lora_core.data.json_values import encodable, shown

Read = tuple[FileRows, list[Problem]]
"""The rows that can be read, and what to say of the others."""

_DELIMITERS = ",;\t"  # a spreadsheet writes the second where numbers have a comma
_MOST_VALUES = 4_000_000  # of a Parquet file: 1.6 GiB as rows, where equal ones take 18 KB on disk
_UNREADABLE = (pyarrow.ArrowException, OSError)
_UNCONVERTIBLE = (pyarrow.ArrowException, ValueError, OverflowError, KeyError)  # what Arrow makes no Python value of


def read_csv(path: Path) -> Read:
    """Read rows of text, that of an empty cell too, with the line on which each begins.

    Raises:
        DatasetError: a header that has no format's columns.
    """
    csv.field_size_limit(sys.maxsize)  # it would refuse cells of more than 128 KiB
    rows = FileRows()
    problems: list[Problem] = []
    header: list[str] = []
    # A byte that is no UTF-8 becomes half a character: the row that has it is found below, the others are read.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, delimiter=_delimiter(path), strict=True)
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return rows, problems
            except csv.Error as error:
                advice = "put cells with quotes, commas or line breaks in quotes, and double the quotes in them"
                problems.append((number, f"line {number}: not CSV ({error}); {advice}"))
                if not header:
                    return rows, problems
                continue
            if not header:
                header = _checked_header(path, [name.strip() for name in cells])
            elif cells:
                _collect_cells(number, cells, header, rows, problems)


def _delimiter(path: Path) -> str:
    """Return the delimiter with which the header has the columns of a format."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        line = next((line for line in stream if line.strip()), "")
    headers = {one: next(csv.reader([line], delimiter=one), []) for one in _DELIMITERS}
    return next((one for one, names in headers.items() if format_of({name.strip(): "" for name in names})), ",")


def _checked_header(path: Path, names: list[str]) -> list[str]:
    """Return the names of a header; none where the line is blank."""
    row_format = format_of(dict.fromkeys(names, ""))
    if not any(names):
        return []
    if row_format is None:
        raise DatasetError([f"dataset {path}: the first line has to name the columns: {no_known_format(names)}"])
    if row_format in OF_MESSAGES:
        raise DatasetError([f"dataset {path}: a cell of CSV is text, no list of messages; write them as .jsonl"])
    _refuse_twice(path, names, used_columns(row_format))
    return names


def _collect_cells(number: int, cells: list[str], header: list[str], rows: FileRows, problems: list[Problem]) -> None:
    if len(cells) != len(header):
        counts = f"{len(cells)} cells, and the header has {len(header)}"
        problems.append((number, f"line {number}: {counts}; put cells with commas or line breaks in quotes"))
        return
    broken = [name for name, cell in zip(header, cells, strict=True) if not encodable(cell)]
    if broken:
        names = ", ".join(f"`{shown(name)}`" for name in broken)
        problems.append((number, f"line {number}: column {names}: not UTF-8; save the file as UTF-8"))
    else:
        rows.append((number, dict(zip(header, cells, strict=True))))


def _refuse_twice(path: Path, names: Sequence[str], used: Sequence[str]) -> None:
    twice = [name for name in used if names.count(name) > 1]
    if twice:
        raise DatasetError([f"dataset {path}: column `{twice[0]}` is there twice; keep one of them"])


def read_parquet(path: Path, formats: Formats) -> Read:
    """Read the columns that the format uses, one of `formats`, as rows with their numbers.

    Raises:
        DatasetError: no Parquet file, damaged pages of these columns, no format's columns, or too many values in them.
        MemoryError: equal strings, which the file has once, take more than there is.
    """
    try:
        try:
            table, columns = _used_table(path, path, formats)
        except pyarrow.ArrowInvalid:
            table, columns = _used_table(path, _without_dictionaries(path), formats)
    except MemoryError:  # Arrow's is one of its exceptions, too
        raise
    except _UNREADABLE as error:
        raise DatasetError([f"dataset {path}: it cannot be read as Parquet ({error}); write it again"]) from error
    rows = FileRows(unread=(name for name in columns if name not in table.column_names))
    problems: list[Problem] = []
    number = 1
    for batch in table.to_batches():
        try:
            values = batch.to_pylist(maps_as_pydicts="strict")
        except MemoryError:
            raise
        except _UNCONVERTIBLE:
            _collect_one_by_one(number, batch, rows, problems)
        else:
            rows += [(RowNumber(number + index), without_nulls(row)) for index, row in enumerate(values)]
        number += batch.num_rows
    return rows, problems


def _without_dictionaries(path: Path) -> pyarrow.BufferReader:
    """Return the file with each string as it is: of a dictionary of strings with one that is no UTF-8 Arrow reads
    nothing, and names no row. That a column is to become one is said in the footer, which ends with its length and a
    mark.
    """
    content = path.read_bytes()
    footer = len(content) - int.from_bytes(content[-8:-4], "little") - 8
    return pyarrow.BufferReader(content[:footer] + content[footer:].replace(b"ARROW:schema", b"ARROW:unused"))


def _used_table(path: Path, source: Path | pyarrow.BufferReader, formats: Formats) -> tuple[pyarrow.Table, list[str]]:
    """Read the columns of the format that most rows are of, as `problems_of` would find it; and the names of all."""
    with pyarrow.parquet.ParquetFile(source) as file:
        return _columns_of_format(path, file, formats), file.schema_arrow.names


def _columns_of_format(path: Path, file: pyarrow.parquet.ParquetFile, formats: Formats) -> pyarrow.Table:
    _refuse_many(path, file.metadata, formats)
    names = file.schema_arrow.names
    known = [row_format for row_format, columns in formats.items() if not {*columns}.isdisjoint(names)]
    complete = [row_format for row_format in known if {*formats[row_format]} <= {*names}]
    if not known or (not complete and format_of(names) is not None):
        raise DatasetError([f"dataset {path}: {no_known_format(names, formats)}"])
    if not complete:
        return file.read(columns=[name for name in names if any(name in used_columns(one) for one in known)])
    found: list[tuple[int, pyarrow.Table]] = []
    rest = pyarrow.repeat(True, file.metadata.num_rows)  # the rows of which no format is known yet
    for row_format in complete:
        used = [name for name in used_columns(row_format) if name in names]
        _refuse_twice(path, names, used)
        try:
            table = file.read(columns=used)
        except MemoryError:
            raise
        except _UNREADABLE:
            if not found:
                raise
            continue  # a format that comes before it can be read
        own = reduce(compute.and_, [table.column(name).is_valid() for name in formats[row_format]], rest)
        rest = compute.and_not(rest, own)
        found.append((compute.sum(own).as_py() or 0, table))
        if not compute.any(rest).as_py():
            break
    return max(found, key=lambda one: one[0])[1]


def _refuse_many(path: Path, metadata: pyarrow.parquet.FileMetaData, formats: Formats) -> None:
    used = {name for row_format in formats for name in used_columns(row_format)}
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
    number = sum(one.num_values for one in chunks if one.path_in_schema.partition(".")[0] in used)
    if number > _MOST_VALUES:
        counts = f"{number:,} values, and at most {_MOST_VALUES:,} are read of a Parquet file"
        raise DatasetError([f"dataset {path}: its columns have {counts}; convert it to .jsonl"])


def _collect_one_by_one(first: int, batch: pyarrow.RecordBatch, rows: FileRows, problems: list[Problem]) -> None:
    """Read value by value where one has no Python form, such as a string that is no UTF-8."""
    for index in range(batch.num_rows):
        number, broken = RowNumber(first + index), False
        row: Row = {}
        for name in batch.schema.names:
            try:
                row[name] = batch.column(name)[index].as_py(maps_as_pydicts="strict")
            except _UNCONVERTIBLE as error:
                broken = True
                reason = f"cannot be read ({error}); write a string"
                if isinstance(error, UnicodeDecodeError):
                    reason = "not UTF-8; write it again as text in UTF-8"
                problems.append((number, f"{location(number)}: column `{name}`: {reason}"))
        if not broken:
            rows.append((number, without_nulls(row)))
