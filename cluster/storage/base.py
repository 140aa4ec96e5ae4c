"""The verbs that a directory and a bucket share, their errors, and how content is opened, hashed and written whole."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, cast

TEMPORARY = ".tmp-"  # files being written start like this; no part of a key does

Keys = list[str]  # as in Storage, `list` is a verb


class StorageError(Exception):
    """Base of what storage raises. All carry one message, so that they pass between processes."""


class StorageConfigError(StorageError, ValueError):
    """The user has something to change: URL, bucket, credentials or permissions."""


class StorageUnavailable(StorageError):  # noqa: N818
    """The store does not answer; the same call may succeed later."""


class StorageNotFound(StorageError):  # noqa: N818
    """There is no object of this key."""


class StorageCorrupt(StorageError):  # noqa: N818
    """The content is not what was written."""


class Storage(ABC):
    """Objects by key. Keys are parts joined by "/"; no part is empty, ".", "..", or starts with ".tmp-".

    Storages pickle (by URL) and may be shared between threads. Every verb may raise StorageError, mostly its kinds
    StorageConfigError and StorageUnavailable.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return type(self), (self.url,)

    @abstractmethod
    def put(self, key: str, content: bytes | Path, *, if_absent: bool = False) -> bool:
        """Write the object, all or nothing, in place of an older one; True if it was written.

        With `if_absent`, nothing is written and False comes back where the object exists; of several writers one gets
        True. S3 takes at most 5 GiB that way.
        """

    @abstractmethod
    def get(self, key: str, *, sha256: str | None = None) -> bytes:
        """Return the content.

        Raises:
            StorageNotFound: there is no such object.
            StorageCorrupt: the content's sha256 (hex) is not `sha256`, or not what S3 keeps beside the object.
        """

    @abstractmethod
    def fetch(self, key: str, path: Path, *, sha256: str | None = None, durable: bool = True) -> None:
        """Copy what `get` returns into a file that appears, or is replaced, only once all is there and checked; after a
        crash of the machine too, where it is `durable`.
        """

    @abstractmethod
    def folder(self, prefix: str, sha256s: Mapping[str, str]) -> Path | None:
        """Return the folder that has these objects below `prefix`, by name with the sha256 (hex) of each, as files of
        this machine; None where there is none. Raises what `get` does.
        """

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """Return the content as a stream, unchecked, for what is too large for memory. Raises StorageNotFound."""

    @abstractmethod
    def location(self, key: str) -> str:
        """Return where an object lies, in words that another process can fetch it by: a path, or an s3:// URL."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Return whether `get` would find it."""

    @abstractmethod
    def list(self, prefix: str = "") -> Keys:
        """Return every key that starts with `prefix`, sorted."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; none there is fine."""

    def check(self) -> None:
        """Show that this process can write, and that of two conditional writes one loses (some stores let both win).

        For the start of a process that writes, before there is work to lose.
        """
        probe = f"probes/{uuid.uuid4().hex}"
        answers = [self.put(probe, b"", if_absent=True) for _ in range(2)]
        self.delete(probe)
        if answers != [True, False]:
            raise StorageConfigError(
                f"{self.url} ignores If-None-Match, so two writers could both win;"
                " use a store with conditional writes (AWS S3, MinIO, SeaweedFS 4.17 or newer)"
            )


def checked_key(key: str) -> str:
    """Return the key, or raise ValueError: keys come from users too, and must stay below the storage's root."""
    for part in key.split("/"):
        if part in ("", ".", "..") or part.startswith(TEMPORARY):
            raise ValueError(f"{key!r} is no storage key: {part!r} cannot be one of its parts")
    return key


def checked_prefix(prefix: str) -> str:
    """Check likewise the beginning of a key, which may be empty or end anywhere."""
    if prefix.rstrip("/"):
        checked_key(prefix.rstrip("/"))
    return prefix


def opened(content: bytes | Path) -> BinaryIO:
    return content.open("rb") if isinstance(content, Path) else io.BytesIO(content)


def sha256_of(source: BinaryIO) -> str:
    """Hash all of it; it is back at its beginning afterwards."""
    source.seek(0)
    digest = hashlib.file_digest(cast(io.BytesIO, source), "sha256").hexdigest()
    source.seek(0)
    return digest


def hashed(parts: Iterable[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    """Yield the parts, each of which another thread hashes while it is used."""
    with ThreadPoolExecutor(1) as hasher:
        for part in parts:
            hashing = hasher.submit(digest.update, part)
            yield part
            hashing.result()


def put_by_content(storage: Storage, path: Path, key: Callable[[str], str]) -> str:
    """Write a file where the sha256 of its content says, unless it is there; returns that."""
    with path.open("rb") as file:
        sha256 = sha256_of(file)
    storage.put(key(sha256), path, if_absent=True)
    return sha256


def verify(what: str, actual: str, expected: str | None) -> None:
    """Raise StorageCorrupt where two hashes differ."""
    if expected is not None and actual != expected:
        raise StorageCorrupt(f"{what} is damaged: its sha256 is {actual}, not {expected}; restore it or write it again")


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk: a synced file whose name a crash forgets is lost too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_folder(folder: Path) -> None:
    """Make a folder as mkdir -p does, durably."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


@contextlib.contextmanager
def temporary_file(target: Path) -> Iterator[BinaryIO]:
    """Open a new file in the folder of `target`, which is made; removed afterwards unless it was renamed."""
    _make_folder(target.parent)
    path = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with path.open("xb+") as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def sync_file(file: BinaryIO) -> Path:
    """Put a file's content on disk, and return its path: renamed before that, a crash can leave an empty file."""
    file.flush()
    os.fsync(file.fileno())
    return Path(file.name)


def name_file(file: BinaryIO, path: Path, *, durable: bool) -> None:
    """Give a file that is whole its name, in place of another."""
    if durable:
        sync_file(file)
    file.flush()
    Path(file.name).replace(path)
