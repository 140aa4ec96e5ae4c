"""The registry: a reader finds all of a version or nothing, whoever writes, and wherever a writer is killed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.registry import MANIFEST, AdapterNotFound, AdapterRegistry, AdapterVersion, content_digest
from cluster.storage.base import Storage, StorageCorrupt, StorageNotFound
from cluster.storage.directory import open_storage
from cluster.storage.keys import adapter_prefix, alias_key, last_published_key

FILES = {"adapter_config.json": b'{"r": 16}', "adapter_model.safetensors": bytes(range(256)) * 400}
OTHER = {"x": {"sha256": "0" * 64, "size": 1}}
BASE, NAME = "smollm2-135m", "triage"


def content(number: int) -> dict[str, bytes]:
    """Another adapter's files."""
    return FILES | {"adapter_config.json": json.dumps({"r": number}).encode()}


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def manifest_key(version: AdapterVersion, tenant: str = "default") -> str:
    return adapter_prefix(tenant, version.base, version.name, version.version) + MANIFEST


def test_publish_resolve_fetch(storage: Storage, tmp_path: Path) -> None:
    registry = AdapterRegistry(storage, "acme")
    before = time.time()
    published = registry.publish(BASE, NAME, FILES, {"job": "job-1", "base_fingerprint": "f", "metrics": {"loss": 0.5}})
    assert published == registry.resolve(BASE, NAME) == registry.resolve(BASE, NAME, published.version)
    assert registry.fetch(published, tmp_path / "fetched") == tmp_path / "fetched"
    assert read(tmp_path / "fetched") == FILES
    manifest = dict(published.manifest)
    assert before <= manifest.pop("created_at") <= time.time()
    assert manifest == {
        "files": {n: {"sha256": hashlib.sha256(c).hexdigest(), "size": len(c)} for n, c in FILES.items()},
        "digest": published.digest,
        "version": published.digest[:16],
        "base": BASE,
        "name": NAME,
        "tenant": "acme",
        "job": "job-1",
        "base_fingerprint": "f",
        "metrics": {"loss": 0.5},
    }
    assert len(published.digest) == 64


def test_the_version_is_the_content(storage: Storage) -> None:
    registry = AdapterRegistry(storage)
    first = registry.publish(BASE, NAME, FILES, {"job": "job-1"})
    shuffled = dict(reversed(FILES.items()))
    assert content_digest(dict(reversed(first.manifest["files"].items()))) == first.digest
    assert registry.publish(BASE, NAME, shuffled, {"job": "job-2"}) == first  # the first one's manifest stays
    assert registry.publish(BASE, "other", FILES, {}).digest == first.digest
    renamed = {"adapter_config.json": FILES["adapter_config.json"], "other": FILES["adapter_model.safetensors"]}
    others = [registry.publish(BASE, NAME, files, {}) for files in (content(1), renamed)]
    assert len({first.digest, *(other.digest for other in others)}) == 3
    assert sorted(registry.versions(BASE, NAME)) == sorted([first.version, *(other.version for other in others)])


def test_publishing_again_writes_no_file_and_makes_it_the_latest(storage: Storage) -> None:
    registry = AdapterRegistry(storage)
    first = registry.publish(BASE, NAME, content(1), {})
    before = registry.last_published()
    second = registry.publish(BASE, NAME, content(2), {})
    assert registry.resolve(BASE, NAME) == second
    assert registry.digest(BASE, NAME) == second.digest != first.digest == registry.digest(BASE, NAME, first.version)
    assert registry.last_published() != before
    kept = {key: storage.get(key) for key in storage.list("adapters/")}
    written: list[str] = []
    put = storage.put

    def record(key: str, data: bytes | Path, *, if_absent: bool = False) -> bool:
        written.append(key)
        return put(key, data, if_absent=if_absent)

    storage.put = record  # type: ignore[method-assign]
    assert registry.publish(BASE, NAME, content(1), {}) == first == registry.resolve(BASE, NAME)
    assert written == [alias_key("default", BASE, NAME, "latest"), last_published_key("default")]
    assert {key: storage.get(key) for key in storage.list("adapters/")} == kept


def test_readers_never_see_part_of_a_version(storage: Storage, tmp_path: Path) -> None:
    """Two readers, one of the keys and one of the registry, poll while versions appear."""
    registry, versions, done = AdapterRegistry(storage), 12, threading.Event()

    def publish() -> None:
        try:
            for number in range(versions):
                registry.publish(BASE, NAME, content(number), {"number": number})
        finally:
            done.set()

    def watch_keys() -> int:
        seen: set[str] = set()
        while not done.is_set():
            keys = storage.list("adapters/")
            for key in keys:
                if key.endswith(MANIFEST) and key not in seen:
                    files = json.loads(storage.get(key))["files"]
                    for file, entry in files.items():
                        storage.get(key.removesuffix(MANIFEST) + file, sha256=entry["sha256"])
                    seen.add(key)
        return len(seen)

    def watch_latest() -> int:
        seen: set[str] = set()
        while not done.is_set():
            try:
                latest = registry.resolve(BASE, NAME)
            except AdapterNotFound:
                assert not seen
                continue
            assert [entry.base for entry in registry.list_adapters()] == [BASE]
            if latest.version not in seen:
                fetched = registry.fetch(latest, tmp_path / latest.version)
                assert read(fetched) == content(latest.manifest["number"])
                seen.add(latest.version)
        return len(seen)

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(watch_keys), pool.submit(watch_latest)]
        pool.submit(publish).result()
        assert all(reader.result() > 1 for reader in readers)
    assert registry.resolve(BASE, NAME).manifest["number"] == versions - 1


