"""Continuous batching over many adapters on one base: a step is batch, run, sample.

    plan = scheduler.next_step()          whose prompt is read, who decodes
    logits = prefill(...), decode(...)    one forward pass for each prompt, one for all that decode
    events = sample(logits)               one token for every running request

Requests join and leave between steps. Those of one adapter lie side by side in the batch, so that each
adapter is computed once. One thread owns a generator and the base's path (`models/forward.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lora_core.inference.detokenizer import TextStream, end_tokens
from lora_core.inference.kv_cache import KVCache
from lora_core.inference.sampling import Sampler, SamplingParams, sample
from lora_core.inference.scheduler import RequestScheduler, WaitingRequest
from lora_core.models.base import BaseModel, token_rows
from lora_core.models.forward import Bound, Forward

FinishReason = Literal["stop", "length"]


class PromptTooLongError(ValueError):
    """The prompt leaves no room for an answer."""


class UnknownTokenError(ValueError):
    """The prompt has a token that the base has no row for, though its tokenizer may know it."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt of token ids for `adapter` (None: the base).

    The answer ends at a stop string, at the model's end token, after `max_tokens`, or at the end of the context.
    """

    prompt: Sequence[int]
    adapter: Bound | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class GeneratedToken:
    """One token of one request: the text that it made certain (often none), and why the answer is over, if it is.

    `completion_tokens` counts this token; an end token counts and has no text.
    """

    request: int
    token: int
    text: str
    finish_reason: FinishReason | None
    completion_tokens: int


@dataclass
class _Live:
    request: GenerationRequest
    sampler: Sampler
    text: TextStream
    limit: int
    tokens: list[int] = field(default_factory=list)


class Generator:
    """Answers requests on one base, at most `slots` at a time, in a context of at most `max_len` tokens.

    `context` is what the base allows of it. Adapters are used as they are given: see `Forward.load`.
    """

    def __init__(
        self, base: BaseModel, forward: Forward, *, slots: int = 8, max_len: int = 4096, prefill_tokens: int = 1024
    ) -> None:
        self.base, self.forward = base, forward
        self.context = min(max_len, int(base.model.config.get_text_config().max_position_embeddings))
        self.end_tokens = end_tokens(base)
        self._token_rows = token_rows(base.model)
        self._cache = KVCache(forward, slots=slots, max_len=self.context)
        self._scheduler = RequestScheduler(slots=slots, prefill_tokens=prefill_tokens)
        self._live: dict[int, _Live] = {}
        self._next_id = 1

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Requests in line for one."""
        return self._scheduler.waiting

    def add(self, request: GenerationRequest) -> int:
        """Queue a request; its id is that of its events.

        Raises:
            PromptTooLongError: the prompt fills the context.
            UnknownTokenError: one of its tokens is none of the base's; among others it would end the whole step.
            ValueError: an empty prompt, or `max_tokens` below 1.
        """
        room = self.context - len(request.prompt)
        if not request.prompt or (request.max_tokens is not None and request.max_tokens < 1):
            raise ValueError("a request needs a prompt and room for at least one token")
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {len(request.prompt)} tokens, and the context of {self.context} leaves no room for an"
                " answer; send fewer or shorter messages"
            )
        if beyond := [token for token in request.prompt if not 0 <= token < self._token_rows]:
            name = self.base.tokenizer.convert_ids_to_tokens(beyond[0])
            raise UnknownTokenError(
                f"the prompt has the token `{name}`, whose id is {beyond[0]}, and this base model's embedding has"
                f" {self._token_rows} rows; leave it out"
            )
        number, self._next_id = self._next_id, self._next_id + 1
        limit = room if request.max_tokens is None else min(room, request.max_tokens)
        text = TextStream(self.base.tokenizer, request.stop)
        self._live[number] = _Live(request, Sampler(request.sampling), text, limit)
        self._scheduler.add(
            WaitingRequest(number, 0 if request.adapter is None else id(request.adapter), len(request.prompt))
        )
        return number

    def abort(self, request: int) -> None:
        """Forget a request; one that is over already is no mistake, since the two may cross."""
        if self._live.pop(request, None) is not None:
            self._scheduler.remove(request)

    @torch.inference_mode()
    def step(self) -> list[GeneratedToken]:
        """One token for every running request, in the order of the batch; nothing where nobody waits or runs."""
        plan = self._scheduler.next_step()
        rows = [self._prefill(number, slot) for number, slot in plan.prefill]
        if plan.decode:
            rows.append(self._decode(plan.decode))
        if not rows:
            return []
        numbers = [number for number, _ in (*plan.prefill, *plan.decode)]
        tokens = sample(torch.cat(rows), [self._live[number].sampler for number in numbers])
        return [self._take(number, token) for number, token in zip(numbers, tokens, strict=True)]

    def _prefill(self, number: int, slot: int) -> Tensor:
        """Read a prompt into its slot; logits `[1, vocabulary]` of its last token."""
        request = self._live[number].request
        ids = torch.tensor(list(request.prompt), device=self.base.device)
        return self.forward.prefill(ids, request.adapter, self._cache.prefill(slot, len(ids)))

    def _decode(self, batch: Sequence[tuple[int, int]]) -> Tensor:
        """The last token of each request in `batch` -> logits `[n, vocabulary]`."""
        live = [self._live[number] for number, _ in batch]
        positions = [len(one.request.prompt) + len(one.tokens) - 1 for one in live]
        ids, at = torch.tensor([[one.tokens[-1] for one in live], positions], device=self.base.device)
        attend = self._cache.decode([slot for _, slot in batch], positions)
        return self.forward.decode(ids, at, [one.request.adapter for one in live], attend)

    def _take(self, number: int, token: int) -> GeneratedToken:
        """Record a token, and let the request go where the answer is over."""
        live = self._live[number]
        live.tokens.append(token)
        ended = token in self.end_tokens
        text = "" if ended else live.text.push(token)
        reason: FinishReason | None = "stop" if ended or live.text.stopped else None
        if reason is None and len(live.tokens) == live.limit:
            reason = "length"
        if reason is not None:
            if not live.text.stopped:
                text += live.text.finish()
            self.abort(number)
        return GeneratedToken(number, token, text, reason, len(live.tokens))
