"""What the gateway asks of an adapter server, and what comes back. Plain values that pickle; no torch.

A refusal is a value too, not an exception: Serve logs every exception that leaves a replica with its stack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lora_core.inference.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What one base is asked to generate. `adapter` None is the base itself; `version` is the id of one or `latest`.

    `prompt` is text that the answer continues, or the messages of a chat, which go through the base's template.
    """

    prompt: str | tuple[dict[str, Any], ...]
    adapter: str | None
    version: str
    max_tokens: int | None
    sampling: SamplingParams
    stop: tuple[str, ...]


@dataclass(frozen=True)
class StreamStart:
    """The request is taken. `digest` is that of the adapter's content, or the base's fingerprint."""

    digest: str
    prompt_tokens: int


@dataclass(frozen=True)
class Delta:
    """More text. The last delta has a finish reason; `completion_tokens` counts from the beginning."""

    text: str
    finish_reason: FinishReason | None
    completion_tokens: int


@dataclass(frozen=True)
class ErrorResponse:
    """The request cannot be answered: HTTP status, what to change, and OpenAI's `code` and `param`."""

    status: int
    message: str
    code: str
    param: str | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer, for those who do not stream."""

    start: StreamStart
    text: str
    finish_reason: FinishReason
    completion_tokens: int
