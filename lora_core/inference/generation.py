"""What a generator is asked for, and what it says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lora_core.inference.grammar import Grammar, GrammarError
from lora_core.inference.logprobs import TokenLogprob
from lora_core.inference.sampling_params import SamplingParams
from lora_core.models.step import Bound

FinishReason = Literal["stop", "length"]


class PromptTooLongError(ValueError):
    """The prompt leaves no room for an answer."""


class UnknownTokenError(ValueError):
    """The prompt or `logit_bias` has a token that the base has no row for, though its tokenizer may know it."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt of token ids for `adapter` (None: the base), which `digest` names by its content: requests of one digest
    share the beginnings of their prompts, those without one share nothing.

    The answer ends at a stop string, at the model's end token, after `max_tokens` (0: the prompt is read and nothing is
    sampled), or at the end of the context. `logprobs` and `prompt_logprobs` ask for the log-probability of each token
    of the answer, and of the prompt but its first, and of so many of the likeliest beside it; None for none. An answer
    that has a `grammar` follows it, and ends where nothing can follow.
    """

    prompt: Sequence[int]
    adapter: Bound | None = None
    digest: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True)
class GeneratedToken:
    """One token of one request: the text that it made certain (often none), and why the answer is over, if it is.

    `completion_tokens` counts this token; an end token counts and has no text. `token` is None where none was asked
    for. `prompt_logprobs` come with the first one.
    """

    request: int
    token: int | None
    text: str
    finish_reason: FinishReason | None
    completion_tokens: int
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class FailedRequest:
    """A request that cannot go on, which is over by that."""

    request: int
    error: GrammarError
