"""Files -> rows: formats are recognised, and every mistake is named with its line, column and what to change."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lora_core.data.dataset import DatasetError, build_examples, check_rows, read_rows
from lora_core.data.messages import for_template
from lora_core.data.sharegpt import conversation
from tests.support.rows import chat, message, numbered, problems
from tests.support.tiny_models import CHAT_TEMPLATE, byte_tokenizer


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_lines_end_at_newlines_only_and_marks_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    path = write(
        tmp_path / "a.jsonl", bom + b'{"text": "a"}\r', "", '{"text": "b\u2028c"}', bom + b'{"text": "d"}', "  ", ""
    )
    assert read_rows(path) == [(1, {"text": "a"}), (3, {"text": "b\u2028c"}), (4, {"text": "d"})]


def test_every_unreadable_line_is_reported_beside_the_other_mistakes(tmp_path: Path) -> None:
    lines = [
        '{"text": "a"}',
        '{"text": "a", }',
        '{"text": 3}',
        '["a"]',
        b'{"text": "\xff"}',
        "",
        '{"text": "b"',
        '{"text": ""}',
    ]
    with pytest.raises(DatasetError) as raised:
        read_rows(write(tmp_path / "a.jsonl", *lines))
    assert [text.split(":")[0] for text in raised.value.problems] == [f"line {number}" for number in (2, 3, 4, 5, 7, 8)]
    not_json, wrong_type, no_object, not_utf8, unfinished, empty = raised.value.problems
    assert "not JSON" in not_json
    assert "at character 15" in not_json
    assert wrong_type == "line 3: column `text`: a number; write a string"
    assert no_object == "line 4: a list; write an object with the columns as keys"
    assert not_utf8 == "line 5: byte 11 is not UTF-8; save the file as UTF-8"
    assert "not JSON" in unfinished
    assert empty == "line 8: column `text`: empty; write the text, or leave the row out"


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("a.jsonl", b"", "the file has no rows"),
        ("a.jsonl", b"\n \n\xef\xbb\xbf\n", "the file has no rows"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
        ("a.jsonl.gz", b"\x1f\x8b", "`.gz` is not read; convert it to .jsonl, .json, .csv or .parquet"),
        ("a.json", b"[ ]", "the file has no rows"),
        ("a.json", b'[{"text": "\xff"}]', "line 1 is not UTF-8; save the file as UTF-8"),
        ("a.json", b'{\n"data": [{"text": "a"}]\n}',
         "the file is one object: column `data`: no known format; use `messages`, or"),
        ("a.csv", "text\na".encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
        ("a.csv", b"", "the file has no rows"),
        ("a.csv", b"text\n", "the file has no rows"),
        ("a.csv", b"question,\xff\na,b",
         "the first line has to name the columns: column `question`, `\\udcff`: no known"),
        ("a.csv", b'messages\n"[]"', "a cell of CSV is text, no list of messages; write them as .jsonl"),
        ("a.csv", b"text,id,text\na,1,b", "column `text` is there twice; keep one of them"),
        ("a.parquet", b"PAR1 and no more", "it cannot be read as Parquet"),
        ("a.parquet", b'{"text": "a"}', "it cannot be read as Parquet"),
    ],
)  # fmt: skip
def test_files_that_are_no_data_set_are_refused_in_a_sentence(
    tmp_path: Path, name: str, content: bytes, advice: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DatasetError) as raised:
        read_rows(path)
    assert str(raised.value).startswith(f"dataset {path}: ")
    assert advice in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some text", "more text"]}), path)
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36  # the footer is whole, the first page is not
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="cannot be read as Parquet"):
        read_rows(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"dataset .*/nowhere.jsonl: there is no such file"):
        read_rows(tmp_path / "nowhere.jsonl")


def turn(speaker: str, value: str, **more: Any) -> dict[str, Any]:
    """One of ShareGPT's."""
    return {"from": speaker, "value": value, **more}


