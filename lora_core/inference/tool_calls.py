"""Calls of tools in what a model says, as its chat template teaches it to write them.

    tagged    <tool_call> {"name": ..., "arguments": {...}} </tool_call>, any number, behind any text     Hermes, Qwen
    bare      {"name": ..., "parameters": {...}}, one or several, as the whole answer             Llama 3.1, Mistral

No torch: the gateway knows calls, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_CALL = re.compile(rf"\s*{OPEN}(.*?){CLOSE}\s*", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class CallFormat:
    """How calls are written: between tags or bare, with their arguments under `key`."""

    tagged: bool
    key: str

    @classmethod
    def of_template(cls, template: str) -> CallFormat:
        """Return what a chat template teaches."""
        tagged = OPEN in template
        return cls(tagged, "parameters" if not tagged and '"parameters"' in template else "arguments")


class ToolCallParser:
    """Parts one answer, as it comes, into text and calls of the tools `names`; what only looks like a call stays text.

    Held back are calls that are not whole, what a tag may begin with, and space that may stand before one: it is left
    out around calls. Where they are not `parallel`, the first is the only one.
    """

    def __init__(self, form: CallFormat, names: Sequence[str], *, parallel: bool) -> None:
        self._form, self._names, self._parallel = form, names, parallel
        self._pending = ""
        self._is_text = False  # of a bare answer: it is no call
        self._behind_call = self._has_called = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Return the text and the calls that are certain now."""
        self._pending += text
        if self._form.tagged:
            return self._tagged()
        self._is_text = self._is_text or self._pending.lstrip()[:1] not in ("", "{", "[")
        return self._released(len(self._pending) if self._is_text else 0), []

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Return the rest."""
        if not self._form.tagged and not self._is_text:
            calls = _calls(self._pending)
            if calls and all(call.name in self._names for call in calls):
                return "", self._accepted(calls)
        return self._released(len(self._pending)), []

    def _tagged(self) -> tuple[str, list[ToolCall]]:
        said, calls = "", list[ToolCall]()
        while whole := _CALL.search(self._pending):
            called = _calls(whole[1])
            said += self._released(whole.start() if called else whole.end())
            if called:
                self._pending, self._behind_call = self._pending[whole.end() :], True
                calls += self._accepted(called)
        before = self._pending.partition(OPEN)[0]
        if before == self._pending:
            before = before[: len(before) - overlap(before, OPEN)]
        return said + self._released(len(before.rstrip())), calls

    def _released(self, characters: int) -> str:
        text, self._pending = self._pending[:characters], self._pending[characters:]
        if self._behind_call:
            text = text.lstrip()
            self._behind_call = not text
        return text

    def _accepted(self, calls: Sequence[ToolCall]) -> list[ToolCall]:
        taken = list(calls if self._parallel else calls[: 0 if self._has_called else 1])
        self._has_called = True
        return taken


def _calls(text: str) -> list[ToolCall]:
    """Read text that is nothing but calls: objects side by side, or lists of them; none if a part is something else."""
    decoder, calls, rest = json.JSONDecoder(), list[ToolCall](), text.strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return []
        for one in value if isinstance(value, list) else [value]:
            if (call := _call(one)) is None:
                return []
            calls.append(call)
        rest = rest[end:].lstrip(" \n\t;,")
    return calls


def _call(value: Any) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `marker`, and not all of it."""
    return next(n for n in range(min(len(text), len(marker) - 1), -1, -1) if text.endswith(marker[:n]))
