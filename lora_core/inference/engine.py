"""Continuous batching over many adapters on one base: a step is batch, run, sample, tell.

    runs = scheduler.next_step()       a token of all that decode, and stretches of prompts
    logits = forward.step(runs)        one forward pass for all of them
    score(logits)                      the tokens of prompts, for those who ask
    tokens = sample(logits)            one for every request whose prompt has been read
    events = accept(tokens)            their texts, and which answers are over

A GPU gets the next step before the tokens of this one are read: they are its inputs there already. What it computes for
an answer that turns out to be over is dropped.

Requests join and leave between steps. Those of one adapter lie side by side in the batch, so that each
adapter is computed once. One thread owns a generator and the base's path (`models/forward.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_core.inference.detokenizer import TextStream, end_tokens
from lora_core.inference.generation import (
    FailedRequest,
    FinishReason,
    GeneratedToken,
    GenerationRequest,
    PromptTooLongError,
    UnknownTokenError,
)
from lora_core.inference.kv_cache import open_kv_cache
from lora_core.inference.logprobs import TokenLogprob, token_logprobs
from lora_core.inference.sampling import Draws, Sampler, sample, settled
from lora_core.inference.scheduler import RequestScheduler, Run, WaitingRequest
from lora_core.kernels.transfer import arrival, to_host
from lora_core.models.base import BaseModel, token_rows
from lora_core.models.forward import Forward
from lora_core.models.step import Step, UnreadIds

PROMPT_TOKENS = {"cpu": (1024, 256), "cuda": (8192, 256)}
"""Of one step, where nobody is being answered and where somebody is: as many as keep the device busy, and as few as let
those who are answered wait for two steps' time.
"""

AHEAD = {"cpu": False, "cuda": True}
"""Whether a step is queued while the one before is computed: the host's part of a step then takes a GPU no time, and a
CPU gains nothing.
"""

SURPRISES = 1 / 8
"""Draws of a step that were not found among the likely tokens, up to which the next is queued ahead: each then costs a
step of its request.
"""


@dataclass
class _Live:
    request: GenerationRequest
    sampler: Sampler
    text: TextStream
    limit: int
    ids: list[int]  # of the prompt, and of the answer so far
    cached: int = 0  # ids that the cache knows
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def completion_tokens(self) -> int:
        return len(self.ids) - len(self.request.prompt)

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.limit - self.completion_tokens

    def take_known(self, run: Run) -> list[int]:
        """What the cache does not know yet of the ids up to the end of this run."""
        start, self.cached = self.cached, min(run.start + run.tokens, len(self.ids))
        return self.ids[start : self.cached]


@dataclass
class _QueuedStep:
    """A step whose next tokens have not been read: of which requests they are (0: of none any more), int64 `[n]` on the
    device and on their way to the host, with whether draws were found. `ended` wanted their prompts read and no answer;
    the prompts of `read` have been read.
    """

    requests: list[int]
    logits: Tensor
    tokens: Tensor
    draws: Draws | None
    on_host: tuple[Tensor, ...]
    arrived: Callable[[], object]
    ended: list[GeneratedToken]
    read: list[int]


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
        self._queued: _QueuedStep | None = None
        self._surprises = 0.0
        self._next_id = 1

    @property
    def slots(self) -> int:
        """Requests that are answered at a time, at most."""
        return self._cache.slots

    @property
    def running(self) -> int:
        """Requests that hold a slot, or whose end has not been told."""
        return self._scheduler.running + (0 if self._queued is None else len(self._queued.ended))

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
        if self._queued is not None:  # where its end has not been told
            self._queued.ended[:] = [end for end in self._queued.ended if end.request != request]
        if self._live.pop(request, None) is not None:
            self._scheduler.remove(request)
            for followers in self._followers.values():
                followers[:] = [follower for follower in followers if follower != request]
            self._release_followers([request])

    @torch.inference_mode()
    def step(self) -> list[GeneratedToken | FailedRequest]:
        """One token for every request whose prompt has been read, or why it fails."""
        step = self._take_queued() or self._queue()
        if step is None:
            return []
        if AHEAD[self.forward.device.type] and self._may_go_on(step):
            self._queued = self._queue(step)
        events = self._told(step)
        self._release_followers(step.read)
        return [*step.ended, *events]

    def _take_queued(self) -> _QueuedStep | None:
        """The step that has been queued ahead, if somebody still waits for it."""
        step, self._queued = self._queued, None
        if step is None or step.ended or self._live.keys() & {*step.requests, *step.read}:
            return step
        step.arrived()
        return None

    def _queue(self, before: _QueuedStep | None = None) -> _QueuedStep | None:
        """Have the device compute the next step; `before` it comes one whose tokens are there alone."""
        unread = {} if before is None else {number: row for row, number in enumerate(before.requests)}
        last = [number for number in unread if number in self._live and self._live[number].left == 1]
        runs = self._scheduler.next_step(without=last)
        if not runs:
            return None
        best = self.forward.order([(self._live[run.request].request.adapter, run.tokens) for run in runs])
        runs = [runs[index] for index in best]
        rows = [run.tokens if self._is_scored(run) else int(run.last) for run in runs]
        logits = self._logits(runs, rows, self._unread_ids(runs, unread, before))
        for run, of_run in zip(runs, logits.split(rows), strict=True):
            if self._is_scored(run):
                self._score(run, of_run)
        read = {run.request: end - 1 for run, end in zip(runs, itertools.accumulate(rows), strict=True) if run.last}
        ended = [self._ended(number) for number in read if not self._live[number].limit]
        wanted = {number: row for number, row in read.items() if number in self._live}
        if len(wanted) < len(logits):
            logits = logits[list(wanted.values())]
        tokens, draws = sample(logits, [self._live[number].sampler for number in wanted])
        on_host = (to_host(tokens), *(() if draws is None else (to_host(draws.found),)))
        return _QueuedStep(list(wanted), logits, tokens, draws, on_host, arrival(tokens.device), ended, list(read))

    def _may_go_on(self, step: _QueuedStep) -> bool:
        """Whether nobody needs this step's tokens or logits on the host before the next one begins, and hardly any
        token will turn out to be another.
        """
        live = [self._live[number] for number in step.requests if number in self._live]
        on_host = any(of.sampler.adjusts or of.request.logprobs is not None for of in live)
        return not on_host and self._surprises <= SURPRISES

    def _unread_ids(
        self, runs: Sequence[Run], unread: Mapping[int, int], before: _QueuedStep | None
    ) -> UnreadIds | None:
        """Which of the ids of these runs are tokens of the step before."""
        places = itertools.accumulate((run.tokens for run in runs), initial=0)
        found = [
            (place, unread[run.request]) for place, run in zip(places, runs, strict=False) if run.request in unread
        ]
        if before is None or not found:
            return None
        of_step, of_tokens = torch.tensor(found).t().contiguous()
        return UnreadIds(of_step, of_tokens, before.tokens)

    def _take_slot(self, number: int) -> tuple[int, int] | None:
        live = self._live[number]
        owner = self.base.fingerprint if live.request.adapter is None else live.request.digest
        most_tokens = len(live.request.prompt) + live.limit
        taken = self._cache.take(live.ids, owner, most_tokens, share=live.request.prompt_logprobs is None)
        live.cached = 0 if taken is None else taken[1]
        return taken

    def _is_scored(self, run: Run) -> bool:
        """Whether these are tokens of a prompt whose log-probabilities are asked for."""
        request = self._live[run.request].request
        return request.prompt_logprobs is not None and run.start < len(request.prompt)

    def _logits(self, runs: Sequence[Run], rows: Sequence[int], unread: UnreadIds | None) -> Tensor:
        """`[sum(rows), vocabulary]`: of so many last tokens of each run."""
        ids = [self._live[run.request].ids[run.start : run.start + run.tokens] or [0] for run in runs]
        joined = [token for of_run in ids for token in of_run]
        positions = [position for run in runs for position in range(run.start, run.start + run.tokens)]
        tokens = torch.tensor([joined, positions])
        adapters = [(self._live[run.request].request.adapter, run.tokens) for run in runs]
        ends = itertools.accumulate(run.tokens for run in runs)
        wanted = [row for end, count in zip(ends, rows, strict=True) for row in range(end - count, end)]
        attend = self._cache.step(runs, [self._live[run.request].take_known(run) for run in runs])
        return self.forward.step(Step(tokens[0], tokens[1], adapters, attend, wanted, unread))

    def _score(self, run: Run, logits: Tensor) -> None:
        """Score the tokens of a prompt that follow those of `run` by its logits `[tokens, vocabulary]`."""
        live = self._live[run.request]
        top, tokens = live.request.prompt_logprobs, live.ids[run.start + 1 : run.start + 1 + run.tokens]
        assert top is not None
        live.prompt_logprobs += token_logprobs(logits[: len(tokens)], tokens, [top] * len(tokens))

    def _told(self, step: _QueuedStep) -> list[GeneratedToken | FailedRequest]:
        """The next token of each request that is not over."""
        step.arrived()
        tokens, *found = step.on_host
        surprises = [] if all(of.all() for of in found) else settled(step.tokens, step.draws)
        self._surprises = len(surprises) / max(1, len(step.requests))
        if surprises:
            for row in surprises:
                self._take_back(step.requests[row])
            tokens = step.tokens.cpu()
        chosen = list(zip(step.requests, tokens.tolist(), strict=True))
        scored = self._answer_logprobs(step.requests, [token for _, token in chosen], step.logits)
        return [self._accept(of, token, scored.get(of)) for of, token in chosen if of in self._live]

    def _take_back(self, number: int) -> None:
        """Drop what was queued ahead for a request whose token has turned out to be another."""
        if self._queued is not None and number in self._queued.requests and number in self._live:
            self._queued.requests[self._queued.requests.index(number)] = 0
            self._live[number].sampler.take_back()
            self._cache.take_back(self._scheduler.take_back(number))

    def _answer_logprobs(
        self, numbers: Sequence[int], tokens: Sequence[int], logits: Tensor
    ) -> dict[int, TokenLogprob]:
        live = [(row, self._live[number]) for row, number in enumerate(numbers) if number in self._live]
        asked = [(row, of.request.logprobs) for row, of in live if of.request.logprobs is not None]
        if not asked:
            return {}
        rows = [row for row, _ in asked]
        scored = token_logprobs(logits[rows], [tokens[row] for row in rows], [top for _, top in asked])
        return {numbers[row]: logprob for row, logprob in zip(rows, scored, strict=True)}

    def _accept(self, number: int, token: int, logprob: TokenLogprob | None) -> GeneratedToken | FailedRequest:
        """Record a token, and let the request go where the answer is over."""
        live, grammar = self._live[number], self._live[number].sampler.grammar
        live.sampler.accept(token)
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
