"""Continuous batching over many adapters on one base: a step is batch, run, sample.

    runs = scheduler.next_step()       a token of all that decode, and stretches of prompts
    logits = forward.step(runs)        one forward pass for all of them
    score(logits)                      the tokens of prompts, for those who ask
    events = sample(logits)            one token for every request whose prompt has been read

Requests join and leave between steps. Those of one adapter lie side by side in the batch, so that each
adapter is computed once. One thread owns a generator and the base's path (`models/forward.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lora_core.inference.detokenizer import TextStream, end_tokens
from lora_core.inference.grammar import Grammar, GrammarError
from lora_core.inference.kv_cache import open_kv_cache
from lora_core.inference.logprobs import TokenLogprob, token_logprobs
from lora_core.inference.sampling import Sampler, sample
from lora_core.inference.sampling_params import SamplingParams
from lora_core.inference.scheduler import RequestScheduler, Run, WaitingRequest
from lora_core.models.base import BaseModel, token_rows
from lora_core.models.forward import Forward
from lora_core.models.step import Bound, Step

FinishReason = Literal["stop", "length"]


PROMPT_TOKENS = {"cpu": (1024, 256), "cuda": (8192, 256)}
"""Of one step, where nobody is being answered and where somebody is: as many as keep the device busy, and as few as let
those who are answered wait for two steps' time.
"""


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


@dataclass
class _Live:
    request: GenerationRequest
    sampler: Sampler
    text: TextStream
    limit: int
    ids: list[int]  # of the prompt, and of the answer so far
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def completion_tokens(self) -> int:
        return len(self.ids) - len(self.request.prompt)


class Generator:
    """Answers requests on one base, at most `slots` at a time (None: see `open_kv_cache`), in at most `max_len` tokens
    each. Prompts are read `prefill_tokens` a step, or `mixed_tokens` beside others' answers; None: `PROMPT_TOKENS`.

    `context` is what the base allows of it. Adapters are used as they are given: see `Forward.load`.
    """

    def __init__(
        self,
        base: BaseModel,
        forward: Forward,
        *,
        slots: int | None = None,
        max_len: int = 4096,
        prefill_tokens: int | None = None,
        mixed_tokens: int | None = None,
    ) -> None:
        self.base, self.forward = base, forward
        self.context = min(max_len, int(base.model.config.get_text_config().max_position_embeddings))
        self.end_tokens = end_tokens(base)
        self._token_rows = token_rows(base.model)
        self._cache = open_kv_cache(forward, slots=slots, context=self.context)
        alone, mixed = PROMPT_TOKENS[forward.device.type]
        self._scheduler = RequestScheduler(
            self._take_slot,
            self._cache.release,
            prefill_tokens=prefill_tokens or alone,
            mixed_tokens=mixed_tokens or mixed,
        )
        self._live: dict[int, _Live] = {}
        self._followers: dict[int, list[int]] = {}  # who waits for whose prompt
        self._next_id = 1

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Requests in line for one."""
        return self._scheduler.waiting + sum(map(len, self._followers.values()))

    def add(self, request: GenerationRequest, *, after: int | None = None) -> int:
        """Queue a request; its id is that of its events. One that comes `after` another has the same prompt and digest,
        and waits until that prompt has been read, so that it is read once.

        Raises:
            PromptTooLongError: the prompt fills the context.
            UnknownTokenError: one of its tokens, or of `logit_bias`, is none of the base's: it would end the step.
            ValueError: an empty prompt, or `max_tokens` below 0.
        """
        room = self.context - len(request.prompt)
        if not request.prompt or (request.max_tokens is not None and request.max_tokens < 0):
            raise ValueError("a request needs a prompt, and max_tokens of at least 0")
        if room < (request.max_tokens != 0):
            raise PromptTooLongError(
                f"the prompt has {len(request.prompt)} tokens, and the context of {self.context} leaves no room for an"
                " answer; send fewer or shorter messages"
            )
        if biased := [token for token in request.sampling.logit_bias if not 0 <= token < self._token_rows]:
            raise UnknownTokenError(
                f"logit_bias has the token id {biased[0]}, and this base model's head has {self._token_rows} rows;"
                " leave it out"
            )
        if beyond := [token for token in request.prompt if not 0 <= token < self._token_rows]:
            name = self.base.tokenizer.convert_ids_to_tokens(beyond[0]) or "unknown"
            raise UnknownTokenError(
                f"the prompt has the token `{name}`, whose id is {beyond[0]}, and this base model's embedding has"
                f" {self._token_rows} rows; leave it out"
            )
        number, self._next_id = self._next_id, self._next_id + 1
        limit = room if request.max_tokens is None else min(room, request.max_tokens)
        text = TextStream(self.base.tokenizer, request.stop)
        self._live[number] = _Live(
            request, Sampler(request.sampling, request.prompt, request.grammar), text, limit, list(request.prompt)
        )
        if after in self._live and not self._live[after].completion_tokens:
            self._followers.setdefault(after, []).append(number)
        else:
            self._scheduler.add(WaitingRequest(number, len(request.prompt)))
        return number

    def abort(self, request: int) -> None:
        """Forget a request; one that is over already is no mistake, since the two may cross."""
        if self._live.pop(request, None) is not None:
            self._scheduler.remove(request)
            for followers in self._followers.values():
                followers[:] = [follower for follower in followers if follower != request]
            self._release_followers([request])

    @torch.inference_mode()
    def step(self) -> list[GeneratedToken | FailedRequest]:
        """One token for every request whose prompt has been read, or why it fails."""
        runs = self._scheduler.next_step()
        if not runs:
            return []
        best = self.forward.order([(self._live[run.request].request.adapter, run.tokens) for run in runs])
        runs = [runs[index] for index in best]
        rows = [run.tokens if self._is_scored(run) else int(run.last) for run in runs]
        logits = self._logits(runs, rows)
        for run, of_run in zip(runs, logits.split(rows), strict=True):
            if self._is_scored(run):
                self._score(run, of_run)
        last = {run.request: end - 1 for run, end in zip(runs, itertools.accumulate(rows), strict=True) if run.last}
        ended = [self._ended(number) for number in last if not self._live[number].limit]
        wanted = {number: row for number, row in last.items() if number in self._live}
        if len(wanted) < len(logits):
            logits = logits[list(wanted.values())]
        events = self._sampled(list(wanted), logits)
        self._release_followers(last)
        return [*ended, *events]

    def _take_slot(self, number: int) -> tuple[int, int] | None:
        live = self._live[number]
        owner = self.base.fingerprint if live.request.adapter is None else live.request.digest
        most_tokens = len(live.request.prompt) + live.limit
        return self._cache.take(live.ids, owner, most_tokens, share=live.request.prompt_logprobs is None)

    def _is_scored(self, run: Run) -> bool:
        """Whether these are tokens of a prompt whose log-probabilities are asked for."""
        request = self._live[run.request].request
        return request.prompt_logprobs is not None and run.start < len(request.prompt)

    def _logits(self, runs: Sequence[Run], rows: Sequence[int]) -> Tensor:
        """`[sum(rows), vocabulary]`: of so many last tokens of each run."""
        ids = [self._live[run.request].ids[run.start : run.start + run.tokens] for run in runs]
        joined = [token for of_run in ids for token in of_run]
        positions = [position for run in runs for position in range(run.start, run.start + run.tokens)]
        tokens = torch.tensor([joined, positions])
        adapters = [(self._live[run.request].request.adapter, run.tokens) for run in runs]
        ends = itertools.accumulate(run.tokens for run in runs)
        wanted = [row for end, count in zip(ends, rows, strict=True) for row in range(end - count, end)]
        return self.forward.step(Step(tokens[0], tokens[1], adapters, self._cache.step(runs, ids), wanted))

    def _score(self, run: Run, logits: Tensor) -> None:
        """Score the tokens of a prompt that follow those of `run` by its logits `[tokens, vocabulary]`."""
        live = self._live[run.request]
        top, tokens = live.request.prompt_logprobs, live.ids[run.start + 1 : run.start + 1 + run.tokens]
        assert top is not None
        live.prompt_logprobs += token_logprobs(logits[: len(tokens)], tokens, [top] * len(tokens))

    def _sampled(self, numbers: Sequence[int], logits: Tensor) -> list[GeneratedToken | FailedRequest]:
        """The next token of each request, by its row of `[n, vocabulary]`."""
        tokens = sample(logits, [self._live[number].sampler for number in numbers])
        scored = self._answer_logprobs(numbers, tokens, logits)
        return [self._accept(number, token, scored.get(number)) for number, token in zip(numbers, tokens, strict=True)]

    def _answer_logprobs(
        self, numbers: Sequence[int], tokens: Sequence[int], logits: Tensor
    ) -> dict[int, TokenLogprob]:
        tops = [self._live[number].request.logprobs for number in numbers]
        asked = [(row, top) for row, top in enumerate(tops) if top is not None]
        if not asked:
            return {}
        rows = [row for row, _ in asked]
        scored = token_logprobs(logits[rows], [tokens[row] for row in rows], [top for _, top in asked])
        return {numbers[row]: logprob for row, logprob in zip(rows, scored, strict=True)}

    def _accept(self, number: int, token: int, logprob: TokenLogprob | None) -> GeneratedToken | FailedRequest:
        """Record a token, and let the request go where the answer is over."""
        live, grammar = self._live[number], self._live[number].sampler.grammar
        if grammar is not None and grammar.error is not None:
            self.abort(number)
            return FailedRequest(number, grammar.error)
        live.ids.append(token)
        ended = token in self.end_tokens
        text = "" if ended else live.text.push(token)
        complete = grammar is not None and grammar.is_complete
        reason: FinishReason | None = "stop" if ended or live.text.stopped or complete else None
        if reason is None and live.completion_tokens == live.limit:
            reason = "length"
        if reason is not None:
            if not live.text.stopped:
                text += live.text.finish()
            self.abort(number)
        prompt_logprobs = tuple(live.prompt_logprobs) if live.completion_tokens == 1 else ()
        return GeneratedToken(number, token, text, reason, live.completion_tokens, logprob, prompt_logprobs)

    def _ended(self, number: int) -> GeneratedToken:
        """The end of a request that wanted its prompt read, and no answer."""
        prompt_logprobs = tuple(self._live[number].prompt_logprobs)
        self.abort(number)
        return GeneratedToken(number, None, "", "length", 0, None, prompt_logprobs)

    def _release_followers(self, numbers: Iterable[int]) -> None:
        """Queue those who waited for these prompts, whose beginnings are there now."""
        for number in numbers:
            for follower in self._followers.pop(number, ()):
                self._scheduler.add(WaitingRequest(follower, len(self._live[follower].request.prompt)))
