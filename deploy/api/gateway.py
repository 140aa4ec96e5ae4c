"""The HTTP ingress: routes, and which base a model's name belongs to."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster.log_format import NamedFields
from cluster.registry import AdapterRegistry, Publication
from cluster.settings import Settings
from cluster.storage.directory import open_storage
from deploy.api.bodies import ErrorBody, body_of
from deploy.api.capacity import Capacity
from deploy.api.completion_objects import ChatCompletion, TextCompletion
from deploy.api.errors import ApiError, answer_errors
from deploy.api.file_store import FileStore
from deploy.api.files import FileRoutes
from deploy.api.fine_tuning import FineTuning
from deploy.api.keys import Caller, KeyCheck, KeyRing, caller_of, needs
from deploy.api.models import Models
from deploy.api.observation import ObserveRequests
from deploy.api.responses import (
    ChatResponse,
    CompletionResponse,
    TextResponse,
    event,
)
from deploy.api.schemas import ChatRequest, CompletionRequest, TextRequest, read_request
from deploy.api.tenant_names import TenantNames
from deploy.api.uploads import UploadRoutes
from deploy.api.web_page import WebPage
from deploy.api.webhook_sender import WebhookSender
from deploy.api.webhooks import WebhookRoutes
from deploy.proxy import whole_body
from deploy.serving.protocol import Delta, ErrorResponse, GenerateRequest, StreamStart
from jobs.store.api_keys import KeyTable, Scope
from jobs.store.database import Database
from jobs.store.files import FileTable
from jobs.store.jobs import JobQueue
from jobs.store.webhooks import WebhookTable

log = logging.getLogger("ray.serve.lora")

_THREADS = 64  # that wait for storage and the database: Serve has five, which a few slow answers would take


async def _asked(result: Any) -> Any:
    """Return what a server answers; that it has too much to do, or is just being replaced, is worth another try."""
    try:
        return await result
    except BackPressureError as error:
        raise ApiError(429, "too many requests are waiting; try again soon", "overloaded", retry=True) from error
    except (DeploymentUnavailableError, RayActorError) as error:
        raise ApiError(503, "this model is being loaded; try again soon", "server_restarting", retry=True) from error


def _error_of(refusal: ErrorResponse) -> ApiError:
    return ApiError(refusal.status, refusal.message, refusal.code, refusal.param, retry=refusal.status >= 500)


def make_api(keys: KeyRing, *routers: APIRouter) -> FastAPI:
    """Return the application of these routes, which are for who has a key; its documentation is for all."""
    api: FastAPI = FastAPIOffline(
        title="LoRA service",
        docs_url="/docs",
        redoc_url=None,
        static_url="/docs",
        swagger_ui_parameters={"validatorUrl": None},  # else the page sends the document to somebody
        responses={"default": {"model": ErrorBody, "description": "what is wrong, and what to change"}},
    )
    api.add_middleware(KeyCheck, keys=keys)
    api.add_middleware(ObserveRequests)  # last, so that it is around all others
    answer_errors(api)
    for router in routers:
        api.include_router(router)
    return api


@serve.ingress()
class Gateway:
    """The process that all requests pass through. `servers` are handles of `AdapterServer`, by the name of the base,
    and `admission` is one of `AdmissionServer`.
    """

    def __init__(
        self,
        settings: Settings,
        servers: Mapping[str, DeploymentHandle[Any]],
        admission: DeploymentHandle[Any],
    ) -> None:
        if settings.log_format == "json":
            log.addFilter(NamedFields())
        # Requests and deltas are plain values, which pickle writes in a tenth of cloudpickle's time.
        plain: dict[str, Any] = {"request_serialization": "pickle", "response_serialization": "pickle"}
        self._servers = {name: server.options(**plain) for name, server in servers.items()}
        self._streams = {name: server.options(stream=True, **plain) for name, server in servers.items()}
        self._registry = AdapterRegistry(open_storage(settings.storage_url), settings.tenant)
        self._pushes = settings.min_replicas > 0
        self._loading = set[asyncio.Task[None]]()
        names = TenantNames(self._registry, settings.tenant, settings.notice_seconds, self._push)
        # What builds the application need not have the database's secret, which is in this pod's environment then.
        database = Database(os.environ.get("LORA_DATABASE_URL") or settings.database_url)
        queue = JobQueue(database)
        self._keys = KeyRing(KeyTable(database), settings.tenant)
        self._files = FileStore(FileTable(database), self._registry.storage, settings.home / "incoming")
        self._models = Models(list(servers), names, self._registry, queue)
        self._fine_tuning = FineTuning(settings, queue, self._files, admission)
        sender = WebhookSender(webhooks := WebhookTable(database), settings.webhook_networks)
        self._webhooks = WebhookRoutes(webhooks, sender)
        self._capacity = Capacity(servers, queue, settings.jobs_per_session)
        running = asyncio.get_running_loop()
        running.set_default_executor(ThreadPoolExecutor(_THREADS, "gateway"))
        self._always = [running.create_task(self._keys.follow(settings.key_seconds))]
        self._always.append(running.create_task(self._files.sweep()))
        self._always.append(running.create_task(sender.follow()))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application: Serve asks for it once, in the replica."""
        router = APIRouter()
        router.add_api_route("/healthz", self.healthz)
        for path, answer, kind, whole in (
            ("/v1/chat/completions", self.chat_completions, ChatRequest, ChatCompletion),
            ("/v1/completions", self.completions, TextRequest, TextCompletion),
        ):
            router.add_api_route(
                path,
                answer,
                methods=["POST"],
                dependencies=[Depends(needs(Scope.INFER))],
                tags=["Completions"],
                openapi_extra=body_of(kind),
                responses={200: {"model": whole, "content": {"text/event-stream": {}}}},
            )
        routers = self._models.router(), self._fine_tuning.router()  # whose result files come before other files
        files = FileRoutes(self._files).router, UploadRoutes(self._files).router
        rest = self._webhooks.router, self._capacity.router(), WebPage().router()
        return make_api(self._keys, router, *routers, *files, *rest)

    async def healthz(self) -> dict[str, str]:
        """Tell that the gateway is up."""
        return {"status": "ok"}

    async def chat_completions(self, request: Request) -> Response:
        """Answer a conversation, whole or as a stream of server-sent events that ends with `[DONE]`."""
        chat = await read_request(await whole_body(request), ChatRequest)
        return await self._completed(request, chat, ChatResponse(chat))

    async def completions(self, request: Request) -> Response:
        """Go on with a text or the ids of tokens, whole or as a stream; with `echo` and `logprobs`, score it."""
        text = await read_request(await whole_body(request), TextRequest)
        return await self._completed(request, text, TextResponse(text))

    async def _completed(self, http: Request, request: CompletionRequest, response: CompletionResponse) -> Response:
        caller, name = caller_of(http), self._models.parse(request.model)
        if name is None:
            raise await self._models.unknown(caller, request.model)
        owner, digest = await self._models.digest(caller, request.model, name)
        trace: str | None = http.state.traceparent
        asked = replace(request.generate_request(name.adapter, digest), tenant=owner, traceparent=trace)
        if request.stream:
            return await self._streamed(caller, request.model, response, name.base, asked)
        answer = await _asked(self._servers[name.base].answer.remote(asked))
        if isinstance(answer, ErrorResponse):
            raise await self._refused(caller, request.model, answer)
        tokens = sum(choice.completion_tokens for choice in answer.choices)
        caller.use_tokens(answer.start.prompt_tokens + tokens)
        return JSONResponse(response.whole(answer))

    def _push(self, tenant: str, published: Publication) -> None:
        """Have an adapter loaded before anybody asks for it, unless its base may have no replica: none is started."""
        if published.base in self._servers and self._pushes:
            loading = asyncio.get_running_loop().create_task(self._load(tenant, published))
            self._loading.add(loading)
            loading.add_done_callback(self._loading.discard)

    async def _load(self, tenant: str, published: Publication) -> None:
        """Wait for it: a call that nobody holds is called off."""
        try:
            await self._servers[published.base].load.remote(published, tenant)
        except (BackPressureError, DeploymentUnavailableError, RayActorError) as error:
            log.warning("event=push_failed adapter=%s:%s error=%r", published.base, published.name, error)

    async def _streamed(
        self, caller: Caller, model: str, response: CompletionResponse, base: str, asked: GenerateRequest
    ) -> Response:
        """Nothing is sent before the request is taken, so that a refusal still has its status."""
        items: Any = self._streams[base].stream.remote(asked)  # StreamStart, Delta or ErrorResponse
        start = await _asked(anext(items))
        if isinstance(start, ErrorResponse):
            raise await self._refused(caller, model, start)
        assert isinstance(start, StreamStart)

        async def chunks() -> AsyncIterator[str]:
            tokens: dict[int, int] = {}  # of each choice
            caller.use_tokens(start.prompt_tokens)
            try:
                if first := response.first_chunk(start):
                    yield first
                async for item in items:
                    if isinstance(item, Delta):
                        caller.use_tokens(item.completion_tokens - tokens.get(item.index, 0))
                        tokens[item.index] = item.completion_tokens
                        yield response.chunks(item)
                    elif isinstance(item, ErrorResponse):
                        yield event(_error_of(item).body())
            finally:  # also of who stops listening, whose call nothing else would end
                items.cancel()

        return StreamingResponse(chunks(), media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def _refused(self, caller: Caller, model: str, refusal: ErrorResponse) -> ApiError:
        if refusal.status == 404:
            return await self._models.unknown(caller, model, refusal.message)
        return _error_of(refusal)
