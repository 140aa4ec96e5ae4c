"""A client of `POST /v1/completions` that costs little itself: streams over kept connections, parsed as they come."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """When an answer was asked for, and when its pieces came: (seconds, tokens of it), by `time.perf_counter`."""

    began: float = field(default_factory=time.perf_counter)
    pieces: list[tuple[float, int]] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.pieces[0][0] - self.began


class Connection:
    """One connection, which is kept from request to request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def answer(self, model: str, prompt: Sequence[int], tokens: int) -> Answer:
        """Ask for so many greedy tokens, each of which is a word (`word_tokenizer`), and take them as they come.

        Raises:
            RuntimeError: the answer is another.
        """
        answer = Answer()
        asked = {"model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "stream": True}
        async for event in self._events(asked):
            if words := len(event["choices"][0]["text"].split()):
                answer.pieces.append((time.perf_counter(), words))
        if (got := sum(words for _, words in answer.pieces)) != tokens:
            raise RuntimeError(f"{model} answered with {got} tokens instead of {tokens}")
        return answer

    def close(self) -> None:
        self._writer.close()

    async def _events(self, asked: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        body = json.dumps(asked).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        self._writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        if " 200 " not in head.splitlines()[0]:
            raise RuntimeError(head + (await self._reader.read(2000)).decode())
        while size := int(await self._reader.readline(), 16):
            for event in (await self._reader.readexactly(size + 2)).decode().split("\n\n")[:-1]:
                if event != "data: [DONE]":
                    yield json.loads(event.removeprefix("data: "))
        await self._reader.readline()
