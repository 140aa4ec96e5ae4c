"""Kinds of files -> the same rows, each with its place in the file; and what breaks a reader is a sentence."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lora_core.config import TrainConfig
from lora_core.data import tables
from lora_core.data.dataset import DatasetError, build_datasets, build_examples, check_rows, read_rows
from tests.support.rows import message
from tests.support.tiny_models import byte_tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": 'a "b",\nc', "completion": "d\r\n", "id": "1"},
    {"prompt": "ü", "completion": "🙂 e", "id": "2"},
]


def write_csv(path: Path, delimiter: str = ",", encoding: str = "utf-8") -> None:
    with path.open("w", newline="", encoding=encoding) as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_table(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


WRITERS: dict[str, Callable[[Path], object]] = {
    "lines.json": lambda path: path.write_text("\n".join(map(json.dumps, ROWS))),
    "array.json": lambda path: path.write_text(json.dumps(ROWS)),
    "indented.json": lambda path: path.write_text("\n " + json.dumps(ROWS, indent=2) + "\n"),
    "array.jsonl": lambda path: path.write_text(json.dumps(ROWS, indent="\t"), encoding="utf-8-sig"),
    "array": lambda path: path.write_text(json.dumps(ROWS)),
    "a.csv": write_csv,
    "A.CSV": lambda path: write_csv(path, encoding="utf-8-sig"),
    "semicolons.csv": lambda path: write_csv(path, ";"),
    "tabs.csv": lambda path: write_csv(path, "\t"),
    "csv": lambda path: write_csv(path, encoding="utf-8-sig"),
    "a.parquet": lambda path: write_table(path, {column: [row[column] for row in ROWS] for column in ROWS[0]}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows_and_report(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    rows = read_rows(tmp_path / name)
    used = [{key: row[key] for key in ("prompt", "completion")} for _, row in rows]
    assert used == [{key: row[key] for key in ("prompt", "completion")} for row in ROWS]
    report = build_examples(rows, byte_tokenizer(), max_seq_len=64, train_on="completion", overlong="truncate").report
    assert (report.format, report.rows, report.ignored_columns) == ("prompt/completion", 2, ("id",))


def failure(path: Path) -> list[str]:
    with pytest.raises(DatasetError) as raised:
        read_rows(path)
    return list(raised.value.problems)


def test_one_object_on_many_lines_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "a", "n": None}, indent=2))
    assert read_rows(path) == [(1, {"text": "a"})]
    path.write_text(json.dumps({"text": "a"}, indent=2) + "\n" + json.dumps({"text": "b"}, indent=2))
    assert failure(path)[0].startswith("line 1: not JSON (")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"text": "a"},\n\n {"text": 3}, ["b"], {"text": ""}]', [
            "row 2: column `text`: a number; write a string",
            "row 3: a list; write an object with the columns as keys",
            "row 4: column `text`: empty; write the text, or leave the row out",
        ]),
        ('[{"text": 1},\n{"text": "b",}]', [
            "row 1: column `text`: a number; write a string",
            "row 2: not JSON (Illegal trailing comma before end of object at line 2, character 13);"
            " write one array of objects, or an object a line",
        ]),
        ('[{"text": "a"}\n{"text": "b"}]', ["row 2: not JSON (Expecting ',' or ']' at line 2, character 1);"]),
        ('[{"text": "a"}[{"text": "b"}]', ["row 2: not JSON (Expecting ',' or ']' at line 1, character 15);"]),
        ('[{"text": "a"}]\n[]', ["row 2: not JSON (More behind the array at line 2, character 1);"]),
        ('[{"text": "a"},', ["row 2: not JSON (Expecting value at line 1, character 16);"]),
        ('["a"]\n["b"]', ["row 1: a string; write an object", "row 2: not JSON (More behind the array at line 2"]),
    ],
)  # fmt: skip
def test_mistakes_in_an_array_are_named_by_the_number_of_the_row(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    found = failure(path)
    assert len(found) == len(expected)
    for problem, start in zip(found, expected, strict=True):
        # Python's own words for a comma too many changed in 3.13
        assert problem.startswith(start) or ("row 2: not JSON" in start and "row 2: not JSON" in problem), problem


DEEP = "[" * 100_000


@pytest.mark.parametrize("value", ["9" * 5000, f"-{'9' * 5000}", DEEP, '{"a":' * 100_000])
def test_numbers_and_nesting_beyond_the_parser_are_a_sentence_with_the_place(tmp_path: Path, value: str) -> None:
    advice = "nest too deep to be read" if len(value) > 5001 else "a number has more digits than can be read"
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a"}\n{"text": "b", "x": ' + value + '}\n{"text": 3}\n')
    array = tmp_path / "a.json"
    array.write_text('[{"text": 3}, {"text": "b", "x": ' + value + "}]")
    for path, place, other in ((lines, "line 2", "line 3"), (array, "row 2", "row 1")):
        found = {problem.split(":")[0]: problem for problem in failure(path)}
        assert found.keys() == {place, other} and advice in found[place]
    lines.write_text('{\n"text": "a",\n"x": ' + value + "}\n")
    assert failure(lines)[0].startswith("line 1: not JSON")


def test_numbers_that_json_does_not_know_are_no_text_and_else_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "x": NaN}\n{"text": "b", "x": -1e999}\n')
    assert [row["text"] for _, row in read_rows(path)] == ["a", "b"]
    path.write_text('{"text": NaN}\n{"text": 1e999}\n')
    with pytest.raises(DatasetError, match="line 1: column `text`: a number; write a string"):
        check_rows(read_rows(path))


def test_rows_of_csv_have_the_line_on_which_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbf\r\n prompt , completion,note\r\n"a\r\n\r\nb",c,\r\n\r\nd,e,"f, g"\r\n"h",'
        + b"i" * 200_000
        + b",j"
    )
    rows = read_rows(path)
    assert [number for number, _ in rows] == [3, 7, 8]
    assert rows[0][1] == {"prompt": "a\r\n\r\nb", "completion": "c", "note": ""}
    assert rows[1][1] == {"prompt": "d", "completion": "e", "note": "f, g"}
    assert len(rows[2][1]["completion"]) == 200_000


def test_every_mistake_in_csv_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\n"x\ny",\n1,2,3\n4\n\xff,b\n"c"d,e\nf,"\xc3\xa4\xff"\nok,ok\n"g,h\ni,j\n')
    quote = "put cells with quotes, commas or line breaks in quotes, and double the quotes in them"
    assert failure(path) == [
        "line 2: column `completion`: empty; write the text, or leave the row out",
        "line 4: 3 cells, and the header has 2; put cells with commas or line breaks in quotes",
        "line 5: 1 cells, and the header has 2; put cells with commas or line breaks in quotes",
        "line 6: column `prompt`: not UTF-8; save the file as UTF-8",
        f"line 7: not CSV (',' expected after '\"'); {quote}",
        "line 8: column `completion`: not UTF-8; save the file as UTF-8",
        f"line 10: not CSV (unexpected end of data); {quote}",
    ]
    path.write_bytes(b'"prompt,completion\na,b\n')
    assert failure(path) == [f"line 1: not CSV (unexpected end of data); {quote}"]


def broken_text(texts: list[bytes]) -> pyarrow.Array:
    """A column of strings of these bytes, UTF-8 or not."""
    return pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())


def damage(path: Path, column: str) -> None:
    """The pages of one column, and nothing else."""
    where = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    chunks = [where.column(index) for index in range(where.num_columns)]
    (chunk,) = [chunk for chunk in chunks if chunk.path_in_schema == column]
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)


def test_columns_that_nobody_uses_break_nothing_and_are_reported(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "a.parquet",
        {
            "instruction": ["a", "b"],
            "text": ["rendered", "rendered"],
            "output": ["c", "d"],
            "took": pyarrow.array([2**62, 1], pyarrow.duration("s")),  # no Python value
            "where": pyarrow.array([1, 2], pyarrow.timestamp("us", tz="No/Where")),
            "raw": broken_text([b"\xff", b"a"]),
            "damaged": ["x", "y"],
        },
    )
    damage(path, "damaged")
    damage(path, "text")  # a format's column too, but of one that comes later
    rows = read_rows(path)
    assert rows == [(1, {"instruction": "a", "output": "c"}), (2, {"instruction": "b", "output": "d"})]
    train, held_out = build_datasets(path, 0.4, byte_tokenizer(), TrainConfig(max_seq_len=64))
    assert held_out is not None
    for dataset in (train, held_out):
        assert dataset.report.ignored_columns == ("damaged", "raw", "text", "took", "where")
    damage(path, "output")
    assert failure(path)[0].startswith(f"dataset {path}: it cannot be read as Parquet (")


def test_a_table_of_no_format_is_refused_by_its_columns(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", {"question": ["a", "b"], "x": pyarrow.array([2**62, 1], "duration[s]")})
    (problem,) = failure(path)
    assert problem.startswith(f"dataset {path}: column `question`, `x`: no known format; use `messages`, or")
    path = write_table(tmp_path / "b.parquet", {"prompt": ["a"], "response": ["b"], "x": broken_text([b"\xff"])})
    with pytest.raises(DatasetError, match="row 1: column `completion`: missing; add it"):
        check_rows(read_rows(path))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "c.parquet")
    assert failure(tmp_path / "c.parquet") == [
        f"dataset {tmp_path / 'c.parquet'}: column `text` is there twice; keep one of them"
    ]


def test_the_columns_of_most_rows_are_read(tmp_path: Path) -> None:
    """As where all columns are read: JSON's rows with one format each."""
    columns = {"prompt": ["a", None, None, "c"], "completion": ["b", None, "x", "d"], "text": [None, "e", "f", "g"]}
    table = write_table(tmp_path / "a.parquet", columns)
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps({name: columns[name][n] for name in columns}) for n in range(4)))
    places = []
    for path in (lines, table):
        with pytest.raises(DatasetError) as raised:
            check_rows(read_rows(path))
        places.append([problem.split(": ")[:2] for problem in raised.value.problems])
    assert [[place.split()[1], column] for place, column in places[0]] == [
        [place.split()[1], column] for place, column in places[1]
    ]
    assert {place.split()[0] for place, _ in places[1]} == {"row"}