def publish_and_die(url: str, environment: dict[str, str], writes: int) -> None:
    """In a process of its own, which is killed before the next write after so many."""
    os.environ |= environment
    storage, keys = open_storage(url), list[str]()
    put = storage.put

    def put_or_die(key: str, *arguments: Any, **options: Any) -> bool:
        if len(keys) == writes:
            os.kill(os.getpid(), signal.SIGKILL)
        keys.append(key)
        return put(key, *arguments, **options)

    storage.put = put_or_die  # type: ignore[method-assign]
    AdapterRegistry(storage).publish(BASE, NAME, FILES, {"job": "job-1"})


@pytest.mark.parametrize("writes", range(8))
def test_a_publish_killed_anywhere_is_completed_by_the_next(storage: Storage, tmp_path: Path, writes: int) -> None:
    """Killed after 0 to 7 writes: two files, the manifest, its number, the alias, that it is there, and the number
    beside it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cluster.test_registry", "cluster.storage.s3"])
    child = context.Process(target=publish_and_die, args=(storage.url, dict(os.environ), writes))
    child.start()
    child.join(60)
    assert child.exitcode == (-signal.SIGKILL if writes < 7 else 0)
    registry = AdapterRegistry(storage)
    assert len(storage.list()) == writes
    assert len(registry.versions(BASE, NAME)) == (writes > 2)
    if writes < 5:
        assert registry.list_adapters() == []
        with pytest.raises(AdapterNotFound, match="published: nothing yet"):
            registry.resolve(BASE, NAME)
    for version in registry.versions(BASE, NAME):
        registry.fetch(registry.resolve(BASE, NAME, version), tmp_path / version)
        assert read(tmp_path / version) == FILES
    assert (registry.last_published() is None) == (writes < 6)
    published = registry.publish(BASE, NAME, FILES, {"job": "job-1"})
    assert registry.resolve(BASE, NAME) == published
    told = registry.last_published()
    assert told is not None
    assert (told.base, told.name, told.digest) == (BASE, NAME, published.digest)
    assert registry.versions(BASE, NAME) == [published.version]
    assert registry.number(published) == 1 and registry.resolve(BASE, NAME, "1") == published
    assert read(registry.fetch(published, tmp_path / "complete")) == FILES


def test_publishers_of_the_same_content_agree(storage: Storage) -> None:
    barrier = threading.Barrier(6)

    def publish(number: int) -> AdapterVersion:
        registry = AdapterRegistry(open_storage(storage.url))
        barrier.wait()
        return registry.publish(BASE, NAME, FILES, {"number": number})

    with ThreadPoolExecutor(6) as pool:
        published = list(pool.map(publish, range(6)))
    assert all(version == published[0] for version in published)
    assert AdapterRegistry(storage).resolve(BASE, NAME) == published[0]


def test_a_damaged_file_is_refused(storage: Storage, tmp_path: Path) -> None:
    registry = AdapterRegistry(storage)
    version = registry.publish(BASE, NAME, FILES, {})
    key = manifest_key(version).replace(MANIFEST, "adapter_model.safetensors")
    storage.put(key, FILES["adapter_model.safetensors"][:-1] + b"x")
    with pytest.raises(StorageCorrupt, match=r"adapter_model\.safetensors is damaged"):
        registry.fetch(version, tmp_path / "fetched")
    assert not (tmp_path / "fetched" / "adapter_model.safetensors").exists()
    with pytest.raises(StorageCorrupt, match=r"adapter_model\.safetensors is damaged"), registry.files(version):
        pass
    storage.delete(key)
    with pytest.raises(StorageNotFound, match=r"adapter_model\.safetensors"):
        registry.fetch(version, tmp_path / "fetched")


@pytest.mark.parametrize(
    "damage",
    [
        lambda manifest: b"",
        lambda manifest: json.dumps(manifest).encode()[:-5],
        lambda manifest: b"[]",
        lambda manifest: json.dumps(manifest | {"digest": "0" * 64}).encode(),
        lambda manifest: json.dumps({key: value for key, value in manifest.items() if key != "files"}).encode(),
        lambda manifest: json.dumps(manifest | {"files": {}}).encode(),
        lambda manifest: json.dumps(manifest | {"files": OTHER}).encode(),
        lambda manifest: json.dumps(manifest | {"files": OTHER, "digest": content_digest(OTHER)}).encode(),
    ],
)
def test_a_damaged_manifest_is_refused(storage: Storage, damage: Any) -> None:
    registry = AdapterRegistry(storage)
    version = registry.publish(BASE, NAME, FILES, {})
    storage.put(manifest_key(version), damage(version.manifest))
    with pytest.raises(StorageCorrupt, match=r"manifest\.json is damaged"):
        registry.resolve(BASE, NAME)


def test_a_manifest_cannot_point_outside(storage: Storage, tmp_path: Path) -> None:
    registry = AdapterRegistry(storage)
    version = registry.publish(BASE, NAME, FILES, {})
    for file in ("../../stolen", "/tmp/stolen", ".."):
        evil = AdapterVersion(BASE, NAME, version.version, "", {"files": {file: {"sha256": "", "size": 0}}})
        with pytest.raises(ValueError, match="is no storage key"):
            registry.fetch(evil, tmp_path / "fetched")


def test_what_is_missing_is_answered_with_what_exists(storage: Storage) -> None:
    registry = AdapterRegistry(storage)
    with pytest.raises(AdapterNotFound, match=r"there is no adapter a:b; published: nothing yet$"):
        registry.resolve("a", "b")
    version = registry.publish(BASE, NAME, FILES, {})
    registry.publish("Qwen/7B", "x", FILES, {})
    for base, name in ((BASE, "triag"), ("other", NAME), (BASE, ""), ("", ""), (BASE, "x" * 3000), ("..", "..")):
        with pytest.raises(AdapterNotFound) as caught:
            registry.resolve(base, name)
        assert caught.value.known == ("Qwen/7B:x", f"{BASE}:{NAME}")
        assert str(caught.value) == f"there is no adapter {base}:{name}; published: Qwen/7B:x, {BASE}:{NAME}"
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (str(copy), copy.known) == (str(caught.value), caught.value.known)
    for wanted, known in (
        ("version " + "0" * 16, version.version), ("version 2", version.version), ("version or alias ..", "latest"),
        (f"version or alias {version.version[:8]}", "latest"),
    ):  # fmt: skip
        with pytest.raises(AdapterNotFound, match=f"there is no {wanted} of {BASE}:{NAME}; published: {known}$"):
            registry.resolve(BASE, NAME, wanted.split()[-1])
    many = AdapterNotFound("adapter x", tuple(f"n{number}" for number in range(33)))
    assert str(many).endswith(", n19 and 13 more")


def test_bad_publishes_are_refused_before_anything_is_written(storage: Storage) -> None:
    registry = AdapterRegistry(storage)
    for files, manifest, complaint in (
        ({}, {}, "has no files"),
        ({"a/b": b""}, {}, "plain name"),
        ({MANIFEST: b""}, {}, "plain name"),
        (FILES, {"files": {}, "digest": ""}, "digest, files are written by the registry"),
    ):
        with pytest.raises(ValueError, match=complaint):
            registry.publish(BASE, NAME, files, manifest)
    assert storage.list() == []


def test_tenants_do_not_see_each_other(storage: Storage) -> None:
    one, other = AdapterRegistry(storage, "one"), AdapterRegistry(storage, "other")
    version = one.publish(BASE, NAME, FILES, {})
    assert other.list_adapters() == []
    with pytest.raises(AdapterNotFound):
        other.resolve(BASE, NAME)
    with pytest.raises(AdapterNotFound):
        other.resolve(BASE, NAME, version.version)


def test_odd_names(storage: Storage, tmp_path: Path) -> None:
    registry, names = AdapterRegistry(storage, "a/b ü"), [("Qwen 2.5/7B:x", "a"), ("..", "b"), ("日本%2F", "latest")]
    for base, name in names:
        version = registry.publish(base, name, FILES, {})
        assert registry.resolve(base, name) == version
        assert read(registry.fetch(version, tmp_path / version.base.replace("/", "") / "f")) == FILES
    assert [(entry.base, entry.name) for entry in registry.list_adapters()] == sorted(names)


def test_listing_costs_one_read_an_adapter(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = AdapterRegistry(storage)
    latest = {
        (BASE, f"adapter-{number}"): [registry.publish(BASE, f"adapter-{number}", content(i), {}) for i in range(3)][-1]
        for number in range(4)
    }
    calls: Counter[str] = Counter()

    def counted(verb: str) -> Callable[..., Any]:
        original = getattr(storage, verb)

        def call(*arguments: Any, **options: Any) -> Any:
            calls[verb] += 1
            return original(*arguments, **options)

        return call

    for verb in ("get", "list", "exists", "fetch"):
        monkeypatch.setattr(storage, verb, counted(verb))
    entries = registry.list_adapters()
    assert calls == {"list": 1, "get": 4}
    assert {(entry.base, entry.name): (entry.version, entry.digest, entry.created_at) for entry in entries} == {
        names: (version.version, version.digest, version.manifest["created_at"]) for names, version in latest.items()
    }


def test_registries_pickle(storage: Storage) -> None:
    registry = AdapterRegistry(storage)
    version = registry.publish(BASE, NAME, FILES, {})
    assert pickle.loads(pickle.dumps(registry)).resolve(BASE, NAME) == version
