"""Versions of adapters that are kept on this machine's disk, a folder each, named by the digest of their content."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cluster.storage.base import TEMPORARY

Fetch = Callable[[str], bytes]
"""The file of this name, from the storage."""


class DiskCache:
    """A folder of at most `capacity` bytes, which processes may share: what was used longest ago makes room, but what a
    living process holds. One process at a time fetches a version.

    What is read is checked, so nothing is synced to disk; what is damaged counts as not there.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self._folder, self._capacity = folder, capacity
        self._held: dict[str, int] = {}  # open folders, by digest

    def contents(self, digest: str, sha256s: Mapping[str, str], fetch: Fetch) -> dict[str, bytes]:
        """Return the files of a version, and keep those that had to be fetched where the disk has room for them. Raises
        what `fetch` does.
        """
        files = self._read(digest, sha256s)
        if len(files) == len(sha256s):
            return files
        try:
            with self._fetching(digest):
                files, missing = self._completed(digest, sha256s, fetch)
                if sum(map(len, files.values())) <= self._capacity:
                    self._write(digest, missing)
                    self._make_room()
        except OSError:  # a disk that is full, or cannot be written: the storage has it
            files |= {file: fetch(file) for file in sha256s.keys() - files.keys()}
        return files

    def hold(self, digest: str, sha256s: Mapping[str, str], fetch: Fetch) -> Path:
        """Return the folder with the files of a version, which stays as long as this process lives.

        Raises:
            OSError: they cannot be written; and what `fetch` raises.
        """
        if digest not in self._held:
            with self._fetching(digest):
                self._write(digest, self._completed(digest, sha256s, fetch)[1])
                if digest not in self._held:  # by another thread, meanwhile
                    self._held[digest] = os.open(self._folder / digest, os.O_RDONLY)
                    fcntl.flock(self._held[digest], fcntl.LOCK_SH)
                self._make_room()
        return self._folder / digest

    def _read(self, digest: str, sha256s: Mapping[str, str]) -> dict[str, bytes]:
        """Return those that are there and whole."""
        found = {}
        with contextlib.suppress(OSError):
            os.utime(self._folder / digest)
            for file, sha256 in sha256s.items():
                content = (self._folder / digest / file).read_bytes()
                if hashlib.sha256(content).hexdigest() == sha256:
                    found[file] = content
        return found

    def _completed(
        self, digest: str, sha256s: Mapping[str, str], fetch: Fetch
    ) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """Return all files, and those of them that had to be fetched."""
        files = self._read(digest, sha256s)
        missing = {file: fetch(file) for file in sha256s if file not in files}
        return files | missing, missing

    def _write(self, digest: str, files: Mapping[str, bytes]) -> None:
        for file, content in files.items():
            written = self._folder / digest / f"{TEMPORARY}{uuid.uuid4().hex}"
            try:
                written.write_bytes(content)
                written.replace(self._folder / digest / file)
            finally:
                written.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _fetching(self, digest: str) -> Iterator[None]:
        """Hold others off; the version has a folder, which nobody removes meanwhile."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{digest}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (self._folder / digest).mkdir(exist_ok=True)
            yield

    def _make_room(self) -> None:
        total = 0
        for _, size, folder in sorted(self._versions(), reverse=True):
            total += size
            if total > self._capacity and self._remove(folder):
                total -= size

    def _versions(self) -> Iterator[tuple[int, int, Path]]:
        """(last use, bytes, folder) of each."""
        for folder in self._folder.iterdir():
            if folder.is_symlink() or not folder.is_dir():
                continue
            with contextlib.suppress(FileNotFoundError):  # another process is removing it
                used = folder.stat().st_mtime_ns
                yield used, sum(file.stat().st_size for file in folder.iterdir()), folder

    def _remove(self, folder: Path) -> bool:
        """Return whether it is gone: one that is held, or being fetched elsewhere, stays."""
        with (self._folder / f"{folder.name}.lock").open("w") as lock, contextlib.ExitStack() as stack:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            except OSError:
                return False
        return True
