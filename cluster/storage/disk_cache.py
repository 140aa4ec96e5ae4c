"""Versions of adapters that are kept on this machine's disk, a folder each, named by the digest of their content."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cluster.storage.base import sha256_of

Fetch = Callable[[str, Path], None]
"""Copies the file of this name from the storage to a path, checked."""


class DiskCache:
    """A folder of at most `capacity` bytes, which processes may share: what was used longest ago makes room, but what
    somebody is using. One process at a time fetches a version.

    What is there is checked when it is used next, so nothing is synced to disk; what is damaged counts as not there.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self._folder, self._capacity = folder, capacity
        self._held: dict[str, int] = {}  # open folders, by digest

    @contextlib.contextmanager
    def using(self, digest: str, sha256s: Mapping[str, str], fetch: Fetch) -> Iterator[Path]:
        """Yield the folder with the files of a version, which stays as long as the block lasts.

        Raises:
            OSError: they cannot be written; and what `fetch` raises.
        """
        handle = self._open(digest, sha256s, fetch)
        try:
            yield self._folder / digest
        finally:
            os.close(handle)
            with contextlib.suppress(OSError):
                self._make_room()

    def hold(self, digest: str, sha256s: Mapping[str, str], fetch: Fetch) -> Path:
        """Return that folder, which stays as long as this process lives. Raises what `using` does."""
        if digest not in self._held:
            handle = self._open(digest, sha256s, fetch)
            if self._held.setdefault(digest, handle) != handle:  # by another thread, meanwhile
                os.close(handle)
            self._make_room()
        return self._folder / digest

    def _open(self, digest: str, sha256s: Mapping[str, str], fetch: Fetch) -> int:
        """Return the open folder of a version that is whole, which nobody removes until it is closed."""
        folder = self._folder / digest
        with self._fetching(digest):
            for file, sha256 in sha256s.items():
                if not _is_whole(folder / file, sha256):
                    fetch(file, folder / file)
            os.utime(folder)
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_SH)
        return handle

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


def _is_whole(file: Path, sha256: str) -> bool:
    try:
        with file.open("rb") as content:
            return sha256_of(content) == sha256
    except OSError:
        return False
