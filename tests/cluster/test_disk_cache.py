"""Versions on disk: bounded, checked, fetched once, and shared by processes, none of which loses what it holds."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from cluster.registry import AdapterRegistry, AdapterVersion
from cluster.storage.directory import open_storage
from cluster.storage.disk_cache import DiskCache


class Counted:
    """A registry of versions of ten bytes each, and what was read of its storage."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        storage = open_storage(folder.as_uri())
        self.registry, self.fetched, fetch = AdapterRegistry(storage), [], storage.fetch
        self.versions = [self.registry.publish("tiny", "name", self.files(n), {}) for n in range(4)]

        def counting(key: str, path: Path, **options: Any) -> None:
            self.fetched.append(key.rpartition("/")[2])
            fetch(key, path, **options)

        monkeypatch.setattr(storage, "fetch", counting)
        monkeypatch.setattr(storage, "folder", lambda prefix, sha256s: None)  # as of a bucket

    @staticmethod
    def files(n: int) -> dict[str, bytes]:
        return {"a": bytes([n]) * 4, "b": bytes([n]) * 6}

    def read(self, n: int, cache: DiskCache) -> list[str]:
        """What had to be fetched for it."""
        self.fetched.clear()
        with self.registry.files(self.versions[n], cache) as folder:
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == self.files(n)
        return sorted(self.fetched)


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(tmp_path / "storage", monkeypatch)


def used(folder: Path, version: AdapterVersion, at: int) -> Path:
    os.utime(folder / version.digest, (at, at))
    return folder / version.digest


def test_what_was_used_longest_ago_makes_room_and_what_is_damaged_counts_as_gone(
    counted: Counted, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    cache, other = DiskCache(folder, 30), DiskCache(folder, 30)
    for n in range(3):
        assert counted.read(n, cache) == ["a", "b"] and counted.read(n, other) == []
        used(folder, counted.versions[n], n)
    assert counted.read(0, other) == []  # and so it was used last
    assert counted.read(3, other) == ["a", "b"]
    assert [(folder / version.digest).exists() for version in counted.versions] == [True, False, True, True]
    (folder / counted.versions[2].digest / "b").write_bytes(b"damaged")
    assert counted.read(2, cache) == ["b"] and counted.read(2, cache) == []
    small = DiskCache(tmp_path / "small", 9)
    assert counted.read(0, small) == counted.read(0, small) == ["a", "b"]
    (tmp_path / "file").touch()
    assert counted.read(0, DiskCache(tmp_path / "file" / "cache", 30)) == ["a", "b"]  # that cannot be written


def test_what_a_process_holds_stays_and_is_fetched_once(counted: Counted, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    caches, together = [DiskCache(folder, 10) for _ in range(2)], threading.Barrier(4)

    def hold(cache: DiskCache) -> None:
        together.wait()
        assert counted.registry.hold(counted.versions[0], cache) == folder / counted.versions[0].digest

    threads = [threading.Thread(target=hold, args=(cache,)) for cache in caches * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counted.fetched) == ["a", "b"]
    held = used(folder, counted.versions[0], 0)
    for n in (1, 2):
        assert counted.read(n, caches[1]) == ["a", "b"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(
        counted.versions[n].digest for n in (0, 2)
    )
    assert {path.name: path.read_bytes() for path in held.iterdir()} == counted.files(0)
