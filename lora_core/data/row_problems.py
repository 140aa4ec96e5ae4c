"""What is wrong with a text, or with a list of messages, in a column of a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_core.data.messages import for_template, kind, message_problems, text_problem
from lora_core.data.sharegpt import conversation, turn_problems

EMPTY = "empty; write the text, or leave the row out"


def conversation_problems(column: str, messages: Any, *, answer_from: int | None) -> Iterator[tuple[str, str]]:
    """Yield (column, what to change) of everything that is wrong with a list of messages; from index `answer_from` on
    an assistant's message is an answer (None: none needed).
    """
    of_sharegpt = column == "conversations"
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else kind(messages)
        keys = "`from` and `value`" if of_sharegpt else "`role` and `content`"
        yield f"`{column}`", f"{found}; write a list of messages with {keys}"
        return
    check = turn_problems if of_sharegpt else message_problems
    wrong = [
        (f"`{column}[{index}]{key}`", advice)
        for index, message in enumerate(messages)
        for key, advice in check(message)
    ]
    yield from wrong
    if answer_from is None or wrong:
        return
    content = ["value" if "value" in message else "content" for message in messages]
    messages = conversation(messages) if of_sharegpt else messages
    answers = [index for index in range(answer_from, len(messages)) if messages[index]["role"] == "assistant"]
    if not answers:
        after = " that follows another one" if answer_from else ""
        yield f"`{column}`", f"no message of the assistant{after}; add the answer to learn"
    for index in answers:
        if messages[index].get("weight") != 0 and not for_template(messages[index])["content"].strip():
            yield f"`{column}[{index}].{content[index]}`", EMPTY


def text_problems(column: str, value: Any, *, may_be_empty: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (column, what to change) of what is wrong with a text."""
    if problem := text_problem(value):
        yield f"`{column}`", problem
    elif not may_be_empty and not value.strip():
        yield f"`{column}`", EMPTY
