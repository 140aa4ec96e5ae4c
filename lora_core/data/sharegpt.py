"""Turns of ShareGPT's form, as half of the public chats have them -> messages.

    {"from": "human", "value": "..."}      {"role": "user", "content": "..."}

The names of speakers are those of public files. Some have `role` and `content` in `conversations`: these are messages
as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_core.data.messages import CALLS, message_problems

SPEAKERS = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response"), "tool"),
}
USED_KEYS = {"from", "value", "weight"}


def conversation(turns: list[Any], system: str = "") -> list[Any]:
    """Return the messages of a conversation, a message of the system before them where there is one."""
    return ([{"role": "system", "content": system}] if system else []) + [as_message(turn) for turn in turns]


def as_message(turn: Any) -> Any:
    """Make a message of a turn; mistakes stay in it."""
    if not _is_turn(turn):
        return turn
    speaker = turn.get("from")
    role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    calls = {key: turn[key] for key in CALLS if key in turn}
    return {"role": role, "content": turn.get("value"), "weight": turn.get("weight"), **calls}


def turn_problems(turn: Any) -> Iterator[tuple[str, str]]:
    """Yield (key with a dot, what to change) of everything that is wrong with a turn."""
    names = {".role": ".from", ".content": ".value"} if _is_turn(turn) else {}
    if names and turn.get("from") in (*CALLS, "tool_call"):
        yield ".from", "calls are not supported; write the call into an answer, or leave the row out"
        return
    for key, advice in message_problems(as_message(turn)):
        yield names.get(key, key), advice


def unused_keys(turns: list[Any]) -> set[str]:
    """Return the keys that turns have besides."""
    return {key for turn in turns if _is_turn(turn) for key, value in turn.items() if value is not None} - USED_KEYS


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") is None
