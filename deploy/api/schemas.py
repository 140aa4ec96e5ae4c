"""What clients of OpenAI's completions send: supported parameters, and every mistake in a request at once."""

from __future__ import annotations

import asyncio
import difflib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import ErrorDetails

from cluster.requirements import requirement
from deploy.api.errors import ApiError
from deploy.serving.protocol import GenerateRequest, TokenIds
from lora_core.data.json_values import parser_of_integers, shown, unusable
from lora_core.data.messages import ROLES, for_template, message_problems
from lora_core.inference.sampling_params import SamplingParams

# Parameters that would change the answer and are not implemented, with the values at which they change nothing.
_NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_NEUTRAL_TEXT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
}
# Parameters that change nothing about the answer.
_HARMLESS = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)

_SAID = 30  # problems of a request that are told
_SMALL_BYTES = 64 * 2**10  # that are checked in some milliseconds
_MOST_MESSAGES = 10_000  # else there may be a mistake in each of a million

MOST_LOGPROBS = 20
"""Of the likeliest tokens that are shown beside each: OpenAI's limit for chats."""

Message = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "required": ["role"],
            "properties": {
                "role": {"enum": [*ROLES, "developer"]},
                "content": {
                    "description": "a text, or parts of the type text; missing only beside tool_calls",
                    "type": ["string", "array", "null"],
                    "items": {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}},
                },
                "name": {"type": ["string", "null"]},
                "tool_call_id": {"type": ["string", "null"]},
                "tool_calls": {"type": ["array", "null"], "items": {"type": "object"}},
            },
        }
    ),
]
"""Judged by `message_problems`."""

TokenId = Annotated[str, Field(pattern=r"^\d{1,9}$")]

Problem = tuple[str, str, str]
"""parameter, OpenAI's code, one sentence"""


