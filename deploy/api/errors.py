"""Errors as OpenAI's clients know them: one envelope, and headers that say whether asking again is of use."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cluster.requirements import requirement
from cluster.storage.base import StorageError
from deploy.api.observation import count_error
from jobs.errors import DatabaseUnavailableError, UnstorableValueError

log = logging.getLogger("ray.serve.lora")

_RETRY_SECONDS = 1  # after which a client had best ask again, where nothing else is known


class ApiError(Exception):
    """An error answer, in OpenAI's envelope. `retry` False tells the client that trying again is of no use."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        *,
        retry: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, code, param)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        # Whatever a request's words are, they can be sent back.
        message, param = (
            text and text.encode(errors="backslashreplace").decode() for text in (self.message, self.param)
        )
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> Response:
        if self.status >= 500:
            count_error(self.code)
        headers = {"x-should-retry": "true" if self.retry else "false"}
        if self.retry and self.status in (429, 503):
            headers["retry-after"] = str(_RETRY_SECONDS)
        return JSONResponse(self.body(), self.status, headers | dict(self.headers))


def answer_errors(api: FastAPI) -> None:
    """Have every error of an application answered so."""

    @api.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @api.exception_handler(StorageError)
    async def on_storage_error(_: Request, error: StorageError) -> Response:
        return ApiError(503, str(error), "storage_unavailable", retry=True).response()

    @api.exception_handler(DatabaseUnavailableError)
    async def on_database_error(_: Request, error: DatabaseUnavailableError) -> Response:
        return ApiError(503, str(error), "database_unavailable", retry=True).response()

    @api.exception_handler(UnstorableValueError)
    async def on_unstorable(_: Request, error: UnstorableValueError) -> Response:
        return ApiError(400, str(error), "invalid_value").response()

    @api.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        """Name everything that is wrong with a request's parameters."""
        problems = [_problem(problem) for problem in error.errors()]
        return ApiError(400, "; ".join(sentence for _, _, sentence in problems), *problems[0][1::-1]).response()

    @api.exception_handler(ClientDisconnect)
    async def on_gone(_: Request, error: ClientDisconnect) -> Response:
        """End what nobody waits for any more."""
        return ApiError(400, "the client is gone", "client_closed_request").response()

    @api.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        """Answer that there is no such path, or not with this method; or what we said while the body was read."""
        if isinstance(error.__cause__, ApiError):
            return error.__cause__.response()
        message = f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase.lower()}"
        return ApiError(error.status_code, message, "unknown_url").response()

    @api.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        log.error("event=failed path=%s error=%r", request.url.path, error)
        message = "an unexpected error; the server's log has it"
        return ApiError(500, message, "internal_error", retry=True).response()


def _problem(error: ErrorDetails) -> tuple[str, str, str]:
    """Return parameter, code and sentence."""
    name = ".".join(map(str, error["loc"][1:])) or "the body"
    if error["type"] == "missing":
        return name, "missing_parameter", f"{name} is missing"
    if error["type"] == "extra_forbidden":
        return name, "unknown_parameter", f"{name} is no parameter here; leave it out"
    if error["type"] == "json_invalid":
        return "the body", "invalid_json", f"the body is no JSON: {error['ctx']['error']}"
    return name, "invalid_value", f"{name} {requirement(error)}"
