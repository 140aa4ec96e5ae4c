"""Files of a bucket that are kept on this machine's disk, by the sha256 of their content."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

from cluster.storage.base import TEMPORARY


class DiskCache:
    """A folder of at most `capacity` bytes, which processes may share: what was used longest ago makes room.

    What is read is checked, so nothing is synced to disk; what is damaged or cannot be written counts as not there.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self._folder, self._capacity = folder, capacity

    def get(self, sha256: str) -> bytes | None:
        """Return the content, or None where it is not there."""
        path = self._folder / sha256
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        if hashlib.sha256(content).hexdigest() == sha256:
            return content
        path.unlink(missing_ok=True)
        return None

    def put(self, sha256: str, content: bytes) -> None:
        """Keep it, if it is not larger than the whole folder may be."""
        if len(content) > self._capacity:
            return
        written = self._folder / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            written.write_bytes(content)
            written.replace(self._folder / sha256)
            self._make_room()
        except OSError:  # a disk that is full: the bucket has it
            written.unlink(missing_ok=True)

    def _make_room(self) -> None:
        files = sorted(self._files(), key=lambda file: file[1].st_mtime, reverse=True)
        total = 0
        for path, status in files:
            total += status.st_size
            if total > self._capacity:
                path.unlink(missing_ok=True)

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                try:
                    found.append((Path(entry.path), entry.stat()))
                except FileNotFoundError:  # another process has just removed it
                    continue
        return found