FORMATS: dict[str, list[dict[str, Any]]] = {
    "messages": [{**chat("a", "b"), "id": 1}, {"messages": [message("system", "s"), message("user", "a", name="n"),
     message("assistant", "b", weight=0)]}, {"messages": [message("user", "a"), message("assistant", "b", weight=1)],
     "id": None}],
    "conversations (ShareGPT)": [{"id": "x", "conversations": [turn("human", "a"), turn("gpt", "b", weight=None),
     turn("human", "")]}, {"conversations": [turn("human", "a"), turn("gpt", "b", weight=0), turn("gpt", "c",
     html="<p>")], "system": "s"}],
    "prompt/completion": [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d", "extra": [1, 2]}],
    "instruction/output": [{"instruction": "a", "input": "x", "output": "b"}, {"instruction": "c", "input": None,
     "output": "d"}],
    "text": [{"text": "a"}, {"text": "b 🙂", "when": 1.5}],
}  # fmt: skip


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("suffix", [True, False])
def test_parquet_is_read_as_jsonl_is(tmp_path: Path, row_format: str, suffix: bool) -> None:
    rows = FORMATS[row_format]
    lines = write(tmp_path / ("a.jsonl" if suffix else "a"), *[json.dumps(row) for row in rows])
    table = tmp_path / ("b.parquet" if suffix else "b")
    columns = {column: [row.get(column) for row in rows] for row in rows for column in row}
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    from_lines, from_table = read_rows(lines), read_rows(table)
    assert check_rows(from_lines) == check_rows(from_table) == row_format
    options: dict[str, Any] = {"max_seq_len": 64, "train_on": "completion", "overlong": "truncate"}
    tokenizer = byte_tokenizer()
    # the template shows a name where there is one: Parquet's nulls are no keys
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ m['role'] }}", "{{ m['role'] }}{{ 'named' if 'name' in m else '' }}"
    )
    assert build_examples(from_lines, tokenizer, **options) == build_examples(from_table, tokenizer, **options)


