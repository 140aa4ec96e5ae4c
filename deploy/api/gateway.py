"""The HTTP ingress: routes, and which base a model's name belongs to."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster.registry import AdapterNotFound, AdapterRegistry, Publication
from cluster.settings import Settings
from cluster.storage.directory import open_storage
from deploy.api.errors import ApiError, answer_errors
from deploy.api.file_store import FileStore
from deploy.api.files import FileRoutes
from deploy.api.keys import Caller, KeyCheck, KeyRing, caller_of, needs
from deploy.api.responses import (
    ChatResponse,
    CompletionResponse,
    ModelName,
    TextResponse,
    event,
    model_object,
    parse_model,
)
from deploy.api.schemas import ChatRequest, CompletionRequest, TextRequest, parse_request
from deploy.api.tenant_names import TenantNames
from deploy.api.uploads import UploadRoutes
from deploy.serving.protocol import Delta, ErrorResponse, GenerateRequest, StreamStart
from jobs.store.api_keys import KeyTable, Scope
from jobs.store.database import Database
from jobs.store.files import FileTable

_NAMES_SHOWN = 30


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
    """Return the application of these routes, which are for who has a key."""
    api = FastAPI(title="LoRA service", openapi_url=None)
    api.add_middleware(KeyCheck, keys=keys)
    answer_errors(api)
    for router in routers:
        api.include_router(router)
    return api


@serve.ingress()
class Gateway:
    """The process that all requests pass through. `servers` are handles of `AdapterServer`, by the name of the base."""

    def __init__(self, settings: Settings, servers: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._servers = servers
        self._streams = {name: server.options(stream=True) for name, server in servers.items()}
        self._registry = AdapterRegistry(open_storage(settings.storage_url), settings.tenant)
        self._pushes = settings.min_replicas > 0
        self._names = TenantNames(self._registry, settings.tenant, settings.notice_seconds, self._push)
        # What builds the application need not have the database's secret, which is in this pod's environment then.
        database = Database(os.environ.get("LORA_DATABASE_URL") or settings.database_url)
        self._keys = KeyRing(KeyTable(database), settings.tenant)
        self._files = FileStore(FileTable(database), self._registry.storage, settings.home / "incoming")
        running = asyncio.get_running_loop()
        self._always = [running.create_task(self._keys.follow(settings.key_seconds))]
        self._always.append(running.create_task(self._files.sweep()))
        self._started = time.time()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application: Serve asks for it once, in the replica."""
        router = APIRouter()
        router.add_api_route("/healthz", self.healthz)
        inference = [Depends(needs(Scope.INFER))]
        router.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"], dependencies=inference)
        router.add_api_route("/v1/completions", self.completions, methods=["POST"], dependencies=inference)
        anybody = [Depends(needs(Scope.INFER, Scope.TRAIN))]
        router.add_api_route("/v1/models", self.models, dependencies=anybody)
        router.add_api_route("/v1/models/{model:path}", self.model, dependencies=anybody)
        return make_api(self._keys, router, FileRoutes(self._files).router, UploadRoutes(self._files).router)

    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    async def chat_completions(self, request: Request) -> Response:
        chat = parse_request(await request.body(), ChatRequest)
        return await self._completed(caller_of(request), chat, ChatResponse(chat))

    async def completions(self, request: Request) -> Response:
        text = parse_request(await request.body(), TextRequest)
        return await self._completed(caller_of(request), text, TextResponse(text))

    async def models(self, request: Request) -> dict[str, Any]:
        bases = [model_object(name, name, self._started) for name in self._servers]
        adapters = [
            model_object(f"{entry.base}:{entry.name}", entry.base, entry.created_at, entry.digest)
            for _, entry in await self._names.entries(caller_of(request).tenant)
            if entry.base in self._servers
        ]
        return {"object": "list", "data": bases + adapters}

    async def model(self, request: Request, model: str) -> dict[str, Any]:
        caller = caller_of(request)
        name = parse_model(model, list(self._servers))
        if name is None:
            raise await self._unknown(caller, model)
        if name.adapter is None:
            return model_object(model, name.base, self._started)
        owner, _ = await self._digest(caller, model, name)
        registry = self._registry.of(owner)
        version = await asyncio.to_thread(registry.resolve, name.base, name.adapter, name.version)
        return model_object(model, name.base, version.manifest["created_at"], version.digest)

    async def _completed(self, caller: Caller, request: CompletionRequest, response: CompletionResponse) -> Response:
        name = parse_model(request.model, list(self._servers))
        if name is None:
            raise await self._unknown(caller, request.model)
        owner, digest = await self._digest(caller, request.model, name)
        asked = replace(request.generate_request(name.adapter, digest), tenant=owner)
        if request.stream:
            return await self._streamed(caller, request.model, response, name.base, asked)
        answer = await _asked(self._servers[name.base].answer.remote(asked))
        if isinstance(answer, ErrorResponse):
            raise await self._refused(caller, request.model, answer)
        tokens = sum(choice.completion_tokens for choice in answer.choices)
        caller.use_tokens(answer.start.prompt_tokens + tokens)
        return JSONResponse(response.whole(answer))

    async def _digest(self, caller: Caller, model: str, name: ModelName) -> tuple[str, str | None]:
        """Return whose adapter it is, and what the request is answered with: None where it is of the base itself."""
        if name.adapter is None:
            return caller.tenant, None
        try:
            return await self._names.digest(caller.tenant, name.base, name.adapter, name.version)
        except AdapterNotFound as error:
            raise await self._unknown(caller, model, str(error)) from error

    def _push(self, tenant: str, published: Publication) -> None:
        """Have an adapter loaded before anybody asks for it, unless its base may have no replica: none is started."""
        if published.base in self._servers and self._pushes:
            self._servers[published.base].load.remote(published, tenant)

    async def _streamed(
        self, caller: Caller, model: str, response: CompletionResponse, base: str, asked: GenerateRequest
    ) -> Response:
        """Nothing is sent before the request is taken, so that a refusal still has its status."""
        items: AsyncIterator[StreamStart | Delta | ErrorResponse] = self._streams[base].stream.remote(asked)  # type: ignore[assignment]
        start = await _asked(anext(items))
        if isinstance(start, ErrorResponse):
            raise await self._refused(caller, model, start)
        assert isinstance(start, StreamStart)

        async def chunks() -> AsyncIterator[str]:
            tokens: dict[int, int] = {}  # of each choice
            try:
                yield response.first_chunk(start)
                async for item in items:
                    if isinstance(item, Delta):
                        tokens[item.index] = item.completion_tokens
                        yield response.chunks(item)
                    elif isinstance(item, ErrorResponse):
                        yield event(_error_of(item).body())
            finally:  # also of who stops listening
                caller.use_tokens(start.prompt_tokens + sum(tokens.values()))

        return StreamingResponse(chunks(), media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def _refused(self, caller: Caller, model: str, refusal: ErrorResponse) -> ApiError:
        if refusal.status == 404:
            return await self._unknown(caller, model, refusal.message)
        return _error_of(refusal)

    async def _unknown(self, caller: Caller, model: str, reason: str = "") -> ApiError:
        """Return a 404 with the models that exist; the reason says which versions do."""
        entries = [entry for _, entry in await self._names.entries(caller.tenant) if entry.base in self._servers]
        names = [*self._servers, *(f"{entry.base}:{entry.name}" for entry in entries)]
        more = f" and {len(names) - _NAMES_SHOWN} more, see /v1/models" if len(names) > _NAMES_SHOWN else ""
        message = f"the model {model!r} does not exist{f' ({reason})' if '@' in model and reason else ''}"
        message += f"; there are: {', '.join(names[:_NAMES_SHOWN])}{more}"
        return ApiError(404, message, "model_not_found", "model")