def test_a_parquet_file_has_no_more_values_than_memory_has_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which its size does not say: a million equal ones are nothing on disk. Columns that nobody uses do not count."""
    monkeypatch.setattr(tables, "_MOST_VALUES", 100)
    assert len(read_rows(write_table(tmp_path / "a.parquet", {"text": ["x"] * 100, "id": range(100)}))) == 100
    turns = [[message("user", "a")] * 20 + [message("assistant", "b")]] * 3
    for rows in ({"text": ["x"] * 101}, {"messages": turns}):
        path = write_table(tmp_path / "b.parquet", rows)
        size = 101 if "text" in rows else 126
        sentence = f"its columns have {size} values, and at most 100 are read of a Parquet file; convert it to .jsonl"
        assert failure(path) == [f"dataset {path}: {sentence}"]
        monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read", lambda *_, **__: 1 / 0)  # nothing is read before


def test_a_string_that_is_not_utf8_is_named_with_its_row(tmp_path: Path) -> None:
    texts = [b"a", b"\xff", b"b", b"c\xc3", b""]
    (tmp_path / "dictionary").mkdir()
    encoded = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1, 2, 3, 4]), broken_text(texts))
    large = pyarrow.array(texts, pyarrow.large_binary()).view(pyarrow.large_string())
    for number, column in enumerate((broken_text(texts), encoded, large)):
        path = write_table(tmp_path / f"{number}.parquet", {"text": column})
        assert failure(path) == [
            "row 2: column `text`: not UTF-8; write it again as text in UTF-8",
            "row 4: column `text`: not UTF-8; write it again as text in UTF-8",
            "row 5: column `text`: empty; write the text, or leave the row out",
        ]
    turns = [[message("user", "a"), message("assistant", "b")]] * 2
    kinds = pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.binary()}))
    bad = [[{**m, "content": b"\xff" if n else b"a"} for m in turn] for n, turn in enumerate(turns)]
    text = pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()}))
    path = write_table(tmp_path / "nested.parquet", {"messages": pyarrow.array(bad, kinds).view(text)})
    assert failure(path) == ["row 2: column `messages`: not UTF-8; write it again as text in UTF-8"]


NESTED = pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string()))


@pytest.mark.parametrize("kind", ["struct", "large", "map", "dictionary"])
def test_messages_in_every_nested_form_are_read(tmp_path: Path, kind: str) -> None:
    turns = [[message("user", f"a{n}"), message("assistant", f"b{n}")] for n in range(3)]
    types = {
        "struct": None,
        "large": pyarrow.large_list(pyarrow.struct({"role": "large_string", "content": "large_string"})),
        "map": NESTED,
        "dictionary": pyarrow.list_(
            pyarrow.struct({"role": pyarrow.dictionary("int32", "string"), "content": "string"})
        ),
    }
    values: Any = [[list(m.items()) for m in turn] for turn in turns] if kind == "map" else turns
    path = write_table(tmp_path / "a.parquet", {"messages": pyarrow.array(values, types[kind])})
    assert read_rows(path) == [(number, {"messages": turn}) for number, turn in enumerate(turns, start=1)]