GOOD: dict[str, dict[str, Any]] = {
    "messages": chat("a", "b"),
    "sharegpt": {"conversations": [turn("human", "a"), turn("gpt", "b")]},
    "prompt": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "output": "b"},
    "text": {"text": "a"},
}
EMPTY = "empty; write the text, or leave the row out"
HALF = "half of a surrogate pair, such as \\ud83d alone; write the whole character"
MIXED = "and a data set has one format"


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [
        ("messages", {"messages": "a"}, ["`messages`: a string; write a list of messages with `role` and `content`"]),
        ("messages", {"messages": []},
         ["`messages`: an empty list; write a list of messages with `role` and `content`"]),
        ("messages", {"messages": ["a"]}, ["`messages[0]`: a string; write an object with `role` and `content`"]),
        ("messages", {"messages": [{"from": "human", "value": "a"}]},
         ["`messages[0].role`: missing; use system, user, assistant or tool",
         "`messages[0].content`: missing; add a string"]),
        ("messages", {"messages": [message("user", "a"), message("gpt", "b")]},
         ["`messages[1].role`: `gpt` is unknown; use system, user, assistant or tool"]),
        ("messages", chat("a", " \n"), [f"`messages[1].content`: {EMPTY}"]),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}, message("assistant", "b")]},
         ["`messages[0].content`: a list; write a string, or parts of type text"]),
        ("messages", {"messages": [message("user", "a"), {"role": "assistant", "content": None, "tool_calls": [{}]}]},
         ["`messages[1].tool_calls`: calls are not supported; write the call into `content`",
         "`messages[1].content`: missing; add a string"]),
        ("messages", {"messages": [message("user", "a"), message("assistant", "b", weight=0.5)]},
         ["`messages[1].weight`: use 1 to learn this message, 0 to leave it as context"]),
        ("messages", {"messages": [message("system", "a"), message("user", "b")]},
         ["`messages`: no message of the assistant that follows another one; add the answer to learn"]),
        ("messages", {"messages": [message("assistant", "a"), message("user", "b")]},
         ["`messages`: no message of the assistant that follows another one; add the answer to learn"]),
        ("messages", chat("\ud83d", "b"), [f"`messages[0].content`: {HALF}"]),
        ("messages", {"conversations": []},
         [f"`messages`: missing: this row is conversations (ShareGPT), most are messages, {MIXED}"]),
        ("messages", {"messages": [message("user", "a", name="\ud83d"), message("assistant", "b")]},
         [f"`messages[0].name`: {HALF}"]),
        ("messages", {"messages": [{"role": "\ud83d\n", "content": "a"}, {"role": {"a": 1}, "content": "b"}]},
         ["`messages[0].role`: `\\ud83d\\n` is unknown; use system, user, assistant or tool",
         "`messages[1].role`: `{'a': 1}` is unknown; use system, user, assistant or tool"]),
        ("messages", {"messages": [message("user", "a", **{"\udc00": 1}), message("assistant", "b")]},
         ["`messages[0].\\udc00`: not supported; leave it out"]),
        ("messages", {"text": "a"}, [f"`messages`: missing: this row is text, most are messages, {MIXED}"]),
        ("sharegpt", {"conversations": [turn("gtp", "a"), turn("gpt", " "), {"value": "a"}, {"from": "human"}, "x",
         turn("gpt", "\ud83d")]}, ["`conversations[0].from`: `gtp` is unknown; use system, user, assistant or tool",
         "`conversations[2].from`: missing; use system, user, assistant or tool",
         "`conversations[3].value`: missing; add a string",
         "`conversations[4]`: a string; write an object with `role` and `content`",
         f"`conversations[5].value`: {HALF}"]),
        ("sharegpt", {"conversations": [turn("human", ""), turn("gpt", " ")]}, [f"`conversations[1].value`: {EMPTY}"]),
        ("sharegpt", {"conversations": []},
         ["`conversations`: an empty list; write a list of messages with `from` and `value`"]),
        ("sharegpt", {"conversations": [turn("gpt", "a"), turn("human", "b")]},
         ["`conversations`: no message of the assistant that follows another one; add the answer to learn"]),
        ("sharegpt", {"conversations": [turn("human", "a"), turn("function_call", "f()"), turn("observation", "1"),
         turn("gpt", 3)]},
         ["`conversations[1].from`: calls are not supported; write the call into an answer, or leave the row out",
         "`conversations[3].value`: a number; write a string, or parts of type text"]),
        ("sharegpt", {"conversations": [{"role": "wizard", "content": "a"}, turn("gpt", "b", weight=2)]},
         ["`conversations[0].role`: `wizard` is unknown; use system, user, assistant or tool",
         "`conversations[1].weight`: use 1 to learn this message, 0 to leave it as context"]),
        ("sharegpt", {"conversations": [turn("system", "a"), turn("gpt", "b")], "system": "c"},
         ["`system`: the conversation begins with a system turn of its own; leave one of the two out"]),
        ("sharegpt", {"conversations": [turn("human", "a"), turn("gpt", "b")], "system": 3},
         ["`system`: a number; write a string"]),
        ("prompt", {"prompt": "a"}, ["`completion`: missing; add it"]),
        ("prompt", {"question": "a"}, ["`prompt`: missing; add it", "`completion`: missing; add it"]),
        ("prompt", {"prompt": 1, "completion": ""}, ["`prompt`: a number; write a string", f"`completion`: {EMPTY}"]),
        ("prompt", {"prompt": "a", "completion": [message("assistant", "b")]},
         ["`completion`: `prompt` is a string and `completion` a list; make both strings or both lists of messages"]),
        ("prompt", {"prompt": [message("user", "a")], "completion": [message("user", "b")]},
         ["`completion`: no message of the assistant; add the answer to learn"]),
        ("alpaca", {"instruction": " ", "input": 3, "output": True}, [f"`instruction`: {EMPTY}",
         "`input`: a number; write a string", "`output`: a boolean; write a string"]),
        ("alpaca", {"instruction": "a"}, ["`output`: missing; add it"]),
        ("text", {"text": {"a": 1}}, ["`text`: an object; write a string"]),
        ("text", {"text": "\ud83d"}, [f"`text`: {HALF}"]),
    ],
)  # fmt: skip
def test_a_bad_row_is_reported_with_line_column_and_what_to_change(
    good: str, bad: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    fine = GOOD[good]
    assert problems([(3, fine), (17, bad), (18, fine)]) == tuple(f"line 17: column {text}" for text in expected)
    # and through a file, the line numbers counted with the blank ones
    path = write(tmp_path / "a.jsonl", json.dumps(fine), "", json.dumps(bad), json.dumps(fine))
    assert all(text.startswith("line 3: column `") for text in problems(read_rows(path)))


def test_the_format_is_what_most_rows_are() -> None:
    assert problems(numbered({"text": "a"}, *[chat("a", "b")] * 2)) == (
        f"line 1: column `messages`: missing: this row is text, most are messages, {MIXED}",
    )
    unknown = (
        "no known format; use `messages`, or `conversations`, or `prompt` and `completion`, or `instruction` and"
        " `output`, or `text`, or `chosen` and `rejected`, or `input`, `preferred_output` and `non_preferred_output`"
    )
    assert problems(numbered({"question": "a", "answer": "b"}, {})) == (
        f"line 1: column `question`, `answer`: {unknown}",
        f"line 2: column none: {unknown}",
    )
    assert problems(numbered({"prompt": "a", "response": "b"})) == ("line 1: column `completion`: missing; add it",)


def test_extra_columns_do_no_harm_and_the_richer_format_wins() -> None:
    assert check_rows(numbered({**chat("a", "b"), "prompt": "a", "text": "x"})) == "messages"
    assert check_rows(numbered({"instruction": "a", "output": "b", "text": "x"})) == "instruction/output"
    assert check_rows(numbered({"prompt": "a", "completion": "b", "text": "x"})) == "prompt/completion"
    assert check_rows(numbered({"text": "a", "output": "b", "prompt": "x"})) == "text"


def test_sharegpts_names_are_a_chat_templates(tmp_path: Path) -> None:
    speakers = [
        "system",
        "human",
        "user",
        "gpt",
        "chatgpt",
        "bing",
        "bard",
        "model",
        "assistant",
        "tool",
        "observation",
    ]
    rows = [
        {"conversations": [turn(speaker, f"{n}") for n, speaker in enumerate(speakers)]},
        {"conversations": [message("user", "a"), message("assistant", "b", weight=0), message("assistant", "c")]},
        {"conversations": [turn("gpt", "a", weight=1, name="n")], "system": "s"},
    ]
    assert check_rows(numbered(*rows)) == "conversations (ShareGPT)"
    roles = ["system", "user", "user", *["assistant"] * 6, "tool", "tool"]
    shown = [
        [
            for_template(m) | ({"weight": m["weight"]} if m.get("weight") is not None else {})
            for m in conversation(row["conversations"], row.get("system", ""))
        ]
        for row in rows
    ]
    assert shown == [
        [message(role, f"{n}") for n, role in enumerate(roles)],
        rows[1]["conversations"],
        [message("system", "s"), message("assistant", "a", weight=1)],
    ]
    path = write(tmp_path / "a.jsonl", *map(json.dumps, rows))
    dataset = build_examples(
        read_rows(path), byte_tokenizer(), max_seq_len=999, train_on="completion", overlong="truncate"
    )
    assert dataset.report.lines()[0] == "3 rows of conversations (ShareGPT), 3 examples"
    assert dataset.report.lines()[-1] == "ignored columns: conversations.name"
    same = build_examples(
        numbered(*[{"messages": messages} for messages in shown]), byte_tokenizer(), max_seq_len=999,
        train_on="completion", overlong="truncate",
    )  # fmt: skip
    assert dataset.examples == same.examples


def test_names_of_columns_can_be_printed() -> None:
    odd = {"text": "a", "\ud83d": 1, "a\nb": 2, "": 3, "ü": 4}
    report = build_examples(
        numbered(odd), byte_tokenizer(), max_seq_len=9, train_on="completion", overlong="truncate"
    ).report
    assert report.lines()[-1] == "ignored columns: (no name), a\\nb, ü, \\ud83d"
    (problem,) = problems(numbered({"\ud83d\n": "a", **{f"c{n}": n for n in range(20)}}))
    assert problem.startswith("line 1: column `\\ud83d\\n`, `c0`, ") and "`c8` and 11 more: no known format" in problem


def test_a_hundred_mistakes_are_named_and_the_others_counted() -> None:
    with pytest.raises(DatasetError) as raised:
        check_rows(numbered(*[{"text": 1}] * 130, {"text": "a"}))
    error = raised.value
    assert len(error.problems) == 100
    assert error.problems[99].startswith("line 100: ")
    assert str(error).splitlines()[-1] == "and 30 more"
    assert len(str(error).splitlines()) == 101
    again = pickle.loads(pickle.dumps(error))  # Ray moves it between processes
    assert (type(again), again.problems, again.more, str(again)) == (DatasetError, error.problems, 30, str(error))
    assert "more" not in str(DatasetError(error.problems))
