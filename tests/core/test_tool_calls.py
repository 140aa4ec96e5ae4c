"""Calls in what a model says: found however the text is cut into pieces, and nothing else is taken for one."""

from __future__ import annotations

import random

import pytest

from lora_core.inference.tool_calls import CallFormat, ToolCall, ToolCallParser

TAGGED, BARE = CallFormat(True, "arguments"), CallFormat(False, "parameters")
PARIS = '{"name": "weather", "arguments": {"city": "Paris"}}'
ROME = '{"name": "weather", "parameters": {"city": "Rome"}}'
TO_PARIS, TO_ROME = ToolCall("weather", '{"city": "Paris"}'), ToolCall("weather", '{"city": "Rome"}')


def parsed(form: CallFormat, text: str, seed: int = 0, parallel: bool = True) -> tuple[str, list[ToolCall], list[str]]:
    """The text and the calls of an answer that comes in random pieces, and the text as it came."""
    parser, dice = ToolCallParser(form, ["weather"], parallel=parallel), random.Random(seed)
    pieces, calls = [], list[ToolCall]()
    while text:
        size = dice.choice([1, 1, 2, 5, 30])
        said, called = parser.push(text[:size])
        text = text[size:]
        pieces.append(said)
        calls += called
    said, called = parser.finish()
    return "".join([*pieces, said]), calls + called, pieces


@pytest.mark.parametrize(
    ("form", "answer", "text", "calls"),
    [
        (TAGGED, f"<tool_call>\n{PARIS}\n</tool_call>", "", [TO_PARIS]),
        (TAGGED, f"Let me see.\n\n<tool_call>{PARIS}</tool_call>\n<tool_call>{PARIS}</tool_call>\n", "Let me see.",
         [TO_PARIS, TO_PARIS]),
        (TAGGED, f"a <tool_call>{PARIS}</tool_call> b  c", "ab  c", [TO_PARIS]),
        (TAGGED, " 1 <2 <tool 3 \n", " 1 <2 <tool 3 \n", []),
        (TAGGED, "<tool_call>\nnot JSON</tool_call> end", "<tool_call>\nnot JSON</tool_call> end", []),
        (TAGGED, f"cut <tool_call>{PARIS}", f"cut <tool_call>{PARIS}", []),
        (TAGGED, "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
        (TAGGED, "", "", []),
        (BARE, ROME, "", [TO_ROME]),
        (BARE, f"\n{ROME}; {ROME}", "", [TO_ROME, TO_ROME]),
        (BARE, f" [{PARIS}, {ROME}]", "", [TO_PARIS, TO_ROME]),
        (BARE, f"I say {ROME}", f"I say {ROME}", []),
        (BARE, f"{ROME} and more", f"{ROME} and more", []),
        (BARE, '{"name": "another", "parameters": {}}', '{"name": "another", "parameters": {}}', []),
        (BARE, '{"answer": 3}', '{"answer": 3}', []),
        (BARE, '{"name": "weather", "parameters": 3}', '{"name": "weather", "parameters": 3}', []),
        (BARE, "[" * 5000, "[" * 5000, []),
    ],
)  # fmt: skip
def test_text_and_calls_are_parted(form: CallFormat, answer: str, text: str, calls: list[ToolCall]) -> None:
    for seed in range(8):
        assert parsed(form, answer, seed)[:2] == (text, calls)


def test_text_comes_as_soon_as_it_is_certain() -> None:
    parser = ToolCallParser(TAGGED, [], parallel=True)
    pushed = [parser.push(piece)[0] for piece in ("Hello", " wor", "ld <", "3", " <tool_ca", "nnot")]
    assert pushed == ["Hello", " wor", "ld", " <3", "", " <tool_cannot"]
    parser = ToolCallParser(BARE, [], parallel=True)
    assert [parser.push(piece)[0] for piece in (" ", "Yes", ", {")] == ["", " Yes", ", {"]


def test_where_calls_are_not_parallel_the_first_is_the_only_one() -> None:
    twice = f"<tool_call>{PARIS}</tool_call>" * 2
    assert parsed(TAGGED, twice, parallel=False)[:2] == ("", [TO_PARIS])
    assert parsed(BARE, f"{ROME};{ROME}", parallel=False)[:2] == ("", [TO_ROME])


def test_the_template_says_how_calls_are_written() -> None:
    assert CallFormat.of_template('<tool_call>\n{"name": <function-name>, "arguments": ...}') == TAGGED
    assert CallFormat.of_template('{"name": function name, "parameters": dictionary}') == BARE
    assert CallFormat.of_template('{"name": ..., "arguments": ...}') == CallFormat(False, "arguments")
