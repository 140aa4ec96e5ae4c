"""Uploaded files, and uploads in parts: the rows. Every look is of one tenant, and what has expired is not there."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePath
from typing import Any

import sqlalchemy as sa

from jobs.store.database import Database
from jobs.store.schema import files, upload_parts, uploads

ABANDONED_SECONDS = 86400.0  # after which content that has not come will not come any more


class FileStatus(StrEnum):
    """OpenAI's words, but for the first, which nobody is shown: the content is not all there yet."""

    UPLOADING = "uploading"
    PROCESSED = "processed"
    ERROR = "error"


class UploadStatus(StrEnum):
    """OpenAI's words."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file. `status_details` say what is wrong with its rows."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    status: FileStatus
    status_details: str | None = None
    created_at: float
    expires_at: float | None = None

    @property
    def suffix(self) -> str:
        return PurePath(self.filename).suffix.lower()


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What comes in parts. The file that it becomes lives `file_seconds`, where that is given."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    status: UploadStatus
    file_id: str | None = None
    file_seconds: int | None = None
    created_at: float
    expires_at: float


@dataclass(frozen=True, kw_only=True)
class UploadPart:
    id: str
    upload_id: str
    bytes: int
    created_at: float


class FileTable:
    """Files and uploads in one database. Methods raise DatabaseUnavailableError."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._db, self._clock = database, clock

    def begin(
        self, tenant: str, filename: str, purpose: str, size: int, sha256: str, seconds: int | None
    ) -> StoredFile:
        """Add a file whose content comes next: nobody sees it before `finish`."""
        now = self._clock()
        file = StoredFile(
            id=f"file-{secrets.token_hex(12)}",
            tenant=tenant,
            filename=filename,
            purpose=purpose,
            bytes=size,
            sha256=sha256,
            status=FileStatus.UPLOADING,
            created_at=now,
            expires_at=None if seconds is None else now + seconds,
        )
        with self._db.write() as conn:
            conn.execute(sa.insert(files).values(vars(file)))
        return file

    def finish(self, file_id: str, status: FileStatus, details: str | None) -> None:
        """Say that the content is there, and what it was found to be."""
        change = sa.update(files).where(files.c.id == file_id)
        with self._db.write() as conn:
            conn.execute(change.values(status=status, status_details=details))

    def file(self, tenant: str, file_id: str) -> StoredFile | None:
        with self._db.read() as conn:
            row = conn.execute(sa.select(files).where(*self._seen(tenant), files.c.id == file_id)).one_or_none()
        return None if row is None else _file(row)

    def list(
        self,
        tenant: str,
        *,
        limit: int,
        after: StoredFile | None = None,
        purpose: str | None = None,
        newest: bool = True,
    ) -> Sequence[StoredFile]:
        """Return the files behind `after`, at most `limit`, the newest first or last."""
        place = sa.tuple_(files.c.created_at, files.c.id)
        query = sa.select(files).where(*self._seen(tenant))
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        if after is not None:
            last = sa.tuple_(sa.literal(after.created_at), sa.literal(after.id))
            query = query.where(place < last if newest else place > last)
        order = (files.c.created_at.desc(), files.c.id.desc()) if newest else (files.c.created_at, files.c.id)
        with self._db.read() as conn:
            return [_file(row) for row in conn.execute(query.order_by(*order).limit(limit))]

    def delete(self, file_id: str) -> None:
        with self._db.write() as conn:
            conn.execute(sa.delete(files).where(files.c.id == file_id))

    def dead_files(self) -> Sequence[StoredFile]:
        """Return files of all tenants that have expired, or whose content never came."""
        now = self._clock()
        unfinished = sa.and_(files.c.status == FileStatus.UPLOADING, files.c.created_at <= now - ABANDONED_SECONDS)
        with self._db.read() as conn:
            return [
                _file(row) for row in conn.execute(sa.select(files).where((files.c.expires_at <= now) | unfinished))
            ]

    def begin_upload(self, tenant: str, filename: str, purpose: str, size: int, file_seconds: int | None) -> Upload:
        now = self._clock()
        upload = Upload(
            id=f"upload_{secrets.token_hex(12)}",
            tenant=tenant,
            filename=filename,
            purpose=purpose,
            bytes=size,
            status=UploadStatus.PENDING,
            file_seconds=file_seconds,
            created_at=now,
            expires_at=now + ABANDONED_SECONDS,
        )
        with self._db.write() as conn:
            conn.execute(sa.insert(uploads).values(vars(upload)))
        return upload

    def upload(self, tenant: str, upload_id: str) -> Upload | None:
        mine = (uploads.c.tenant == tenant, uploads.c.id == upload_id)
        with self._db.read() as conn:
            row = conn.execute(sa.select(uploads).where(*mine, uploads.c.expires_at > self._clock())).one_or_none()
        return None if row is None else _upload(row)

    def end_upload(self, upload_id: str, status: UploadStatus, file_id: str | None = None) -> bool:
        """Complete or cancel an upload; False: somebody else has done so. Its parts are its own no more."""
        change = sa.update(uploads).where(uploads.c.id == upload_id, uploads.c.status == UploadStatus.PENDING)
        with self._db.write() as conn:
            ended = conn.execute(change.values(status=status, file_id=file_id)).rowcount == 1
            if ended:
                conn.execute(sa.delete(upload_parts).where(upload_parts.c.upload_id == upload_id))
            return ended

    def begin_part(self, upload_id: str, size: int) -> UploadPart | None:
        """Add a part to a pending upload, before its content is stored; None: it is pending no more."""
        part = UploadPart(id=f"part_{secrets.token_hex(12)}", upload_id=upload_id, bytes=size, created_at=self._clock())
        pending = sa.select(uploads.c.id).where(uploads.c.id == upload_id, uploads.c.status == UploadStatus.PENDING)
        with self._db.write() as conn:
            if conn.execute(pending.with_for_update()).first() is None:
                return None
            conn.execute(sa.insert(upload_parts).values(vars(part)))
        return part

    def parts(self, upload_id: str) -> Sequence[UploadPart]:
        """Return the parts of an upload in the order in which they came."""
        query = sa.select(upload_parts).where(upload_parts.c.upload_id == upload_id)
        with self._db.read() as conn:
            rows = conn.execute(query.order_by(upload_parts.c.created_at, upload_parts.c.id))
            return [UploadPart(**dict(row._mapping)) for row in rows]

    def dead_uploads(self) -> Sequence[Upload]:
        """Return pending uploads of all tenants that have expired."""
        query = sa.select(uploads).where(uploads.c.status == UploadStatus.PENDING)
        with self._db.read() as conn:
            return [_upload(row) for row in conn.execute(query.where(uploads.c.expires_at <= self._clock()))]

    def _seen(self, tenant: str) -> tuple[sa.ColumnElement[bool], ...]:
        alive = files.c.expires_at.is_(None) | (files.c.expires_at > self._clock())
        return files.c.tenant == tenant, files.c.status != FileStatus.UPLOADING, alive


def _file(row: sa.Row[Any]) -> StoredFile:
    values = dict(row._mapping)
    return StoredFile(**values | {"status": FileStatus(values["status"])})


def _upload(row: sa.Row[Any]) -> Upload:
    values = dict(row._mapping)
    return Upload(**values | {"status": UploadStatus(values["status"])})
