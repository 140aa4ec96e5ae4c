"""Rows of preferences: an answer that is preferred to another one, behind the same prompt.

    prompt, chosen, rejected                          TRL's: strings, or lists of messages
    chosen, rejected                                  the same with the prompt in both: it is what both begin with
    input, preferred_output, non_preferred_output     OpenAI's: the prompt is `messages` in `input`, with `tools` where
                                                      the model may call some

A `prompt` that is a string beside lists of messages repeats what is in these, as in UltraFeedback. For training each
row is two of `prompt` and `completion`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from lora_core.data.messages import kind
from lora_core.data.row_problems import conversation_problems, text_problems

SIDES = ("chosen", "rejected")
OPENAI_SIDES = ("preferred_output", "non_preferred_output")


def completions(row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make rows of prompt and completion, first that of the preferred answer, of a row that has no problems."""
    prompt, *answers = _parts(row)
    preferred, other = ({"prompt": prompt, "completion": answer} for answer in answers)
    return preferred, other


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the model may call."""
    return (row["input"].get("tools") if _is_openais(row) else None) or []


def unused_input_keys(row: dict[str, Any]) -> set[str]:
    """Return what OpenAI's `input` has besides."""
    return {key for key, value in row["input"].items() if value is not None} - {"messages", "tools"}


def preference_problems(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (column, what to change) of everything that is wrong with a row of either form, which has its columns."""
    preferred, other = OPENAI_SIDES if _is_openais(row) else SIDES
    wrong = list(_openai_problems(row) if _is_openais(row) else _problems(row))
    if not wrong and isinstance(row[preferred], list):
        for side in (preferred, other):
            if (role := row[side][-1]["role"]) != "assistant":
                wrong.append((f"`{side}`", f"the last message is of the {role}; end with the assistant's answer"))
    yield from wrong
    if wrong:
        return
    if row[preferred] == row[other]:
        yield f"`{other}`", f"the same as `{preferred}`; write two answers that differ, or leave the row out"
        return
    _, *answers = _parts(row)
    for side, answer in zip((preferred, other), answers, strict=True):
        if not answer:
            yield f"`{side}`", "all of it is the beginning of the other one; let the two differ in their answers"


def are_plainly_right(row: dict[str, Any]) -> bool:
    """Return whether a row, whose texts are of whole characters, has no mistake, where a short look shows that."""
    if not _is_openais(row):
        texts = row.get("prompt"), row["chosen"], row["rejected"]
        are_texts = type(texts[0]) is str and all(type(text) is str and text.strip() for text in texts[1:])
        return are_texts and texts[1] != texts[2]
    given, sides = row["input"], [row[side] for side in OPENAI_SIDES]
    return (
        type(given) is dict
        and given.keys() == {"messages"}
        and all(_are_plain(messages) for messages in (given["messages"], *sides))
        and all(messages[-1]["role"] == "assistant" for messages in sides)
        and sides[0] != sides[1]
    )


def _are_plain(messages: Any) -> bool:
    return (
        type(messages) is list
        and len(messages) > 0
        and all(
            type(one) is dict
            and len(one) == 2
            and one.get("role") in ("system", "user", "assistant")
            and type(one.get("content")) is str
            and one["content"].strip()
            for one in messages
        )
    )


def _is_openais(row: dict[str, Any]) -> bool:
    return "chosen" not in row or "rejected" not in row


def _parts(row: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return the prompt, the preferred answer and the other one."""
    if _is_openais(row):
        return (row["input"]["messages"], *(row[side] for side in OPENAI_SIDES))
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is not None and isinstance(prompt, list) == isinstance(chosen, list):
        return prompt, chosen, rejected
    end = _shared(chosen, rejected)
    if isinstance(chosen, str):  # before the last space, as there a word begins, and a token
        space = re.search(r"\s\S*\Z", chosen[:end])
        end = space.start() if space else 0
    return chosen[:end], chosen[end:], rejected[end:]


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how much of both is the same from the beginning."""
    differing = (at for at, (mine, its) in enumerate(zip(one, other, strict=False)) if mine != its)
    return next(differing, min(len(one), len(other)))


def _problems(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    prompt, chosen, rejected = row.get("prompt", ""), row["chosen"], row["rejected"]
    if isinstance(chosen, list) != isinstance(rejected, list):
        kinds = f"`chosen` is {kind(chosen)} and `rejected` {kind(rejected)}"
        yield "`rejected`", f"{kinds}; make both strings or both lists of messages"
    elif isinstance(chosen, list):
        if isinstance(prompt, list):
            yield from conversation_problems("prompt", prompt, answer_from=None)
        else:
            yield from text_problems("prompt", prompt, may_be_empty=True)
        for side in SIDES:
            yield from conversation_problems(side, row[side], answer_from=0 if isinstance(prompt, list) else 1)
    elif isinstance(prompt, list):
        yield "`prompt`", f"a list, and `chosen` is {kind(chosen)}; make all strings or all lists of messages"
    else:
        yield from text_problems("prompt", prompt, may_be_empty=True)
        for side in SIDES:
            yield from text_problems(side, row[side])


def _openai_problems(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    given = row["input"]
    if not isinstance(given, dict):
        yield "`input`", f"{kind(given)}; write an object with `messages`"
    else:
        yield from conversation_problems("input.messages", given.get("messages"), answer_from=None)
        tools = given.get("tools") or []
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            yield "`input.tools`", "no list of objects; write OpenAI's tools, or leave them out"
    for side in OPENAI_SIDES:
        yield from conversation_problems(side, row[side], answer_from=0)
