"""What OpenAI's completions and models answer: the objects, whole or in chunks, and the names of models."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.registry import LATEST
from deploy.api.schemas import CompletionRequest
from deploy.serving.protocol import Completion, Delta, StreamStart


@dataclass(frozen=True)
class ModelName:
    """`<base>`, `<base>:<adapter>` or `<base>:<adapter>@<version>`."""

    base: str
    adapter: str | None
    version: str


def parse_model(model: str, bases: Sequence[str]) -> ModelName | None:
    """Part a model's name; None where the base is none of `bases`, or a part is empty."""
    base, colon, rest = model.partition(":")
    adapter, at, version = rest.partition("@")
    if base not in bases or (colon and not adapter) or (at and not version):
        return None
    return ModelName(base, adapter or None, version or LATEST)


def model_object(model: str, base: str, created: float, digest: str | None = None) -> dict[str, Any]:
    """Return OpenAI's Model; `root` is the base, as in vLLM, and `digest` that of the adapter's content."""
    fields = {"id": model, "object": "model", "created": int(created), "owned_by": "lora", "root": base}
    return fields if digest is None else {**fields, "digest": digest}


class CompletionResponse(ABC):
    """One completion. A subclass says what its choices look like, whole and in a chunk."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, request: CompletionRequest) -> None:
        self._include_usage = request.include_usage
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._start = StreamStart("", 0)

    def whole(self, answer: Completion) -> dict[str, Any]:
        """Return the answer at once."""
        self._start = answer.start
        choice = self.whole_choice(answer.text, answer.finish_reason)
        return self._document(self.whole_object, [choice], {"usage": self._usage(answer.completion_tokens)})

    def first_chunk(self, start: StreamStart) -> str:
        """Return what a stream begins with; to be called before `chunks`."""
        self._start = start
        return ""

    def chunks(self, delta: Delta) -> str:
        """Format one more piece of text; the last brings finish reason, usage and the end of the stream with it."""
        text = self._chunk(self.chunk_choice(delta.text, None)) if delta.text else ""
        if delta.finish_reason is None:
            return text
        text += self._chunk(self.chunk_choice("", delta.finish_reason))
        if self._include_usage:
            text += event(self._document(self.chunk_object, [], {"usage": self._usage(delta.completion_tokens)}))
        return text + "data: [DONE]\n\n"

    @abstractmethod
    def whole_choice(self, text: str, finish_reason: str) -> dict[str, Any]:
        """Return the one entry of `choices` in a whole answer."""

    @abstractmethod
    def chunk_choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        """Return the one entry of `choices` in a chunk of a stream."""

    def _chunk(self, choice: dict[str, Any]) -> str:
        usage: dict[str, Any] = {"usage": None} if self._include_usage else {}
        return event(self._document(self.chunk_object, [choice], usage))

    def _document(self, kind: str, choices: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": kind, "system_fingerprint": self._start.digest, "choices": choices, **more}

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        prompt_tokens = self._start.prompt_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }


class ChatResponse(CompletionResponse):
    """ChatCompletion and ChatCompletionChunk."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first_chunk(self, start: StreamStart) -> str:
        super().first_chunk(start)
        return self._chunk(_choice(None, delta={"role": "assistant", "content": ""}))

    def whole_choice(self, text: str, finish_reason: str) -> dict[str, Any]:
        return _choice(finish_reason, message={"role": "assistant", "content": text, "refusal": None})

    def chunk_choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return _choice(finish_reason, delta={"content": text} if text else {})


class TextResponse(CompletionResponse):
    """Completion, which is its own chunk."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def whole_choice(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return _choice(finish_reason, text=text)

    chunk_choice = whole_choice


def _choice(finish_reason: str | None, **content: Any) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def event(document: Mapping[str, Any]) -> str:
    """Format one server-sent event."""
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"
