"""`/v1/uploads`: large files in parts, each of which may be sent again where its answer was lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from deploy.api.bodies import PartBody, body_of
from deploy.api.errors import ApiError
from deploy.api.file_store import FileStore, NewFile
from deploy.api.files import (
    LEAST_SECONDS,
    MOST_BYTES,
    MOST_SECONDS,
    PURPOSE,
    File,
    about_expiry,
    about_file,
    file_object,
    refuse,
    refuse_large,
    to_the_end,
)
from deploy.api.keys import caller_of, needs
from deploy.api.multipart import FileForm
from deploy.serving.single_flight import SingleFlight
from jobs.store.api_keys import Scope
from jobs.store.files import Upload, UploadPart, UploadStatus

MOST_PART_BYTES = 64 * 2**20


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="forbid")

    anchor: str = Field(json_schema_extra={"const": "created_at"})
    seconds: int = Field(json_schema_extra={"minimum": LEAST_SECONDS, "maximum": MOST_SECONDS})


class UploadRequest(BaseModel):
    """What OpenAI's clients send; `mime_type` is not looked at, since the rows say what they are."""

    model_config = ConfigDict(extra="forbid")

    bytes: int = Field(ge=1, le=MOST_BYTES)
    filename: str
    mime_type: str
    purpose: str = Field(json_schema_extra={"const": PURPOSE})
    expires_after: ExpiresAfter | None = None


class CompleteRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    part_ids: list[str] = Field(min_length=1)
    md5: str | None = None


class UploadObject(TypedDict):
    """OpenAI's Upload; `file` is there once it is completed."""

    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled"]
    file: File | None


class Part(TypedDict):
    """OpenAI's UploadPart."""

    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str


class UploadRoutes:
    """The routes on one store."""

    def __init__(self, store: FileStore) -> None:
        self._store = store
        self._completions = SingleFlight[UploadObject]()
        self.router = APIRouter(prefix="/v1/uploads", dependencies=[Depends(needs(Scope.TRAIN))], tags=["Uploads"])
        self.router.add_api_route("", self.create, methods=["POST"])
        form = body_of(PartBody, "multipart/form-data")
        self.router.add_api_route("/{upload_id}/parts", self.add_part, methods=["POST"], openapi_extra=form)
        self.router.add_api_route("/{upload_id}/complete", self.complete, methods=["POST"])
        self.router.add_api_route("/{upload_id}/cancel", self.cancel, methods=["POST"])

    async def create(self, request: Request, asked: UploadRequest) -> UploadObject:
        """Begin an upload in parts."""
        expiry = asked.expires_after
        problems = about_file(asked.filename, asked.purpose)
        refuse(problems + ([] if expiry is None else about_expiry(expiry.anchor, expiry.seconds)))
        seconds = None if expiry is None else expiry.seconds
        tenant = caller_of(request).tenant
        new = (tenant, asked.filename, asked.purpose, asked.bytes, seconds)
        return upload_object(await asyncio.to_thread(self._store.table.begin_upload, *new))

    async def add_part(self, request: Request, upload_id: str) -> Part:
        """Send a part of at most 64 MiB."""
        refuse_large(request, MOST_PART_BYTES, "data")
        upload = await self._pending(request, upload_id)
        with ExitStack() as stack:
            spooled = stack.enter_context(self._store.spool())
            form = FileForm("data", spooled)
            await form.read(request, MOST_PART_BYTES)
            part = await to_the_end(self._store.put_part(upload, spooled, form.size), stack.pop_all())
        if part is None:
            raise _ended(upload_id)
        return {
            "id": part.id, "object": "upload.part", "created_at": int(part.created_at), "upload_id": upload_id
        }  # fmt: skip

    async def complete(self, request: Request, upload_id: str, asked: CompleteRequest) -> UploadObject:
        """Make the file of parts in this order. Who asks again, since the answer was lost, gets the same."""
        tenant = caller_of(request).tenant
        upload = await self._upload(tenant, upload_id)
        if upload.status is UploadStatus.COMPLETED:
            return await self._completed(upload)
        if upload.status is not UploadStatus.PENDING:
            raise _ended(upload_id)
        return await self._completions.do(upload_id, partial(self._join, upload, asked))

    async def cancel(self, request: Request, upload_id: str) -> UploadObject:
        """Give an upload up, with the parts that are there."""
        upload = await self._pending(request, upload_id)
        if not await asyncio.to_thread(self._store.end_upload, upload, UploadStatus.CANCELLED):
            raise _ended(upload_id)
        return upload_object(await self._upload(upload.tenant, upload_id))

    async def _join(self, upload: Upload, asked: CompleteRequest) -> UploadObject:
        parts = {part.id: part for part in await asyncio.to_thread(self._store.table.parts, upload.id)}
        refuse(_part_problems(upload, parts, asked.part_ids))
        with self._store.spool() as spooled:
            md5, sha256 = await self._store.join_parts(upload, asked.part_ids, spooled)
            if asked.md5 is not None and asked.md5.lower() != md5:
                message = f"the parts have the md5 {md5}, not {asked.md5[:64]!r}: upload again what is damaged"
                raise ApiError(400, message, "invalid_value", "md5")
            new = NewFile(upload.filename, PURPOSE, upload.file_seconds)
            file = await self._store.keep(upload.tenant, new, spooled, sha256)
        if not await asyncio.to_thread(self._store.end_upload, upload, UploadStatus.COMPLETED, file.id):
            await asyncio.to_thread(self._store.delete, file)  # cancelled meanwhile
            raise _ended(upload.id)
        return await self._completed(await self._upload(upload.tenant, upload.id))

    async def _completed(self, upload: Upload) -> UploadObject:
        file = await self._store.file(upload.tenant, str(upload.file_id))
        return {**upload_object(upload), "file": file_object(file)}

    async def _pending(self, request: Request, upload_id: str) -> Upload:
        upload = await self._upload(caller_of(request).tenant, upload_id)
        if upload.status is not UploadStatus.PENDING:
            raise _ended(upload_id)
        return upload

    async def _upload(self, tenant: str, upload_id: str) -> Upload:
        upload = await asyncio.to_thread(self._store.table.upload, tenant, upload_id)
        if upload is None:
            message = f"there is no upload {upload_id!r}, or it has expired: begin another one"
            raise ApiError(404, message, "upload_not_found", "upload_id")
        return upload


def upload_object(upload: Upload) -> UploadObject:
    """Return an upload, without its file."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": int(upload.created_at),
        "expires_at": int(upload.expires_at),
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status.value,
        "file": None,
    }


def _part_problems(upload: Upload, parts: dict[str, UploadPart], part_ids: list[str]) -> list[tuple[str, str, str]]:
    unknown = [part_id for part_id in part_ids if part_id not in parts]
    twice = [part_id for part_id, number in Counter(part_ids).items() if number > 1]
    if unknown:
        return [("part_ids", "invalid_value", f"part_ids: {unknown[0]!r} is no part of this upload")]
    if twice:
        return [("part_ids", "invalid_value", f"part_ids: {twice[0]!r} is there twice")]
    if (size := sum(parts[part_id].bytes for part_id in part_ids)) != upload.bytes:
        sentence = f"the parts have {size:,} bytes, and the upload was begun for {upload.bytes:,}: send the others too"
        return [("part_ids", "invalid_value", sentence)]
    return []


def _ended(upload_id: str) -> ApiError:
    return ApiError(400, f"the upload {upload_id} is completed or cancelled: begin another one", "upload_ended")
