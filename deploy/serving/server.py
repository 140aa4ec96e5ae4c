"""One base model, its generator and its adapters, as a Serve deployment.

    stream(asked)      a StreamStart, then Deltas as they come; or one ErrorResponse
    answer(asked)      the same, whole

A request names the digest that its model's name meant when it came: what it is answered with to its end, what the
adapter is known by in memory, and what prompts that begin alike are told apart by.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from cluster.log_format import NamedFields
from cluster.registry import AdapterNotFound, AdapterRegistry, Publication
from cluster.settings import Settings
from cluster.sources import local_source
from cluster.storage.base import StorageCorrupt, StorageError
from cluster.storage.directory import open_storage
from cluster.tracing import span, traceparent
from deploy.serving.protocol import (
    Completion,
    Delta,
    ErrorResponse,
    FinishReason,
    GenerateRequest,
    ReplicaLoad,
    StreamStart,
    TokenIds,
)

if TYPE_CHECKING:  # torch takes seconds to import, and the driver that deploys this class has no use for it
    from deploy.serving.decode_loop import ChoiceToken
    from deploy.serving.metrics import ServingMetrics
    from lora_core.inference.generation import GenerationRequest
    from lora_core.inference.grammar import Grammar
    from lora_core.inference.tool_calls import CallFormat
    from lora_core.models.base import BaseModel
    from lora_core.models.forward import Forward

log = logging.getLogger("ray.serve.lora")

_SLOT_RANK = 16  # of the adapters by which free memory is counted


class AdapterServer:
    """Serves the base that `settings.base_models` calls `name`, and every adapter that is published on it."""

    def __init__(self, name: str, settings: Settings) -> None:
        # Before torch is imported, as OpenMP reads it once. By default its threads spin while they wait for each other,
        # and a neighbour on the same cores (a training rank, even the gateway) then costs most of the speed: 8 requests
        # over HTTP, 2 threads, 2 busy cores: 18 to 43 tokens/s spinning, 150 to 195 sleeping.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from deploy.serving.adapter_cache import AdapterCache
        from deploy.serving.decode_loop import DecodeLoop
        from deploy.serving.metrics import QueueGauges, ServingMetrics
        from lora_core.inference.detokenizer import TokenTexts
        from lora_core.inference.engine import Generator
        from lora_core.inference.grammar import GrammarCompiler
        from lora_core.inference.warmup import warm_up
        from lora_core.models.base import load_base, token_rows
        from lora_core.models.forward import open_forward
        from lora_core.models.places import place_of

        if settings.log_format == "json":
            log.addFilter(NamedFields())
        began = time.monotonic()
        source = local_source(settings.resolve_base(name), settings.cache_dir)
        self._base = load_base(source, precision=settings.serve_precision, cache_dir=settings.cache_dir)
        self._tokenizer = copy.deepcopy(self._base.tokenizer)  # the decode loop uses the other in its thread
        self._texts = TokenTexts(self._tokenizer)
        forward = open_forward(self._base)
        self._metrics, self._gauges = ServingMetrics(name), QueueGauges(name)
        generator = Generator(self._base, forward)
        self._grammars = GrammarCompiler(self._tokenizer, token_rows(self._base.model), generator.end_tokens)
        self._loop = DecodeLoop(
            generator,
            threads=settings.threads or len(os.sched_getaffinity(0)),
            observe=self._gauges.show,
            patience=settings.engine_iteration_timeout_seconds,
        )
        self._slots, self._slot_bytes = generator.slots, _slot_bytes(self._base, forward)
        self._place = place_of(self._base.device)
        self._loop.submit(partial(warm_up, generator)).result()
        registry = AdapterRegistry(open_storage(settings.storage_url), settings.tenant)
        self._adapters = AdapterCache(registry, name, self._base, forward, self._loop, self._metrics, settings)
        log.info(
            "event=base_loaded base=%s fingerprint=%s precision=%s device=%s seconds=%.1f",
            name, self._base.fingerprint[:16], self._base.precision, self._base.device, time.monotonic() - began,
        )  # fmt: skip

    def check_health(self) -> None:
        """Raise what killed the decode loop, or that it is stuck: Serve asks every few seconds, and then replaces the
        replica.
        """
        self._loop.check_health()

    async def answer(self, asked: GenerateRequest) -> Completion | ErrorResponse:
        """Return the whole answers."""
        from deploy.serving.choices import joined

        start, *items = [item async for item in self.stream(asked)]
        last = items[-1] if items else start
        if isinstance(last, ErrorResponse):
            return last
        assert isinstance(start, StreamStart)
        deltas = [item for item in items if isinstance(item, Delta)]
        of_choices = [[delta for delta in deltas if delta.index == index] for index in range(asked.n)]
        return Completion(start, tuple(map(joined, of_choices)))

    async def stream(self, asked: GenerateRequest) -> AsyncGenerator[StreamStart | Delta | ErrorResponse]:
        """Return the answers as they come. A caller who stops listening gives the request up."""
        from deploy.serving.choices import Choices

        account = _Account(self._metrics, asked)
        async with AsyncExitStack() as stack:
            answering = stack.enter_context(span("answer", asked.traceparent, tenant=asked.tenant, choices=asked.n))
            asked = replace(asked, traceparent=traceparent(answering))
            try:
                digest, request = await self._request(asked, stack)
                requests = [replace(request, sampling=request.sampling.of_choice(index)) for index in range(asked.n)]
                requests[1:] = [replace(other, prompt_logprobs=None) for other in requests[1:]]
                prompt_tokens = len(request.prompt)
                stack.enter_context(span("generate", asked.traceparent, digest=digest, prompt_tokens=prompt_tokens))
                batches = await stack.enter_async_context(self._loop.answering(requests))
                stack.callback(account.close, len(request.prompt))
                yield StreamStart(digest, len(request.prompt))
                choices = Choices(asked, request.prompt, self._texts, self._call_format() if asked.tools else None)
                async for batch in batches:
                    account.took(batch)
                    for delta in choices.deltas(batch):
                        yield delta
            except Exception as error:
                account.failed = True
                yield _refusal(error)

    async def load(self, published: Publication, tenant: str) -> None:
        """Load what a tenant has just published. What is refused is told so, with the reason, to who asks for it."""
        assert published.digest is not None
        try:
            await self._adapters.load(tenant, published.name, published.digest)
            self._metrics.published(time.time() - published.at)
        except (LookupError, ValueError, StorageError) as error:
            log.warning("event=load_failed adapter=%s:%s error=%r", published.base, published.name, error)

    async def load_report(self) -> ReplicaLoad:
        """Return what this replica holds and does."""
        running, waiting = self._gauges.shown
        memory = self._adapters.memory
        return ReplicaLoad(
            place=self._place,
            precision=self._base.precision,
            base_bytes=self._base.nbytes,
            running=running,
            waiting=waiting,
            slots=self._slots,
            adapters=len(memory),
            adapter_bytes=memory.nbytes,
            adapter_capacity=memory.capacity,
            slot_bytes=self._slot_bytes,
            tokens_per_second=self._metrics.rate.per_second,
        )

    async def _request(self, asked: GenerateRequest, stack: AsyncExitStack) -> tuple[str, GenerationRequest]:
        """Return digest and request; the adapter stays in memory as long as the stack is open."""
        from lora_core.inference.generation import GenerationRequest

        prompt, digest, adapter = self._prompt(asked), self._base.fingerprint, None
        if asked.adapter is not None:
            assert asked.digest is not None
            digest = asked.digest
            with span("adapter", asked.traceparent, adapter=asked.adapter):
                adapter = await stack.enter_async_context(self._adapters.use(asked.tenant, asked.adapter, digest))
        return digest, GenerationRequest(
            prompt=prompt,
            adapter=adapter,
            digest=digest,
            sampling=asked.sampling,
            max_tokens=asked.max_tokens,
            stop=asked.stop,
            logprobs=asked.logprobs,
            prompt_logprobs=asked.logprobs if asked.echo else None,
            grammar=await self._grammar(asked),
        )

    async def _grammar(self, asked: GenerateRequest) -> Grammar | None:
        """Return what the answers follow, made in a thread: it may take long."""
        if asked.forced_tools:
            functions = [tool["function"] for tool in asked.tools if tool["function"]["name"] in asked.forced_tools]
            tools = {function["name"]: function.get("parameters", {}) for function in functions}
            return await asyncio.to_thread(self._grammars.call, tools, self._call_format())
        if asked.json_schema is not None:
            return await asyncio.to_thread(self._grammars.json, asked.json_schema)
        return None

    def _call_format(self) -> CallFormat:
        from lora_core.data.prompts import chat_template
        from lora_core.inference.tool_calls import CallFormat

        return CallFormat.of_template(chat_template(self._tokenizer, tools=True))

    def _prompt(self, asked: GenerateRequest) -> list[int]:
        """Return the tokens that the answer follows, made as in training unless they are given."""
        from lora_core.data.prompts import prompt_ids

        if isinstance(asked.prompt, TokenIds):
            return list(asked.prompt.ids)
        return prompt_ids(self._tokenizer, asked.prompt, asked.tools)


class _Account:
    """What one request comes to in the metrics."""

    def __init__(self, metrics: ServingMetrics, asked: GenerateRequest) -> None:
        self._metrics, self._adapter, self._arrived = metrics, asked.adapter or "", time.monotonic()
        self._tenant = asked.tenant
        self._tokens: dict[int, int] = {}  # of each choice
        self._unfinished = asked.n
        self._finish_reason: FinishReason | None = None
        self.failed = False

    def took(self, batch: list[ChoiceToken]) -> None:
        self._metrics.rate.add(len(batch))
        if not self._tokens:
            self._metrics.first_token(time.monotonic() - self._arrived)
        self._tokens |= {index: token.completion_tokens for index, token in batch}
        reasons = [token.finish_reason for _, token in batch if token.finish_reason is not None]
        self._unfinished -= len(reasons)
        if not self._unfinished:
            self._finish_reason = reasons[-1]

    def close(self, prompt_tokens: int) -> None:
        tokens = sum(self._tokens.values())
        reason = self._finish_reason or ("error" if self.failed else "abort")
        seconds = time.monotonic() - self._arrived
        self._metrics.answered(self._adapter, reason, seconds, prompt_tokens, tokens)
        log.info(
            "event=answered tenant=%s adapter=%s reason=%s prompt_tokens=%d tokens=%d seconds=%.3f",
            self._tenant, self._adapter or "-", reason, prompt_tokens, tokens, seconds,
        )  # fmt: skip


def _slot_bytes(base: BaseModel, forward: Forward) -> int:
    modules = forward.modules
    return sum(_SLOT_RANK * sum(modules.shapes[name]) for name in modules.linears) * base.model.dtype.itemsize


def _refusal(error: Exception) -> ErrorResponse:
    """Return what went wrong, for the one who asked. Anything unforeseen is a bug, which is raised and logged."""
    from deploy.serving.adapter_cache import AdapterRefusedError
    from deploy.serving.decode_loop import DecodeLoopError
    from lora_core.adapters.peft_format import AdapterFormatError
    from lora_core.data.prompts import NoTemplateError, PromptError
    from lora_core.inference.generation import PromptTooLongError, UnknownTokenError
    from lora_core.inference.grammar import GrammarError

    kinds: list[tuple[type[Exception], int, str, str | None]] = [
        (PromptError, 400, "invalid_prompt", None),
        (NoTemplateError, 400, "invalid_prompt", None),
        (PromptTooLongError, 400, "context_length_exceeded", None),
        (UnknownTokenError, 400, "invalid_prompt", None),
        (GrammarError, 400, "invalid_json_schema", None),
        (AdapterNotFound, 404, "model_not_found", "model"),
        (AdapterRefusedError, 409, "adapter_refused", "model"),
        (AdapterFormatError, 409, "adapter_refused", "model"),
        (StorageCorrupt, 409, "adapter_damaged", "model"),
        (StorageError, 503, "storage_unavailable", None),
        (DecodeLoopError, 503, "server_restarting", None),
    ]
    for kind, status, code, param in kinds:
        if isinstance(error, kind):
            return ErrorResponse(status, str(error), code, param)
    raise error
