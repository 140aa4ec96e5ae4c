"""Rows for data set tests, with line numbers as a file would give them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from lora_core.data.dataset import DatasetError, check_rows


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*contents: str) -> dict[str, Any]:
    """User and assistant in turn."""
    return {"messages": [message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]}


def clock_says(monkeypatch: pytest.MonkeyPatch, *days: str) -> None:
    """What chat templates are told of today, each time that they ask; the last one from then on."""
    times = itertools.chain(days, itertools.repeat(days[-1]))

    class Clock:
        @staticmethod
        def now() -> Clock:
            return Clock()

        def strftime(self, _: str) -> str:
            return next(times)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


def numbered(*rows: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return list(enumerate(rows, start=1))


def problems(rows: Sequence[tuple[int, dict[str, Any]]]) -> tuple[str, ...]:
    with pytest.raises(DatasetError) as raised:
        check_rows(rows)
    return raised.value.problems
