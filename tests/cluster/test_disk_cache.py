"""Files of a bucket on disk: bounded, checked, and shared by processes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cluster.registry import AdapterRegistry
from cluster.storage.directory import open_storage
from cluster.storage.disk_cache import DiskCache


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_what_was_used_longest_ago_makes_room_and_what_is_damaged_counts_as_gone(tmp_path: Path) -> None:
    contents = [bytes([n]) * 10 for n in range(4)]
    names = [sha(content) for content in contents]
    cache, other = DiskCache(tmp_path / "cache", 30), DiskCache(tmp_path / "cache", 30)
    assert cache.get(names[0]) is None
    for age, (name, content) in enumerate(zip(names[:3], contents, strict=False)):
        cache.put(name, content)
        os.utime(tmp_path / "cache" / name, (age, age))
    assert other.get(names[0]) == contents[0]
    other.put(names[3], contents[3])
    assert [cache.get(name) is not None for name in names] == [True, False, True, True]
    (tmp_path / "cache" / names[2]).write_bytes(b"damaged")
    assert cache.get(names[2]) is None and len(list((tmp_path / "cache").iterdir())) == 2
    cache.put(sha(b"x" * 31), b"x" * 31)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_version_is_fetched_once(tmp_path: Path) -> None:
    registry, cache = AdapterRegistry(open_storage((tmp_path / "s").as_uri())), DiskCache(tmp_path / "cache", 100)
    files = {"a": b"1", "b": b"22"}
    version = registry.publish("tiny", "name", files, {})
    assert registry.contents(version, cache) == registry.contents(version) == files
    for path in (tmp_path / "s" / "adapters").rglob("[ab]"):
        path.unlink()
    assert registry.contents(version, cache) == files