class _Strict(BaseModel):
    """No conversions ("1" is no number); what a model does not name is judged by `_unsupported`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


def _closed(schema: dict[str, Any], kind: type[CompletionRequest]) -> None:
    """Complete the schema of a request with what `_unsupported` lets pass."""
    neutral = {name: {"enum": [*values, None]} for name, values in kind.neutral.items()}
    schema["properties"] |= neutral | {name: {} for name in _HARMLESS}
    schema["additionalProperties"] = False


def _or_else(value: Any, validate: ValidatorFunctionWrapHandler, sentence: str) -> Any:
    """Validate what may be of several kinds; one sentence says so where it is of none."""
    try:
        return validate(value)
    except ValidationError as error:
        raise ValueError(sentence) from error


class StreamOptions(_Strict):
    include_usage: bool = False


class JsonSchema(_Strict):
    """What OpenAI's `json_schema` says; the name is the client's own."""

    document: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_of_answers(self) -> dict[str, Any] | None:
        """Return what answers must be, in JSON Schema."""
        if self.type == "json_schema" and self.json_schema is not None:
            return self.json_schema.document
        return {"type": "object"} if self.type == "json_object" else None


class Function(_Strict):
    """What a model is shown of a function, in this order."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function

    def shown(self) -> dict[str, Any]:
        """Return what the chat template is shown."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class NamedFunction(_Strict):
    name: str


class NamedTool(_Strict):
    type: Literal["function"]
    function: NamedFunction


class CompletionRequest(_Strict):
    """What both kinds of completion share. Null counts as not given; the defaults are OpenAI's. `top_k`, `min_p` and
    `repetition_penalty` are vLLM's.
    """

    model_config = ConfigDict(json_schema_extra=_closed)

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model: str
    n: int | None = Field(default=None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=300)
    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, max_length=16)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    response_format: ResponseFormat | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def contradictions(self) -> list[Problem]:
        """Name parameters that do not go together."""
        problems = []
        if self.stream_options is not None and not self.stream:
            sentence = "stream_options is only allowed when stream is true"
            problems.append(("stream_options", "invalid_value", sentence))
        wanted = self.response_format
        if wanted is not None and wanted.type == "json_schema" and wanted.json_schema is None:
            name = "response_format.json_schema"
            problems.append((name, "missing_parameter", f"{name} is missing"))
        return problems

    def generate_request(self, adapter: str | None, digest: str | None) -> GenerateRequest:
        """Return what an adapter server is asked, of the content of this digest where it is of an adapter."""
        return GenerateRequest(
            prompt=self._prompt(),
            adapter=adapter,
            digest=digest,
            max_tokens=self._max_tokens(),
            sampling=self._sampling(),
            stop=tuple(self.stop or ()),
            n=self.n or 1,
            logprobs=self._logprobs(),
            echo=self.echoes,
            json_schema=self._json_schema(),
        )

    def _sampling(self) -> SamplingParams:
        given = self.model_dump(include={field.name for field in fields(SamplingParams)}, exclude_none=True)
        bias = {int(token): value for token, value in given.pop("logit_bias", {}).items()}
        return SamplingParams(**given, logit_bias=bias)

    @abstractmethod
    def _prompt(self) -> str | TokenIds | tuple[dict[str, Any], ...]:
        """Return plain text or its tokens, or the messages of a conversation."""

    @abstractmethod
    def _logprobs(self) -> int | None:
        """Return how many of the likeliest tokens go beside each, where log-probabilities are asked for."""

    def _max_tokens(self) -> int | None:
        return self.max_tokens

    def _json_schema(self) -> dict[str, Any] | None:
        return self.response_format.schema_of_answers() if self.response_format is not None else None

    @property
    def echoes(self) -> bool:
        return False

    @property
    def wants_logprobs(self) -> bool:
        return self._logprobs() is not None


class TextRequest(CompletionRequest):
    """`POST /v1/completions`: how an adapter is asked that was trained on plain prompts and completions.

    `echo` with `logprobs` scores the prompt; with `max_tokens` 0 nothing else is done.
    """

    neutral = _NEUTRAL_TEXT

    prompt: str | Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _text_or_tokens(cls, prompt: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        return _or_else(prompt, validate, "must be text, or a list of the ids of tokens")

    def contradictions(self) -> list[Problem]:
        problems = super().contradictions()
        if self.max_tokens == 0 and not self.echo:
            sentence = "max_tokens must be at least 1, or echo must be true: there would be no answer"
            problems.append(("max_tokens", "invalid_value", sentence))
        return problems

    @property
    def echoes(self) -> bool:
        return bool(self.echo)

    def _prompt(self) -> str | TokenIds:
        return self.prompt if isinstance(self.prompt, str) else TokenIds(tuple(self.prompt))

    def _max_tokens(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    def _logprobs(self) -> int | None:
        return self.logprobs


class ChatRequest(CompletionRequest):
    """`POST /v1/chat/completions`. Its messages are judged as those of training are (`lora_core/data/messages.py`)."""

    neutral = _NEUTRAL_CHAT

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("tool_choice", mode="wrap")
    @classmethod
    def _one_of_three_or_a_name(cls, choice: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        named = '{"type": "function", "function": {"name": ...}}'
        return _or_else(choice, validate, f"must be none, auto, required or {named}")

    def contradictions(self) -> list[Problem]:
        problems = super().contradictions()
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            sentence = "max_tokens and max_completion_tokens differ; give one of them"
            problems.append(("max_tokens", "invalid_value", sentence))
        if self.top_logprobs and not self.logprobs:
            problems.append(("top_logprobs", "invalid_value", "top_logprobs is only allowed when logprobs is true"))
        names = [tool.function.name for tool in self.tools or ()]
        if forced := [name for name in self._forced_tools(names) if name not in names]:
            sentence = f"tool_choice names {shown(forced[0])}, which is none of tools"
            problems.append(("tool_choice", "invalid_value", sentence))
        if self.tool_choice == "required" and not names:
            problems.append(("tool_choice", "invalid_value", "tool_choice is required, and there are no tools"))
        if names and self._json_schema() is not None and self.tool_choice != "none":
            sentence = "response_format and tools do not go together; give one of them, or tool_choice none"
            problems.append(("response_format", "invalid_value", sentence))
        return problems

    def generate_request(self, adapter: str | None, digest: str | None) -> GenerateRequest:
        asked = super().generate_request(adapter, digest)
        if not self.tools or self.tool_choice == "none":  # then the model is not told of them
            return asked
        return replace(
            asked,
            tools=tuple(tool.shown() for tool in self.tools),
            forced_tools=self._forced_tools([tool.function.name for tool in self.tools]),
            parallel_tool_calls=self.parallel_tool_calls is not False,
        )

    def _forced_tools(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return one of what a model has to call, of tools of these names."""
        if isinstance(self.tool_choice, NamedTool):
            return (self.tool_choice.function.name,)
        return tuple(names) if self.tool_choice == "required" else ()

    def _prompt(self) -> tuple[dict[str, Any], ...]:
        return tuple(for_template(message) for message in self.messages)

    def _max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def _logprobs(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


R = TypeVar("R", bound=CompletionRequest)


async def read_request(body: bytes, kind: type[R]) -> R:
    """Parse a request; a large one in a thread, so that nobody else's answer waits for it. Raises ApiError (400)."""
    if len(body) <= _SMALL_BYTES:
        return parse_request(body, kind)
    return await asyncio.to_thread(parse_request, body, kind)


def parse_request(body: bytes, kind: type[R]) -> R:
    """Check a request. Raises ApiError (400) with everything that is wrong; its `param` is the first of it."""
    document = read_document(body)
    request: R | None = None
    problems: list[Problem] = []
    try:
        request = kind.model_validate(document)
    except ValidationError as error:
        problems += map(_invalid, error.errors())
    problems += _unsupported(document, kind)
    if request is not None:
        problems += request.contradictions()
    if problems or request is None:
        raise refused(problems)
    return request


def read_document(body: bytes) -> dict[str, Any]:
    """Return the values of a request; raises ApiError also for those that JSON can spell and nothing can use."""
    try:
        document = json.loads(body, parse_int=parser_of_integers(body))
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}", "invalid_json") from error
    except RecursionError as error:
        raise ApiError(400, "the body is no JSON that can be read: it nests too deep", "invalid_json") from error
    if not isinstance(document, dict):
        raise ApiError(400, "the body must be a JSON object", "invalid_json")
    if problems := [(location, "invalid_value", f"{location} {what}") for location, what in unusable(document)]:
        raise refused(problems)
    return document


