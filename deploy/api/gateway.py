"""The HTTP ingress: routes, errors in OpenAI's envelope, and which base a model's name belongs to."""

# Serve pickles the routes by value when the class is decorated. So whatever a route calls stands above the class, and
# there is no `from __future__ import annotations`: FastAPI could not resolve the types later.

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from cluster.registry import AdapterEntry, AdapterNotFound, AdapterRegistry, Publication
from cluster.settings import Settings
from cluster.storage.base import StorageError
from cluster.storage.directory import open_storage
from deploy.api.adapter_names import AdapterNames
from deploy.api.responses import (
    ChatResponse,
    CompletionResponse,
    ModelName,
    TextResponse,
    event,
    model_object,
    parse_model,
)
from deploy.api.schemas import ApiError, ChatRequest, CompletionRequest, TextRequest, parse_request
from deploy.serving.protocol import Delta, ErrorResponse, GenerateRequest, StreamStart

log = logging.getLogger("ray.serve.lora")

_NAMES_SHOWN = 30
_RETRY_SECONDS = 1  # after which a client had best ask again

api = FastAPI(title="LoRA service", openapi_url=None)


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


def _answer_error(error: ApiError) -> Response:
    headers = {"x-should-retry": "true" if error.retry else "false"}
    if error.retry and error.status in (429, 503):
        headers["retry-after"] = str(_RETRY_SECONDS)
    return JSONResponse(error.body(), error.status, headers)


@api.exception_handler(ApiError)
async def _on_api_error(_: Request, error: ApiError) -> Response:
    return _answer_error(error)


@api.exception_handler(StorageError)
async def _on_storage_error(_: Request, error: StorageError) -> Response:
    return _answer_error(ApiError(503, str(error), "storage_unavailable", retry=True))


@api.exception_handler(HTTPException)
async def _on_http_error(request: Request, error: HTTPException) -> Response:
    """Answer that there is no such path, or not with this method."""
    message = f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase.lower()}"
    return _answer_error(ApiError(error.status_code, message, "unknown_url"))


@api.exception_handler(Exception)
async def _on_bug(request: Request, error: Exception) -> Response:
    log.error("event=failed path=%s error=%r", request.url.path, error)
    return _answer_error(ApiError(500, "an unexpected error; the server's log has it", "internal_error", retry=True))


@serve.ingress(api)
class Gateway:
    """The process that all requests pass through. `servers` are handles of `AdapterServer`, by the name of the base."""

    def __init__(self, settings: Settings, servers: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._servers = servers
        self._streams = {name: server.options(stream=True) for name, server in servers.items()}
        self._registry = AdapterRegistry(open_storage(settings.storage_url), settings.tenant)
        self._pushes = settings.min_replicas > 0
        self._names = AdapterNames(self._registry, settings.notice_seconds)
        self._following = asyncio.get_running_loop().create_task(self._names.follow(self._push))
        self._started = time.time()

    @api.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    @api.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        chat = parse_request(await request.body(), ChatRequest)
        return await self._completed(chat, ChatResponse(chat))

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        text = parse_request(await request.body(), TextRequest)
        return await self._completed(text, TextResponse(text))

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        bases = [model_object(name, name, self._started) for name in self._servers]
        adapters = [
            model_object(f"{entry.base}:{entry.name}", entry.base, entry.created_at, entry.digest)
            for entry in await self._adapters()
        ]
        return {"object": "list", "data": bases + adapters}

    @api.get("/v1/models/{model:path}")
    async def model(self, model: str) -> dict[str, Any]:
        name = parse_model(model, list(self._servers))
        if name is None:
            raise await self._unknown(model)
        if name.adapter is None:
            return model_object(model, name.base, self._started)
        try:
            version = await asyncio.to_thread(self._registry.resolve, name.base, name.adapter, name.version)
        except AdapterNotFound as error:
            raise await self._unknown(model, str(error)) from error
        return model_object(model, name.base, version.manifest["created_at"], version.digest)

    async def _completed(self, request: CompletionRequest, response: CompletionResponse) -> Response:
        name = parse_model(request.model, list(self._servers))
        if name is None:
            raise await self._unknown(request.model)
        asked = request.generate_request(name.adapter, await self._digest(request.model, name))
        if request.stream:
            return await self._streamed(request.model, response, name.base, asked)
        answer = await _asked(self._servers[name.base].answer.remote(asked))
        if isinstance(answer, ErrorResponse):
            raise await self._refused(request.model, answer)
        return JSONResponse(response.whole(answer))

    async def _digest(self, model: str, name: ModelName) -> str | None:
        """Return what the request is answered with; None where it is of the base itself."""
        if name.adapter is None:
            return None
        try:
            return await self._names.digest(name.base, name.adapter, name.version)
        except AdapterNotFound as error:
            raise await self._unknown(model, str(error)) from error

    def _push(self, published: Publication) -> None:
        """Have an adapter loaded before anybody asks for it, unless its base may have no replica: none is started."""
        if published.base in self._servers and self._pushes:
            self._servers[published.base].load.remote(published)

    async def _streamed(self, model: str, response: CompletionResponse, base: str, asked: GenerateRequest) -> Response:
        """Nothing is sent before the request is taken, so that a refusal still has its status."""
        items: AsyncIterator[StreamStart | Delta | ErrorResponse] = self._streams[base].stream.remote(asked)  # type: ignore[assignment]
        start = await _asked(anext(items))
        if isinstance(start, ErrorResponse):
            raise await self._refused(model, start)
        assert isinstance(start, StreamStart)

        async def chunks() -> AsyncIterator[str]:
            yield response.first_chunk(start)
            async for item in items:
                if isinstance(item, Delta):
                    yield response.chunks(item)
                elif isinstance(item, ErrorResponse):
                    yield event(_error_of(item).body())

        return StreamingResponse(chunks(), media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def _refused(self, model: str, refusal: ErrorResponse) -> ApiError:
        if refusal.status == 404:
            return await self._unknown(model, refusal.message)
        return _error_of(refusal)

    async def _unknown(self, model: str, reason: str = "") -> ApiError:
        """Return a 404 with the models that exist; the reason says which versions do."""
        names = [*self._servers, *(f"{entry.base}:{entry.name}" for entry in await self._adapters())]
        more = f" and {len(names) - _NAMES_SHOWN} more, see /v1/models" if len(names) > _NAMES_SHOWN else ""
        message = f"the model {model!r} does not exist{f' ({reason})' if '@' in model and reason else ''}"
        message += f"; there are: {', '.join(names[:_NAMES_SHOWN])}{more}"
        return ApiError(404, message, "model_not_found", "model")

    async def _adapters(self) -> list[AdapterEntry]:
        """Return the published adapters of the bases that are served."""
        return [entry for entry in await self._names.entries() if entry.base in self._servers]
