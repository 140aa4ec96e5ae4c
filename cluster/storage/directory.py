"""Where datasets, job records, checkpoints and adapters lie: a directory or an S3 bucket, behind the same few verbs.

    storage = open_storage("file:///data/lora")        # or "s3://bucket/prefix"
    storage.put(dataset_key(sha256), Path("rows.jsonl"))

A reader sees an object whole or not at all, also when its writer is killed. What is read is checked against a sha256.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from cluster.storage.base import (
    TEMPORARY,
    Keys,
    Storage,
    StorageConfigError,
    StorageError,
    StorageNotFound,
    checked_key,
    checked_prefix,
    name_file,
    opened,
    sha256_of,
    sync_file,
    sync_folder,
    temporary_file,
    verify,
)
from cluster.storage.s3 import S3Storage

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def open_storage(url: str) -> Storage:
    """Return the storage of `file:///absolute/path` or `s3://bucket/prefix`. Nothing is connected to yet (see
    `Storage.check`).

    Raises:
        StorageConfigError: the URL is of neither form.
    """
    if url.startswith("file://"):
        return DirectoryStorage(url)
    if url.startswith("s3://"):
        return S3Storage(url)
    raise StorageConfigError(f"the storage URL {url!r} must be file:///absolute/path or s3://bucket/prefix")


class DirectoryStorage(Storage):
    """Files below one folder: a laptop's, or of a shared file system with POSIX rename and hard links."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
            raise StorageConfigError(f"the storage URL {url!r} must be file:///absolute/path, with three slashes")
        self.root = Path(unquote(parts.path))

    def put(self, key: str, content: bytes | Path, *, if_absent: bool = False) -> bool:
        target = self.root / checked_key(key)
        with opened(content) as source, self._explained("write", key), temporary_file(target) as file:
            shutil.copyfileobj(source, file, 2**20)
            written = sync_file(file)
            if if_absent:
                try:
                    os.link(written, target)  # a rename would replace
                except FileExistsError:
                    return False
            else:
                written.replace(target)
            sync_folder(target.parent)
        return True

    def get(self, key: str, *, sha256: str | None = None) -> bytes:
        path = self.root / checked_key(key)
        with self._explained("read", key):
            content = path.read_bytes()
        if sha256 is not None:
            verify(f"{self.url}/{key}", hashlib.sha256(content).hexdigest(), sha256)
        return content

    def fetch(self, key: str, path: Path, *, sha256: str | None = None, durable: bool = True) -> None:
        stored = self.root / checked_key(key)
        with self._explained("read", key):
            source = stored.open("rb")
        with source, temporary_file(path) as file:
            shutil.copyfileobj(source, file, 2**20)
            if sha256 is not None:
                verify(f"{self.url}/{key}", sha256_of(file), sha256)
            name_file(file, path, durable=durable)

    def folder(self, prefix: str, sha256s: Mapping[str, str]) -> Path:
        for name, sha256 in sha256s.items():
            with self._explained("read", prefix + name), self.open(prefix + name) as file:
                verify(f"{self.url}/{prefix}{name}", sha256_of(file), sha256)
        return self.root / prefix

    def open(self, key: str) -> BinaryIO:
        path = self.root / checked_key(key)
        with self._explained("read", key):
            return path.open("rb")

    def location(self, key: str) -> str:
        return str(self.root / checked_key(key))

    def exists(self, key: str) -> bool:
        return (self.root / checked_key(key)).is_file()

    def list(self, prefix: str = "") -> Keys:
        top = self.root / checked_prefix(prefix).rpartition("/")[0]
        keys = [
            (Path(folder) / name).relative_to(self.root).as_posix()
            for folder, _, names in os.walk(top)
            for name in names
            if not name.startswith(TEMPORARY)
        ]
        return sorted(key for key in keys if key.startswith(prefix))

    def delete(self, key: str) -> None:
        path = self.root / checked_key(key)
        with self._explained("delete", key):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise StorageConfigError(
                f"this process may not {verb} {error.filename}; change its permissions, or the storage URL {self.url}"
            ) from error
        except OSError as error:
            if error.errno in ABSENT and verb == "read":
                raise StorageNotFound(f"{self.url} has no {key}") from error
            raise StorageError(f"{self.url} cannot {verb} {key}: {error.strerror}") from error