def refused(problems: Sequence[Problem]) -> ApiError:
    rest = [f"and {len(problems) - _SAID} more"] if len(problems) > _SAID else []
    message = "; ".join([sentence for _, _, sentence in problems[:_SAID]] + rest)
    return ApiError(400, message, problems[0][1], problems[0][0])


def _invalid(error: ErrorDetails) -> Problem:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return name, "missing_parameter", f"{name} is missing"
    return name, "invalid_value", f"{name} {requirement(error)}"


def _unsupported(document: Mapping[str, Any], kind: type[CompletionRequest]) -> list[Problem]:
    """Name what is wrong with messages, and parameters that are not supported; null and neutral values pass."""
    problems = []
    for name, value in document.items():
        if name in kind.model_fields or name in _HARMLESS or value is None:
            continue
        if name in kind.neutral:
            if value not in kind.neutral[name]:
                problems.append((name, "unsupported_parameter", f"{name} is not supported here; leave it out"))
        else:
            known = [*kind.model_fields, *kind.neutral, *_HARMLESS] if len(problems) < _SAID else []
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            problems.append((shown(name), "unknown_parameter", f"{shown(name)} is no parameter here; {hint}"))
    messages = document.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else []):
        for key, advice in message_problems(message, calls=True) if isinstance(message, dict) else ():
            name = f"messages.{index}{key}"
            problems.append((name, "invalid_value", f"{name}: {advice}"))
    return problems
