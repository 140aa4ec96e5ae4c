"""A check of a file in parts finds what reading it as a whole does, in bounded memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lora_core.data import check
from lora_core.data.check import FileCheck, check_file
from lora_core.data.files import read_rows
from lora_core.data.format import DatasetError, check_rows

ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
GOOD: list[Any] = [
    {"messages": CHAT},
    {"messages": [*CHAT, *CHAT], "note": 1},
    {"messages": [{"role": "system", "content": "Be"}, {"role": "user", "content": "ü"}, {**CHAT[1], "weight": 0}]},
    {"messages": CHAT, "prompt": None},
]
BAD: list[Any] = [
    {"messages": CHAT[:1]},
    {"messages": [CHAT[0], {"role": "assistant", "content": " "}]},
    {"messages": [{"role": "wizard", "content": 1}, *CHAT]},
    {"messages": []},
    {"messages": [CHAT[1]]},
    {"messages": ["Hi"]},
    {"messages": [CHAT[0], {"role": "assistant", "content": "\ud83d"}]},
    {"prompt": "a", "completion": "b"},
    {"prompt": "a"},
    {"other": 1},
    [1, 2],
    {},
]
BROKEN = [
    b'{"messages": ',
    b"\xff{}",
    b"[" * 100_000,
    b'{"messages": []} x',
    b"\xef\xbb\xbf{}",
    b'{"a": 1}\x0b',
    b"nul",
]


def said(path: Path, name: str) -> tuple[str | None, tuple[str, ...], int]:
    """What training says of a file as a whole."""
    try:
        return check_rows(read_rows(path)), (), 0
    except DatasetError as error:
        return None, tuple(problem.replace(str(path), name) for problem in error.problems), error.more


@pytest.mark.parametrize("seed", range(6))
def test_parts_of_a_file_find_what_the_whole_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(check, "PART_BYTES", 400)
    chosen = random.Random(seed)
    lines = [json.dumps(row, ensure_ascii=chosen.random() < 0.5 or "\\ud" in repr(row)).encode() for row in GOOD * 9]
    if seed:
        lines += [json.dumps(row).encode() for row in chosen.sample(BAD, seed * 2)] * (1 if seed < 5 else 30)
        lines += chosen.sample(BROKEN, seed)
    if seed == 3:
        lines = [json.dumps({"other": number}).encode() for number in range(150)]
    lines += [b"", b"  \r"]
    chosen.shuffle(lines)
    lines.insert(0, json.dumps(GOOD[0]).encode() if seed != 3 else b'{"other": 1}')
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * (seed % 2))
    row_format, problems, more = said(path, "mine.jsonl")
    for processes in (1, 2, 5):
        found = check_file(path, "mine.jsonl", processes)
        assert (found.problems, found.more) == (problems, more)
        assert bool(problems) or found == FileCheck(row_format, len(GOOD) * 9 + 1)
        assert found.details is None or found.details.count("\n") == len(problems) - (0 if more else 1)


def test_not_one_mistake_is_overlooked(tmp_path: Path) -> None:
    """Where all other rows are right, and a short look is taken."""
    good = [json.dumps(row).encode() for row in GOOD]
    for number, bad in enumerate([*(json.dumps(row).encode() for row in BAD), *BROKEN]):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(b"\n".join([*good, bad, *good]))
        found = check_file(path, str(path))
        assert found.problems and (found.problems, found.more) == said(path, str(path))[1:], bad


def test_parts_may_end_where_lines_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "PART_BYTES", 1)
    path = tmp_path / "rows.jsonl"
    for wrong in range(10):
        path.write_bytes(b"".join(b'{"text": "%s"}\n' % (b" " if at == wrong else b"x") for at in range(10)))
        for processes in (2, 5):
            found = check_file(path, "rows.jsonl", processes)
            assert (found.rows, len(found.problems)) == (10, 1) and found.problems[0].startswith(f"line {wrong + 1}:")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"prompt,completion\nHi,Hello\n"),
        ("a.csv", b"prompt,completion\nHi\n"),
        ("a.csv", b'{"text": "x"}\n'),
        ("a.json", json.dumps(GOOD).encode()),
        ("a.json", json.dumps(BAD, indent=1).encode()),
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n"),
        ("a.jsonl", b"\xff\xfe{\x00"),
        ("a", b'{"text": "x"}'),
        ("a.parquet", b"PAR1"),
        ("a.json", json.dumps({"text": "one object"}, indent=1).encode() + b"\n"),
    ],
)
def test_other_files_are_read_as_a_whole(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    row_format, problems, more = said(path, name)
    spooled = path.rename(tmp_path / "spooled")
    found = check_file(spooled, name)
    assert (found.problems, found.more) == (problems, more) and (bool(problems) or found.format == row_format)


def test_what_is_too_large_for_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "WHOLE_BYTES", 2**20)
    monkeypatch.setattr(check, "LINE_BYTES", 1000)
    (tmp_path / "a.json").write_text("[" + " " * 2**20 + "]")
    assert "1 MiB are read of a file that has no row a line" in check_file(tmp_path / "a.json", "a.json").problems[0]
    long = json.dumps({"text": "x" * 3000})
    (tmp_path / "b.jsonl").write_text(f'{{"text": "a"}}\n{long}\n{{"text": ""}}\n')
    first, second = check_file(tmp_path / "b.jsonl", "b.jsonl").problems
    assert first.startswith("line 2: longer than") and second.startswith("line 3: column `text`: empty")


MEASURED = """
import os, re
from pathlib import Path
from lora_core.data.check import main
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one process, so that it is the one that is measured
main()
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is told by /proc")
def test_a_large_file_takes_no_more_memory_than_a_small_one(tmp_path: Path) -> None:
    line = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}, CHAT[1]]}).encode() + b"\n"
    kilobytes = []
    for thousands in (1, 48):  # 2 and 98 MB
        path = tmp_path / f"{thousands}.jsonl"
        path.write_bytes(line * 1000 * thousands)
        command = [sys.executable, "-c", MEASURED, str(path), "--name", "rows.jsonl"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        found, peak = map(json.loads, done.stdout.splitlines())
        assert found == {"format": "messages", "rows": 1000 * thousands, "problems": [], "more": 0}
        kilobytes.append(peak)
    assert kilobytes[1] < kilobytes[0] + 10 * 1024, "74 MB, most of it pyarrow"


@pytest.mark.parametrize("nested", [False, True])
def test_equal_strings_of_a_small_file_take_no_more_than_may_be_taken(tmp_path: Path, nested: bool) -> None:
    """600 MB of them, which the file has in KB, where a process may have 512 MiB."""
    text = "x" * 2_000_000
    rows = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}]] * 15 if nested else [text] * 30
    table = pyarrow.table({"messages" if nested else "text": rows})
    with pyarrow.parquet.ParquetWriter(tmp_path / "rows.parquet", table.schema, compression="zstd") as writer:
        for _ in range(10):
            writer.write_table(table)
    assert (tmp_path / "rows.parquet").stat().st_size < 100_000
    code = "import lora_core.data.check as check; check.MEMORY_BYTES = 2**29; check.main(['rows.parquet'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem == "dataset rows.parquet: it takes too much memory to check; convert it to .jsonl"
