"""`/v1/files`: OpenAI's files, for training. What comes is checked by the code that training reads it with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import ExitStack
from pathlib import PurePath
from typing import Annotated, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response, StreamingResponse
from typing_extensions import TypedDict

from deploy.api.bodies import FileBody, body_of
from deploy.api.errors import ApiError
from deploy.api.file_store import FileStore, NewFile
from deploy.api.keys import caller_of, needs
from deploy.api.multipart import FileForm, too_large
from deploy.api.pages import Page, page
from deploy.proxy import PACED
from jobs.store.api_keys import Scope
from jobs.store.files import FileStatus, StoredFile
from lora_core.data.files import SUFFIXES

MOST_BYTES = 10 * 2**30
MOST_BYTES_UNPACED = 512 * 2**20
PURPOSE = "fine-tune"
LEAST_SECONDS, MOST_SECONDS = 3600, 2_592_000

_CONTENT: dict[int | str, dict[str, object]] = {200: {"content": {"application/octet-stream": {}}}}
_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"

T = TypeVar("T")


class File(TypedDict):
    """OpenAI's File, and the hash of its content. `status_details` has a line for each mistake in its rows."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed", "error"]
    status_details: str | None
    sha256: str


class DeletedFile(TypedDict):
    id: str
    object: Literal["file"]
    deleted: bool


class FileRoutes:
    """The routes on one store."""

    def __init__(self, store: FileStore) -> None:
        self._store = store
        self.router = APIRouter(prefix="/v1/files", dependencies=[Depends(needs(Scope.TRAIN))], tags=["Files"])
        form = body_of(FileBody, "multipart/form-data")
        self.router.add_api_route("", self.create, methods=["POST"], openapi_extra=form)
        self.router.add_api_route("", self.list_files)
        self.router.add_api_route("/{file_id}", self.retrieve)
        self.router.add_api_route("/{file_id}", self.delete, methods=["DELETE"])
        self.router.add_api_route(
            "/{file_id}/content", self.content, response_class=StreamingResponse, responses=_CONTENT
        )

    async def create(self, request: Request) -> File:
        """Upload a data set in one piece. One with mistakes in its rows is kept, with the status `error`."""
        tenant, most = caller_of(request).tenant, most_bytes(request)
        refuse_large(request, most, "file")
        with ExitStack() as stack:
            spooled = stack.enter_context(self._store.spool())
            form = FileForm("file", spooled)
            await form.read(request, most)
            assert form.filename is not None, "or read raises"
            new = new_file(form.filename, form.fields)
            keeping = self._store.keep(tenant, new, spooled, form.sha256)
            return file_object(await to_the_end(keeping, stack.pop_all()))

    async def list_files(
        self,
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Page[File]:
        """List files, the newest first."""
        tenant = caller_of(request).tenant
        last = None if after is None else await self._store.file(tenant, after, "after")
        files = await asyncio.to_thread(
            self._store.table.list, tenant, limit=limit + 1, after=last, purpose=purpose, newest=order == "desc"
        )
        return page([file_object(file) for file in files[:limit]], len(files) > limit)

    async def retrieve(self, request: Request, file_id: str) -> File:
        """Describe a file."""
        return file_object(await self._store.file(caller_of(request).tenant, file_id))

    async def delete(self, request: Request, file_id: str) -> DeletedFile:
        """Delete a file."""
        file = await self._store.file(caller_of(request).tenant, file_id)
        await asyncio.to_thread(self._store.delete, file)
        return {"id": file.id, "object": "file", "deleted": True}

    async def content(self, request: Request, file_id: str) -> Response:
        """Read what a file holds."""
        file = await self._store.file(caller_of(request).tenant, file_id)
        pieces = await asyncio.to_thread(self._store.content, file)
        headers = {"content-length": str(file.bytes)}
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)


def file_object(file: StoredFile) -> File:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "expires_at": None if file.expires_at is None else int(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "error" if file.status is FileStatus.ERROR else "processed",
        "status_details": file.status_details,
        "sha256": file.sha256,
    }


def new_file(filename: str, fields: dict[str, str]) -> NewFile:
    """Check what a form says of a file. Raises ApiError (400) with everything that is wrong."""
    problems: list[tuple[str, str, str]] = []
    for name in fields.keys() - {"purpose", _ANCHOR, _SECONDS}:
        problems.append((name, "unknown_parameter", f"{name} is no parameter here; leave it out"))
    problems += about_file(filename, fields.get("purpose"))
    seconds: int | None = None
    if _ANCHOR in fields or _SECONDS in fields:
        text = fields.get(_SECONDS, "")
        seconds = int(text) if text.isdecimal() and len(text) < 10 else 0
        problems += about_expiry(fields.get(_ANCHOR), seconds)
    refuse(problems)
    return NewFile(filename, PURPOSE, seconds)


def about_file(filename: str, purpose: str | None) -> list[tuple[str, str, str]]:
    """Say what is wrong with a file's name or purpose, by parameter, code and sentence."""
    problems = []
    if purpose != PURPOSE:
        given = "is missing" if purpose is None else f"is {purpose!r}"
        problems.append(("purpose", "invalid_value", f"purpose {given}: files are for training here; send {PURPOSE}"))
    suffix = PurePath(filename).suffix.lower()
    if suffix and suffix not in SUFFIXES:
        sentence = f"the file's name ends in {suffix[:20]!r}, which is not read; convert it to {', '.join(SUFFIXES)}"
        problems.append(("file", "invalid_value", sentence))
    return problems


def about_expiry(anchor: str | None, seconds: int) -> list[tuple[str, str, str]]:
    """Say likewise what is wrong with `expires_after`."""
    problems = []
    if anchor != "created_at":
        problems.append(("expires_after.anchor", "invalid_value", "expires_after.anchor must be created_at"))
    if not LEAST_SECONDS <= seconds <= MOST_SECONDS:
        sentence = f"expires_after.seconds must be a whole number from {LEAST_SECONDS} to {MOST_SECONDS}"
        problems.append(("expires_after.seconds", "invalid_value", sentence))
    return problems


def refuse(problems: list[tuple[str, str, str]]) -> None:
    """Raise ApiError (400) with all of these problems, if there are some."""
    if problems:
        param, code, _ = problems[0]
        raise ApiError(400, "; ".join(sentence for _, _, sentence in problems), code, param)


def most_bytes(request: Request) -> int:
    """Return how large a file in one piece may be: less where Serve's proxy would have all of it in memory."""
    return MOST_BYTES if PACED in request.scope.get("state", {}) else MOST_BYTES_UNPACED


def refuse_large(request: Request, most: int, param: str) -> None:
    """Raise ApiError (413) before anything is read, where the client says how much comes."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most + 2**20:  # the form around it
        raise too_large(most, param)


async def to_the_end(work: Awaitable[T], stack: ExitStack) -> T:
    """Await what is not to be stopped half-way when the client leaves, and then close the stack."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda _: stack.close())
    return await asyncio.shield(task)
