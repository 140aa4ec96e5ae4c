"""What a whole completion looks like, for the OpenAPI document: `responses.py` writes it, as chunks too."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Usage(_Exact):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Likely(_Exact):
    token: str
    bytes: list[int]
    logprob: float | None


class Scored(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(_Exact):
    content: list[Scored]
    refusal: None


class CalledFunction(_Exact):
    name: str
    arguments: str


class Call(_Exact):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Answer(_Exact):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: Annotated[list[Call], Field(min_length=1)] = []


class ChatChoice(_Exact):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class TextLogprobs(_Exact):
    """`top_logprobs` has an object of texts and log-probabilities for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[int]


class TextChoice(_Exact):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class _Completion(_Exact):
    """`system_fingerprint` is the digest of the adapter that answered, or the base's."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatCompletion(_Completion):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(_Completion):
    object: Literal["text_completion"]
    choices: list[TextChoice]
