"""What the gateway asks of an adapter server, and what comes back. Plain values that pickle; no torch.

A refusal is a value too, not an exception: Serve logs every exception that leaves a replica with its stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lora_core.inference.sampling_params import SamplingParams
from lora_core.inference.tool_calls import ToolCall

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenIds:
    """A prompt that its client has made tokens of."""

    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What one base is asked to generate. `adapter` None is the base itself; else `digest` is the content that it is
    answered with, which the adapter's name meant when the request came, and `tenant` whose adapter it is.

    `prompt` is what the answer continues, as text or as tokens, or the messages of a chat, which go through the base's
    template. There are `n` answers. `logprobs` asks for log-probabilities of their tokens, and of so many of the
    likeliest beside each. `echo` puts the prompt before the answers, with its log-probabilities where they are asked
    for. The answers are JSON that `json_schema` describes, where it is given. The model may call `tools` (as OpenAI has
    them), several of them where they are `parallel`, and calls one of `forced_tools` where there are some.
    `traceparent` is the trace that it is a part of.
    """

    prompt: str | TokenIds | tuple[dict[str, Any], ...]
    adapter: str | None
    digest: str | None
    tenant: str = "default"
    max_tokens: int | None
    sampling: SamplingParams
    stop: tuple[str, ...]
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
    json_schema: Mapping[str, Any] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    forced_tools: tuple[str, ...] = ()
    parallel_tool_calls: bool = True
    traceparent: str | None = None


@dataclass(frozen=True)
class ReplicaLoad:
    """What a replica holds and does. `running` and `waiting` are requests, of which it answers `slots` at a time.
    Adapters take `adapter_bytes` of `adapter_capacity`; one of rank 16 on every linear takes `slot_bytes`.
    """

    place: str
    precision: str
    base_bytes: int
    running: int
    waiting: int
    slots: int
    adapters: int
    adapter_bytes: int
    adapter_capacity: int
    slot_bytes: int
    tokens_per_second: float


@dataclass(frozen=True)
class StreamStart:
    """The request is taken. `digest` is that of the adapter's content, or the base's fingerprint."""

    digest: str
    prompt_tokens: int


@dataclass(frozen=True)
class TokenLogprob:
    """ln p of a token by the model's own distribution, and the `top` likeliest in its place; None of a prompt's first.

    `data` are the bytes that it stands for, which may be a part of a character that `text` shows as U+FFFD.
    """

    text: str
    data: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Delta:
    """More of the choice `index`. Its last delta has a finish reason; `completion_tokens` counts from its beginning."""

    text: str
    finish_reason: FinishReason | None
    completion_tokens: int
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class ErrorResponse:
    """The request cannot be answered: HTTP status, what to change, and OpenAI's `code` and `param`."""

    status: int
    message: str
    code: str
    param: str | None = None


@dataclass(frozen=True)
class Completion:
    """Whole answers, for those who do not stream: each choice as the one delta that its deltas join to."""

    start: StreamStart
    choices: tuple[Delta, ...]
