"""One message of a chat, as rows of training and requests to the server give it: both refuse the same, and the chat
template is shown the same.

    role, content                  `content` is a text, or a list of parts of type text
    name, tool_call_id             shown to the template where they are there, and so are a model's thoughts
    tool_calls                     of an assistant in a request, not in training: shown with their arguments as objects
    weight                         0 or 1: whether training learns an answer; never shown

Null and what is empty count as not given: many templates ask whether a key is there. `developer` is OpenAI's name for
`system`, which is what open models know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lora_core.data.json_values import HALF_A_CHARACTER, encodable, shown, unusable, whole_number

ROLES = ("system", "user", "assistant", "tool")
SHOWN_TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")


def message_problems(message: Any, *, calls: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (key with a dot, what to change) of everything that is wrong with a message, which may have `calls`."""
    if not isinstance(message, dict):
        yield "", f"{kind(message)}; write an object with `role` and `content`"
        return
    given = _given(message)
    role = given.pop("role", None)
    if role not in (*ROLES, "developer"):
        found = "missing" if role is None else f"`{shown(str(role))}` is unknown"
        yield ".role", f"{found}; use {', '.join(ROLES[:-1])} or {ROLES[-1]}"
    called = given.pop("tool_calls", None) if calls and role == "assistant" else None
    if called is not None:
        yield from _call_problems(called)
    for key in CALLS:
        if given.pop(key, None) is not None:
            yield f".{key}", "calls are not supported; write the call into `content`"
    content = _joined(message.get("content"))
    if content is None:
        if called is None:
            yield ".content", "missing; add a string"
    elif problem := text_problem(content, "write a string, or parts of type text"):
        yield ".content", problem
    if given.pop("weight", None) not in (None, 0, 1):
        yield ".weight", "use 1 to learn this message, 0 to leave it as context"
    given.pop("content", None)
    for key, value in given.items() if role is not None else ():  # without one it is of another form as a whole
        if key not in SHOWN_TEXTS:
            yield f".{shown(str(key))}", "not supported; leave it out"
        elif problem := text_problem(value):
            yield f".{key}", problem


def for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the chat template is shown of a message that has no problems."""
    role = "system" if message["role"] == "developer" else message["role"]
    given = _given(message)
    texts = {key: given[key] for key in SHOWN_TEXTS if key in given}
    called = {"tool_calls": list(map(_shown_call, given["tool_calls"]))} if "tool_calls" in given else {}
    return {"role": role, "content": _joined(message.get("content")) or "", **texts, **called}


def _call_problems(calls: Any) -> Iterator[tuple[str, str]]:
    for index, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or text_problem(function.get("name")):
            yield (
                f".tool_calls.{index}",
                "no call; write an object with `id`, `type` and `function`, which has a `name`",
            )
        elif _arguments(function) is None:
            yield f".tool_calls.{index}.function.arguments", "no object in JSON; write one as a string"


def _shown_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": call["function"]["name"], "arguments": _arguments(call["function"])}
    return {"type": "function", **({"id": call["id"]} if "id" in call else {}), "function": function}


def _arguments(function: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a call's arguments, which OpenAI writes as a text of JSON."""
    arguments = function.get("arguments") or {}
    try:
        value = json.loads(arguments, parse_int=whole_number) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and not any(unusable(value)) else None


def text_problem(value: Any, advice: str = "write a string") -> str | None:
    """Say why this is no text that can be tokenised, if it is none."""
    if not isinstance(value, str):
        return f"{kind(value)}; {advice}"
    return None if encodable(value) else HALF_A_CHARACTER


def kind(value: Any) -> str:
    """Say what a value is, in the words of JSON."""
    if value is None:
        return "null"
    names = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _given(message: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value not in (None, "", [], {})}


def _joined(content: Any) -> Any:
    """Join a list of parts of type text to one text; return anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [text for text in parts if isinstance(text, str)]
    return "".join(texts) if len(texts) == len(content) else content
