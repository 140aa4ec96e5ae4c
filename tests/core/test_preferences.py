"""Rows of preferences -> pairs of documents; which rows are some, and what is wrong with those that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lora_core.config import TrainConfig
from lora_core.data.check import check_file
from lora_core.data.dataset import Dataset, DatasetError, build_datasets, build_examples, check_rows
from lora_core.data.encoded_datasets import read_datasets, write_datasets
from lora_core.data.format import PREFERENCES, format_of
from tests.support.rows import message, numbered
from tests.support.tiny_models import CHAT_TEMPLATE, byte_tokenizer

Row = dict[str, Any]
PROMPT = [message("system", "Be kind."), message("user", "Hi")]
YES, NO = [message("assistant", "Hello, dear.")], [message("assistant", "What?")]
TOOLS = [{"type": "function", "function": {"name": "look"}}]


def built(*rows: Row, template: str = CHAT_TEMPLATE, **options: Any) -> Dataset:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    given: Row = {"max_seq_len": 999, "train_on": "completion", "overlong": "truncate"} | options
    return build_examples(numbered(*rows), tokenizer, **given)


@pytest.mark.parametrize(
    "row",
    [
        {"input": {"messages": PROMPT, "tools": [], "parallel_tool_calls": True}, "preferred_output": YES,
         "non_preferred_output": NO},
        {"prompt": PROMPT, "chosen": YES, "rejected": NO},
        {"chosen": [*PROMPT, *YES], "rejected": [*PROMPT, *NO]},
        {"prompt": "Hi", "chosen": [*PROMPT, *YES], "rejected": [*PROMPT, *NO], "score": 3},
    ],
    ids=["OpenAI", "explicit", "implicit", "repeated"],
)  # fmt: skip
def test_a_pair_is_both_answers_behind_the_prompt_as_each_would_be_learnt(row: Row) -> None:
    expected = built({"prompt": PROMPT, "completion": YES}, {"prompt": PROMPT, "completion": NO}).examples
    found = built(row, row)
    assert found.examples == [*expected, *expected] and expected[0] != expected[1]
    assert found.report.lines()[0] == f"2 rows of {found.report.format}, 2 pairs"
    assert (found.report.examples, len(found.report.lengths)) == (2, 4)
    ignored = {"input": ("input.parallel_tool_calls",), "score": ("score",)}
    assert found.report.ignored_columns == next((names for key, names in ignored.items() if key in row), ())


def test_texts_are_pairs_with_a_prompt_or_with_one_in_common() -> None:
    """Which ends where a word begins, so that the tokens of answers are those that a model writes."""
    explicit = {"prompt": "Q: a?\nA:", "chosen": " it is", "rejected": " it isn't"}
    implicit = {"chosen": "Q: a?\nA: it is", "rejected": "Q: a?\nA: it isn't"}
    whole = built(implicit | {"prompt": "Q: a?\nA: it"} | {"chosen": " is", "rejected": " isn't"})
    assert built(implicit).examples == whole.examples
    assert [example.ids for example in built(explicit).examples] == [example.ids for example in whole.examples]
    (chosen, rejected) = built({"chosen": "yes", "rejected": "no"}).examples
    assert chosen.labels_mask == [False, *[True] * 3] and rejected.labels_mask == [False, *[True] * 2]


def test_several_answers_are_one_document_unless_the_template_rewrites_them() -> None:
    longer = [*YES, message("user", "And?"), message("assistant", "Bye.")]
    row = {"prompt": PROMPT, "chosen": longer, "rejected": NO}
    chosen, _ = built(row).examples
    assert chosen == built({"prompt": PROMPT, "completion": longer}).examples[0]
    forgets = CHAT_TEMPLATE.replace("m['content']", "(m['content'] if loop.last or m['role'] != 'assistant' else '')")
    assert forgets != CHAT_TEMPLATE
    with pytest.raises(DatasetError, match=r"^line 1: column `chosen`: the chat template rewrites its earlier answers"):
        built(row, template=forgets)


def test_tools_are_shown_to_a_template_that_shows_some() -> None:
    row = {"input": {"messages": PROMPT, "tools": TOOLS}, "preferred_output": YES, "non_preferred_output": NO}
    shows = "{% for tool in tools or [] %}{{ tool['function']['name'] }} {% endfor %}" + CHAT_TEMPLATE
    shown, without = built(row, template=shows).examples, built(row | {"input": {"messages": PROMPT}}).examples
    assert [len(a.ids) - len(b.ids) for a, b in zip(shown, without, strict=True)] == [len("look ")] * 2
    with pytest.raises(DatasetError, match=r"shows no tools; leave tools out; use rows of `chosen` and"):
        built(row)


def test_a_pair_that_is_too_long_is_cut_or_dropped_and_one_that_is_then_the_same_is_named() -> None:
    """Both of it where one answer is too long."""
    text = {"prompt": "0123456789", "chosen": "abc", "rejected": "abd" * 4}
    same = {"prompt": "0123456789", "chosen": "abcdefg", "rejected": "abcdefh"}
    late = {"prompt": "0" * 20, "chosen": "a", "rejected": "b"}
    weightless = {"prompt": PROMPT[1:], "chosen": [YES[0] | {"weight": 0}], "rejected": NO}
    cut = built(text, same, late, weightless, max_seq_len=15)
    assert [len(example.ids) for example in cut.examples] == [14, 15]
    assert cut.report.losses() == [
        "3 rows longer than max_seq_len=15 tokens: truncated",
        "3 rows without two answers to tell apart: lines 2, 3, 4",
    ]
    dropped = built(text, same | {"chosen": "x", "rejected": "y"}, max_seq_len=15, overlong="drop")
    assert [len(example.ids) for example in dropped.examples] == [12, 12]
    with pytest.raises(DatasetError, match="both answers of each pair are the same tokens, or one has weight 0"):
        built(weightless)


GOOD: dict[str, Row] = {
    "texts": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "messages": {"prompt": PROMPT, "chosen": YES, "rejected": NO},
    "OpenAI": {"input": {"messages": PROMPT}, "preferred_output": YES, "non_preferred_output": NO},
}
EMPTY = "empty; write the text, or leave the row out"
USER = [message("user", "Hm?")]
LAST = "the last message is of the user; end with the assistant's answer"


@pytest.mark.parametrize(
    ("kind", "bad", "expected"),
    [
        ("texts", {"prompt": "a", "chosen": "b"}, ["`rejected`: missing; add it"]),
        ("texts", {"prompt": 1, "chosen": " ", "rejected": None},
         ["`prompt`: a number; write a string", f"`chosen`: {EMPTY}", "`rejected`: null; write a string"]),
        ("texts", {"prompt": "a", "chosen": "b", "rejected": "b"},
         ["`rejected`: the same as `chosen`; write two answers that differ, or leave the row out"]),
        ("texts", {"prompt": PROMPT, "chosen": "b", "rejected": "c"},
         ["`prompt`: a list, and `chosen` is a string; make all strings or all lists of messages"]),
        ("messages", {"chosen": YES, "rejected": "c"},
         ["`rejected`: `chosen` is a list and `rejected` a string; make both strings or both lists of messages"]),
        ("messages", {"prompt": [], "chosen": [*YES, *USER], "rejected": [{"role": "bot", "content": " "}]},
         ["`prompt`: an empty list; write a list of messages with `role` and `content`",
          "`rejected[0].role`: `bot` is unknown; use system, user, assistant or tool"]),
        ("messages", {"prompt": PROMPT, "chosen": [*YES, *USER], "rejected": NO}, [f"`chosen`: {LAST}"]),
        ("messages", {"prompt": PROMPT, "chosen": YES, "rejected": USER},
         ["`rejected`: no message of the assistant; add the answer to learn"]),
        ("messages", {"chosen": [*PROMPT, *YES], "rejected": [*PROMPT, *YES, *USER, *NO]},
         ["`chosen`: all of it is the beginning of the other one; let the two differ in their answers"]),
        ("messages", {"chosen": YES, "rejected": [*PROMPT, *YES]},
         ["`chosen`: no message of the assistant that follows another one; add the answer to learn"]),
        ("OpenAI", {"input": PROMPT, "preferred_output": "a", "non_preferred_output": NO},
         ["`input`: a list; write an object with `messages`",
          "`preferred_output`: a string; write a list of messages with `role` and `content`"]),
        ("OpenAI", {"input": {"tools": {}, "messages": [{"role": "user"}]}, "preferred_output": YES,
         "non_preferred_output": [message("assistant", "")]},
         ["`input.messages[0].content`: missing; add a string", f"`non_preferred_output[0].content`: {EMPTY}"]),
        ("OpenAI", {"input": {"messages": PROMPT, "tools": "look"}, "preferred_output": YES,
         "non_preferred_output": [*NO, *USER]},
         ["`input.tools`: no list of objects; write OpenAI's tools, or leave them out"]),
        ("OpenAI", {"input": {"messages": PROMPT}, "preferred_output": YES, "non_preferred_output": YES},
         ["`non_preferred_output`: the same as `preferred_output`; write two answers that differ, or leave the row"
          " out"]),
        ("OpenAI", {"messages": [*PROMPT, *YES]},
         [f"`{column}`: missing: this row is messages, most are preferred_output (OpenAI), and a data set has one"
          " format" for column in ("input", "preferred_output", "non_preferred_output")]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_line_column_and_fix(
    kind: str, bad: Row, expected: list[str], tmp_path: Path
) -> None:
    """Also where a file is checked, and of most rows a short look shows that they are right."""
    rows = [(3, GOOD[kind]), (17, bad), (18, GOOD[kind])]
    with pytest.raises(DatasetError) as raised:
        check_rows(rows)
    assert raised.value.problems == tuple(f"line 17: column {text}" for text in expected)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (GOOD[kind], bad, GOOD[kind])))
    assert {problem.split(":")[0] for problem in check_file(path, "rows.jsonl").problems} == {"line 2"}
    path.write_text("\n".join(json.dumps(GOOD[kind]) for _ in range(3)))
    assert check_file(path, "rows.jsonl").format == format_of(GOOD[kind]) in PREFERENCES


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_method_says_which_columns_count(suffix: str, tmp_path: Path) -> None:
    """As in UltraFeedback, which has both; a file that has the other ones alone is told which method they are for."""

    def file(**columns: list[Any]) -> Path:
        path = tmp_path / f"rows.{suffix}"
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.table(columns), path)
        else:
            rows = zip(*columns.values(), strict=True)
            path.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))
        return path

    def of(path: Path, method: Any) -> tuple[Dataset, Dataset | None]:
        return build_datasets(path, 0.25, byte_tokenizer(), TrainConfig(method=method))

    conversations = [[*PROMPT, message("assistant", f"{number}")] for number in range(4)]
    both = {"messages": conversations, "prompt": ["Hi"] * 4, "chosen": conversations,
            "rejected": [[*PROMPT, *NO]] * 4}  # fmt: skip
    pairs, held_out = of(file(**both), "dpo")
    assert (pairs.report.format, pairs.report.examples, len(pairs.examples)) == ("chosen/rejected", 3, 6)
    assert held_out is not None and held_out.report.examples == 1
    assert of(file(**both), "supervised")[0].report.format == "messages"
    write_datasets((pairs, held_out), tmp_path / "encoded")
    assert read_datasets(tmp_path / "encoded")[0] == (pairs, held_out)
    other = (
        r"is what method supervised learns from; set train\.method to it, or use `chosen` and `rejected`, or `input`,"
    )
    with pytest.raises(DatasetError, match=f"column `messages`: messages {other}"):
        of(file(messages=conversations), "dpo")
    other = r"is what method dpo learns from; set train\.method to it, or use `messages`, or"
    with pytest.raises(DatasetError, match=f"column `chosen`, `rejected`: chosen/rejected {other}"):
        of(file(chosen=["a", "b"], rejected=["c", "d"]), "supervised")
