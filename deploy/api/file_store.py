"""What is uploaded: on this machine's disk while it comes, checked there, and then in storage.

    with store.spool() as spooled:
        ...                                              bytes are written to it
        file = await store.keep(tenant, new, spooled, sha256)
    location = await store.dataset_of(tenant, file.id)   what a job takes as its dataset

The row of a file is there before its content, and shown when that is there too: of what is stopped half-way nothing is
seen, and `sweep` removes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, TypeVar, cast

from cluster.storage.base import Storage, StorageNotFound
from cluster.storage.keys import file_key, upload_part_key, upload_prefix
from deploy.api.errors import ApiError
from jobs.store.files import FileStatus, FileTable, StoredFile, Upload, UploadPart, UploadStatus
from lora_core.data.check import FileCheck, check_file, out_of_memory
from lora_core.data.files import SUFFIXES, has_lines

log = logging.getLogger("ray.serve.lora")

_SWEEP_SECONDS = 60.0
_SMALL_BYTES = 2**20  # that do not wait for larger files; another process takes half a second to start
_READ_BYTES = 2**20
_MOVERS = 8  # files whose bytes go to storage or come from it at a time: minutes, for some

T = TypeVar("T")


@dataclass(frozen=True)
class NewFile:
    """What a client says of a file; it lives `seconds`, where that is given."""

    filename: str
    purpose: str
    seconds: int | None


class FileStore:
    """The files of one service. `folder` is on a disk of this machine."""

    def __init__(self, table: FileTable, storage: Storage, folder: Path) -> None:
        self.table = table
        self._storage, self._folder = storage, folder
        self._checking = asyncio.Semaphore(1)  # of large files, which takes all cores
        self._checking_small = asyncio.Semaphore(2)
        self._movers = ThreadPoolExecutor(_MOVERS, "files")
        folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()

    @contextlib.contextmanager
    def spool(self) -> Iterator[BinaryIO]:
        """Yield a new file, which goes at the end."""
        with tempfile.NamedTemporaryFile(dir=self._folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield cast(BinaryIO, file)

    async def keep(self, tenant: str, new: NewFile, spooled: BinaryIO, sha256: str) -> StoredFile:
        """Check a file whose bytes are all there, and put it into storage.

        Raises:
            StorageError, DatabaseUnavailableError: it is not kept.
        """
        path = Path(spooled.name)
        await asyncio.to_thread(spooled.flush)
        size = path.stat().st_size
        check = await self._check(path, new.filename, size)
        begin = (tenant, new.filename, new.purpose, size, sha256, new.seconds)
        file = await asyncio.to_thread(self.table.begin, *begin)
        try:
            await self._moved(self._storage.put, self._key(file), path)
            status = FileStatus.ERROR if check.problems else FileStatus.PROCESSED
            await asyncio.to_thread(self.table.finish, file.id, status, check.details)
        except BaseException:
            with contextlib.suppress(Exception):  # else `sweep` does it
                await asyncio.to_thread(self.delete, file)
            raise
        return await self.file(tenant, file.id)

    async def file(self, tenant: str, file_id: str, param: str = "file_id") -> StoredFile:
        """Return a tenant's file. Raises ApiError (404)."""
        file = await asyncio.to_thread(self.table.file, tenant, file_id)
        if file is None:
            raise ApiError(404, f"there is no file {file_id!r}; see /v1/files", "file_not_found", param)
        return file

    async def dataset_of(self, tenant: str, file_id: str, param: str = "training_file") -> str:
        """Return what `JobSpec.dataset` takes for a tenant's file: where it lies in storage.

        Raises:
            ApiError: there is no such file (404), or its rows have mistakes (400).
        """
        file = await self.file(tenant, file_id, param)
        if file.status is not FileStatus.PROCESSED:
            message = f"the file {file_id} has mistakes, see its status_details: correct them and upload it again"
            raise ApiError(400, message, "invalid_file", param)
        return self._storage.location(self._key(file))

    def content(self, file: StoredFile) -> Iterator[bytes]:
        """Yield a file's content in pieces. Raises ApiError (404): it has just been deleted."""
        try:
            stream = self._storage.open(self._key(file))
        except StorageNotFound:
            raise ApiError(404, f"the content of {file.id} is gone", "file_not_found", "file_id") from None
        return _pieces(stream)

    def delete(self, file: StoredFile) -> None:
        """Remove the content, then the row that leads to it."""
        self._storage.delete(self._key(file))
        self.table.delete(file.id)

    async def put_part(self, upload: Upload, spooled: BinaryIO, size: int) -> UploadPart | None:
        """Store a part of an upload; None where that is pending no more."""
        return await self._moved(self._put_part, upload, spooled, size)

    async def join_parts(self, upload: Upload, part_ids: list[str], target: BinaryIO) -> tuple[str, str]:
        """Write the parts of an upload to `target`, one behind the other; return the whole's md5 and sha256."""
        return await self._moved(self._join_parts, upload, part_ids, target)

    def end_upload(self, upload: Upload, status: UploadStatus, file_id: str | None = None) -> bool:
        """Complete or cancel an upload, and remove its parts; False: somebody else has done so."""
        ended = self.table.end_upload(upload.id, status, file_id)
        for key in self._storage.list(upload_prefix(upload.tenant, upload.id)):
            self._storage.delete(key)
        return ended

    async def sweep(self) -> None:
        """Remove what has expired or was left half-way, for ever."""
        while True:
            try:
                for file in await asyncio.to_thread(self.table.dead_files):
                    await asyncio.to_thread(self.delete, file)
                for upload in await asyncio.to_thread(self.table.dead_uploads):
                    await asyncio.to_thread(self.end_upload, upload, UploadStatus.CANCELLED)
            except Exception as error:  # whatever it is, it is tried again
                log.warning("event=sweep_failed error=%r", error)
            await asyncio.sleep(_SWEEP_SECONDS)

    async def _moved(self, move: Callable[..., T], *arguments: object) -> T:
        """Await what moves a file's bytes, in threads that nothing else waits for."""
        return await asyncio.get_running_loop().run_in_executor(self._movers, move, *arguments)

    def _put_part(self, upload: Upload, spooled: BinaryIO, size: int) -> UploadPart | None:
        spooled.flush()
        part = self.table.begin_part(upload.id, size)
        if part is None:
            return None
        key = upload_part_key(upload.tenant, upload.id, part.id)
        self._storage.put(key, Path(spooled.name))
        if part not in self.table.parts(upload.id):  # who ended the upload meanwhile did not see it in storage
            self._storage.delete(key)
            return None
        return part

    def _join_parts(self, upload: Upload, part_ids: list[str], target: BinaryIO) -> tuple[str, str]:
        md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        for part_id in part_ids:
            for piece in _pieces(self._storage.open(upload_part_key(upload.tenant, upload.id, part_id))):
                md5.update(piece)
                sha256.update(piece)
                target.write(piece)
        return md5.hexdigest(), sha256.hexdigest()

    def _key(self, file: StoredFile) -> str:
        return file_key(file.tenant, file.id, file.suffix if file.suffix in SUFFIXES else "")

    async def _check(self, path: Path, name: str, size: int) -> FileCheck:
        """Find a file's mistakes: here where it is small and has a row a line, else in a process for which answers do
        not wait, and without which they go on where it runs out of memory.
        """
        small = size <= _SMALL_BYTES
        if small and await asyncio.to_thread(has_lines, path, PurePath(name).suffix):
            return await asyncio.to_thread(check_file, path, name)
        command = [sys.executable, "-m", "lora_core.data.check", str(path), "--name", name]
        async with self._checking_small if small else self._checking:
            process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            try:
                output, _ = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
        if not output:
            log.warning("event=check_stopped file=%r bytes=%d status=%s", name, size, process.returncode)
        return FileCheck(**json.loads(output)) if output else out_of_memory(name)

    def _remove_leftovers(self) -> None:
        """Remove files that nobody has open: a process that is killed leaves them."""
        for path in self._folder.iterdir():
            with contextlib.suppress(BlockingIOError, FileNotFoundError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    with contextlib.closing(stream):
        while piece := stream.read(_READ_BYTES):
            yield piece
