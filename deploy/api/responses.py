"""What OpenAI's completions and models answer: the objects, whole or in chunks, and the names of models."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from cluster.registry import LATEST
from deploy.api.schemas import CompletionRequest
from deploy.serving.protocol import Completion, Delta, StreamStart, TokenLogprob
from lora_core.inference.tool_calls import ToolCall

_LEAST_LOGPROB = -9999.0
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


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


class Lineage(TypedDict, total=False):
    """What an adapter's manifest says of where it comes from."""

    job: Any
    dataset_sha256: Any
    base_fingerprint: Any
    metrics: Any
    imported_from: Any


class Model(Lineage):
    """OpenAI's Model. `root` is the base, as in vLLM; an adapter has the digest of its content and its version's number
    too, and its other aliases: of one version, those that mean it.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    digest: NotRequired[str]
    version: NotRequired[int | None]
    aliases: NotRequired[list[str] | dict[str, int | str]]


def model_object(model: str, base: str, created: float, digest: str | None = None) -> Model:
    fields: Model = {"id": model, "object": "model", "created": int(created), "owned_by": "lora", "root": base}
    return fields if digest is None else {**fields, "digest": digest}


class CompletionResponse(ABC):
    """One completion of one or several choices. A subclass says what these look like, whole and in a chunk."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, request: CompletionRequest) -> None:
        self._include_usage, self._scored = request.include_usage, request.wants_logprobs
        self._choices = request.n or 1
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._start = StreamStart("", 0)
        self._ended: list[Delta] = []

    def whole(self, answer: Completion) -> dict[str, Any]:
        """Return the answer at once."""
        self._start = answer.start
        choices = [self._choice(delta, self.finish_reason(delta), self.whole_choice(delta)) for delta in answer.choices]
        return self._document(self.whole_object, choices, {"usage": self._usage(answer.choices)})

    def first_chunk(self, start: StreamStart) -> str:
        """Return what a stream begins with; to be called before `chunks`."""
        self._start = start
        return ""

    def chunks(self, delta: Delta) -> str:
        """Format more of a choice; its last brings the finish reason with it, and the last of all usage and the end of
        the stream.
        """
        text = ""
        if delta.text or delta.logprobs or delta.tool_calls:
            text = self._chunk(self._choice(delta, None, self.chunk_choice(delta)))
        if delta.finish_reason is None:
            return text
        end = Delta("", delta.finish_reason, delta.completion_tokens, delta.index)
        text += self._chunk(self._choice(end, self.finish_reason(end), self.chunk_choice(end)))
        self._ended.append(end)
        if len(self._ended) < self._choices:
            return text
        if self._include_usage:
            text += event(self._document(self.chunk_object, [], {"usage": self._usage(self._ended)}))
        return text + "data: [DONE]\n\n"

    @abstractmethod
    def whole_choice(self, delta: Delta) -> dict[str, Any]:
        """Return what a whole choice says."""

    @abstractmethod
    def chunk_choice(self, delta: Delta) -> dict[str, Any]:
        """Return what a chunk of a stream says of its one choice."""

    def finish_reason(self, delta: Delta) -> str | None:
        """Return why a choice ended, by its last delta."""
        return delta.finish_reason

    @abstractmethod
    def logprobs(self, delta: Delta) -> dict[str, Any]:
        """Return the log-probabilities of a choice, or of a piece of it."""

    def _choice(self, delta: Delta, finish_reason: str | None, content: dict[str, Any]) -> dict[str, Any]:
        logprobs = self.logprobs(delta) if self._scored and delta.logprobs else None
        return {"index": delta.index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _chunk(self, choice: dict[str, Any]) -> str:
        usage: dict[str, Any] = {"usage": None} if self._include_usage else {}
        return event(self._document(self.chunk_object, [choice], usage))

    def _document(self, kind: str, choices: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": kind, "system_fingerprint": self._start.digest, "choices": choices, **more}

    def _usage(self, choices: Sequence[Delta]) -> dict[str, int]:
        prompt_tokens, completion_tokens = self._start.prompt_tokens, sum(last.completion_tokens for last in choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }


class ChatResponse(CompletionResponse):
    """ChatCompletion and ChatCompletionChunk."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, request: CompletionRequest) -> None:
        super().__init__(request)
        self._calls = [0] * self._choices  # of each choice so far

    def first_chunk(self, start: StreamStart) -> str:
        super().first_chunk(start)
        begin = {"delta": {"role": "assistant", "content": ""}}
        return "".join(self._chunk(self._choice(Delta("", None, 0, i), None, begin)) for i in range(self._choices))

    def whole_choice(self, delta: Delta) -> dict[str, Any]:
        calls = {"tool_calls": list(map(_call, delta.tool_calls))} if delta.tool_calls else {}
        content = delta.text or None if calls else delta.text
        return {"message": {"role": "assistant", "content": content, "refusal": None, **calls}}

    def chunk_choice(self, delta: Delta) -> dict[str, Any]:
        """A call is whole in its chunk."""
        said: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if delta.tool_calls:
            first = self._calls[delta.index]
            said["tool_calls"] = [{"index": i, **_call(call)} for i, call in enumerate(delta.tool_calls, first)]
            self._calls[delta.index] += len(delta.tool_calls)
        return {"delta": said}

    def finish_reason(self, delta: Delta) -> str | None:
        called = delta.tool_calls or self._calls[delta.index]
        return "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason

    def logprobs(self, delta: Delta) -> dict[str, Any]:
        """An end token is among them, as it is among the completion's tokens."""
        content = [{**_scored(one), "top_logprobs": list(map(_scored, one.top))} for one in delta.logprobs]
        return {"content": content, "refusal": None}


class TextResponse(CompletionResponse):
    """Completion, which is its own chunk."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, request: CompletionRequest) -> None:
        super().__init__(request)
        self._offsets = [0] * self._choices  # of the next token in the text of each choice

    def whole_choice(self, delta: Delta) -> dict[str, Any]:
        return {"text": delta.text}

    chunk_choice = whole_choice

    def logprobs(self, delta: Delta) -> dict[str, Any]:
        """The likeliest of each place as one object by their texts, the token itself among them."""
        texts, first = [token.text for token in delta.logprobs], self._offsets[delta.index]
        *offsets, self._offsets[delta.index] = accumulate(map(len, texts), initial=first)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in delta.logprobs],
            "top_logprobs": [
                None if token.logprob is None else {one.text: _finite(one.logprob) for one in (*token.top, token)}
                for token in delta.logprobs
            ],
            "text_offset": offsets,
        }


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _scored(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "bytes": list(token.data), "logprob": _finite(token.logprob)}


def _finite(logprob: float | None) -> float | None:
    """Of what is impossible, and of the numbers of a broken adapter, OpenAI's least."""
    return logprob if logprob is None or logprob >= _LEAST_LOGPROB else _LEAST_LOGPROB


def event(document: Mapping[str, Any]) -> str:
    """Format one server-sent event."""
    return f"data: {_encode(document)}\n\n"
