"""Numbers, aliases and what becomes of versions: by many publishers at once, and noticed by who serves."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import adapter_lifecycle
from cluster.adapter_lifecycle import (
    AdapterConflict,
    delete_adapter,
    delete_version,
    drop_old_versions,
    promote,
    roll_back,
)
from cluster.aliases import HISTORY, Gate
from cluster.registry import LATEST, AdapterNotFound, AdapterRegistry, AdapterVersion
from cluster.settings import Settings
from cluster.storage.base import Storage, StorageUnavailable
from cluster.storage.directory import open_storage
from deploy.api.adapter_names import AdapterNames

BASE, NAME = "tiny", "a"
PROCESSES, OWN, SHARED = 8, 2, 1


def publish(registry: AdapterRegistry, content: int, **metrics: Any) -> AdapterVersion:
    return registry.publish(BASE, NAME, {"weights": str(content).encode()}, {"metrics": metrics})


def publish_many(url: str, environment: dict[str, str], number: int, ready: Any, answers: Any) -> None:
    """In a process of its own: contents that no other has, and some that all have."""
    os.environ |= environment
    registry = AdapterRegistry(open_storage(url))
    ready.wait(60)
    contents = [*range(SHARED), *range(100 * (number + 1), 100 * (number + 1) + OWN)]
    published = [publish(registry, content) for content in contents]
    answers.put([(version.version, version.number) for version in published])


def test_numbers_are_dense_whoever_publishes_at_once(storage: Storage) -> None:
    """The same content has one number, whichever of its publishers gave it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cluster.test_adapter_lifecycle", "cluster.storage.s3"])
    ready, answers = context.Barrier(PROCESSES), context.Queue()
    arguments = [(storage.url, dict(os.environ), number, ready, answers) for number in range(PROCESSES)]
    workers = [context.Process(target=publish_many, args=one, daemon=True) for one in arguments]
    for worker in workers:
        worker.start()
    published = dict(pair for _ in workers for pair in answers.get(timeout=60))
    assert sorted(published.values()) == list(range(1, PROCESSES * OWN + SHARED + 1))
    registry = AdapterRegistry(storage)
    assert [(version.version, version.number) for version in registry.list_versions(BASE, NAME)] == sorted(
        published.items(), key=lambda pair: pair[1]
    )
    for version, number in published.items():
        assert registry.resolve(BASE, NAME, str(number)).version == version
    assert publish(registry, 0).number == published[publish(registry, 0).version]


def test_an_alias_moves_and_rolls_back_if_what_it_moves_to_passes(storage: Storage) -> None:
    registry = AdapterRegistry(storage)
    good, bad, better, blind = (
        publish(registry, 1, loss=0.5, accuracy=0.9), publish(registry, 2, loss=0.7, accuracy=0.9),
        publish(registry, 3, loss=0.4, accuracy=0.95), publish(registry, 4, accuracy=math.nan),
    )  # fmt: skip
    gates = [Gate("loss", max=0.5), Gate("accuracy", min=0.9)]
    promote(registry, good, "prod", gates)
    assert registry.resolve(BASE, NAME, "prod") == good and registry.digest(BASE, NAME, "prod") == good.digest
    for version, problems in (
        (bad, "tiny:a@2 does not become tiny:a@prod: its loss is 0.7, which has to be at most 0.5"),
        (blind, "it records no loss .but accuracy.; its accuracy is nan, which has to be at least 0.9"),
    ):
        with pytest.raises(AdapterConflict, match=problems):
            promote(registry, version, "prod")
    assert registry.resolve(BASE, NAME, "prod") == good
    promote(registry, registry.resolve(BASE, NAME, better.version), "prod")
    (entry,) = registry.list_adapters()
    assert (entry.number, entry.aliases["prod"].number) == (4, 3)
    assert roll_back(registry, BASE, NAME, "prod").meaning == good.meaning
    with pytest.raises(AdapterConflict, match="has meant no other version that is still there"):
        roll_back(registry, BASE, NAME, "prod")
    promote(registry, bad, "prod", [])
    promote(registry, better, "prod")
    delete_version(registry, bad)
    assert roll_back(registry, BASE, NAME, "prod").meaning.number == 1, "not to what was deleted"
    assert roll_back(registry, BASE, NAME, LATEST).meaning.number == 3
    for name in ("7", "Prod", "a" * 16, "a/b", ""):
        with pytest.raises(AdapterConflict, match="cannot be an alias"):
            promote(registry, good, name)
    for content in range(10, 12 + HISTORY):
        publish(registry, content)
    assert len(registry.alias(BASE, NAME, LATEST).former) == HISTORY


def test_a_version_is_not_deleted_while_an_alias_means_it(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = AdapterRegistry(storage)
    first, second, third = (publish(registry, content) for content in (1, 2, 3))
    promote(registry, first, "prod")
    for version, alias in ((first, "prod"), (third, "latest")):
        with pytest.raises(AdapterConflict, match=f"@{version.number} is not deleted while it is {alias} of tiny:a"):
            delete_version(registry, version)
    with pytest.raises(AdapterConflict, match="is not deleted while there is tiny:a@prod; delete that first"):
        delete_adapter(registry, BASE, NAME)

    refuse, asked = adapter_lifecycle._refuse_named, list[str]()

    def meanwhile(registry: AdapterRegistry, version: AdapterVersion) -> None:
        """Between the two looks somebody promotes it, who finds the manifest gone, or comes just too late for that."""
        asked.append(version.version)
        if len(asked) == 2:
            with pytest.raises(AdapterConflict, match="has just been deleted"):
                promote(registry, second, "canary")
            registry.move("canary", second)
        refuse(registry, version)

    monkeypatch.setattr(adapter_lifecycle, "_refuse_named", meanwhile)
    with pytest.raises(AdapterConflict, match="it is canary"):
        delete_version(registry, second)
    monkeypatch.undo()
    assert registry.resolve(BASE, NAME, "canary") == registry.resolve(BASE, NAME, "2") == second
    assert registry.contents(second) == {"weights": b"2"}
    for alias in ("canary", "prod"):
        registry.delete_alias(BASE, NAME, alias)
    delete_version(registry, second)
    with pytest.raises(AdapterNotFound, match="there is no version 2 of tiny:a"):
        registry.digest(BASE, NAME, "2")
    assert publish(registry, 4).number == 4, "a number is never given again"
    delete_adapter(registry, BASE, NAME)
    assert storage.list("adapters/") == storage.list("aliases/") == []
    with pytest.raises(AdapterNotFound):
        delete_adapter(registry, BASE, NAME)


def test_who_publishes_and_who_deletes_at_once_leave_all_or_nothing(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each comes between two steps of the other; and a deletion that is interrupted can be asked for again."""
    registry, another = AdapterRegistry(storage), AdapterRegistry(open_storage(storage.url))
    first, second = publish(registry, 1), publish(registry, 2)

    def meanwhile(owner: Any, verb: str, work: Callable[[], object], part: str = "") -> None:
        """Do this once, before the next call of `verb` for a key with `part`."""
        real = getattr(owner, verb)

        def call(*arguments: Any, **options: Any) -> Any:
            if part in str(arguments[0]):
                monkeypatch.setattr(owner, verb, real)
                work()
            return real(*arguments, **options)

        monkeypatch.setattr(owner, verb, call)

    def whole(version: AdapterVersion) -> bool:
        return registry.contents(registry.resolve(BASE, NAME, version.version)).keys() == {"weights"}

    meanwhile(registry, "move", lambda: delete_version(another, first))
    first = publish(registry, 1)
    assert first == registry.resolve(BASE, NAME) and whole(first)
    assert registry.number(registry.resolve(BASE, NAME, "1")) == 1
    meanwhile(storage, "delete", lambda: publish(another, 2), "/weights")
    delete_version(registry, second)
    assert registry.digest(BASE, NAME) == second.digest and whole(second)

    storage.delete(registry.prefix(first) + "weights")
    assert whole(publish(registry, 1)), "publishing again completes it"
    publish(registry, 3)
    for version in (registry.resolve(BASE, NAME, "2"), first):
        promote(registry, version, "prod")
    meanwhile(registry, "write_alias", lambda: delete_version(another, second))
    with pytest.raises(AdapterConflict, match="has meant no other version"):
        roll_back(registry, BASE, NAME, "prod")
    assert registry.resolve(BASE, NAME, "prod") == first
    registry.delete_alias(BASE, NAME, "prod")

    def stop() -> None:
        raise StorageUnavailable("killed")

    meanwhile(storage, "delete", stop, "adapters/")
    with pytest.raises(StorageUnavailable):
        delete_adapter(registry, BASE, NAME)
    assert [version.number for version in registry.list_versions(BASE, NAME)] == [1, 4]
    delete_adapter(registry, BASE, NAME)
    assert storage.list("adapters/") == storage.list("aliases/") == []


def test_old_versions_go_and_what_may_be_wanted_stays(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as old as the last time that an alias meant them."""
    registry, now = AdapterRegistry(storage), 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    versions = [publish(registry, content) for content in range(5)]
    promote(registry, versions[0], "prod")
    promote(registry, versions[1], "prod")
    now = 1050.0
    promote(registry, versions[2], "prod")
    now = 1120.0
    assert drop_old_versions(registry, 200.0) == []
    assert drop_old_versions(registry, 100.0, kept={versions[3].digest}) == [versions[0]]
    now = 2000.0
    dropped = drop_old_versions(registry, 100.0)
    assert sorted(version.digest for version in dropped) == sorted(versions[at].digest for at in (1, 3))
    assert {version.number for version in registry.list_versions(BASE, NAME)} == {3, 5}


def test_a_version_without_a_name_is_found_by_its_id_until_it_is_old(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = AdapterRegistry(storage)
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    kept = [registry.keep(BASE, NAME, {"weights": str(content).encode()}, {"step": content}) for content in (1, 2)]
    assert registry.resolve(BASE, NAME, kept[0].version).manifest["step"] == 1 and kept[0].number is None
    assert str(kept[0]) == f"{BASE}:{NAME}@{kept[0].version}" and registry.list_adapters() == []
    with pytest.raises(AdapterNotFound):
        registry.resolve(BASE, NAME)
    assert registry.contents(kept[1]) == {"weights": b"2"}
    published = registry.publish(BASE, NAME, {"weights": b"2"}, {"step": 3})
    assert (published.version, published.number, published.manifest["step"]) == (kept[1].version, 1, 2)
    never = registry.keep(BASE, "never", {"weights": b"3"}, {})
    promote(registry, registry.keep(BASE, "good", {"weights": b"4"}, {}), "prod")
    now = 1100.0
    assert drop_old_versions(registry, 200.0) == []
    now = 2000.0
    assert sorted((one.name, one.version) for one in drop_old_versions(registry, 200.0)) == [
        (NAME, kept[0].version), ("never", never.version)
    ]  # fmt: skip


def test_who_serves_notices_within_a_second(tmp_path: Path) -> None:
    registry = AdapterRegistry(open_storage(tmp_path.as_uri()))
    old, new = publish(registry, 1), publish(registry, 2)
    promote(registry, old, "prod")

    async def noticed(names: AdapterNames, expected: str) -> float:
        began = time.monotonic()
        while await names.digest(BASE, NAME, "prod") != expected:
            await asyncio.sleep(0.001)
        return time.monotonic() - began

    async def follow() -> None:
        names = AdapterNames(registry, Settings(home=tmp_path).notice_seconds)
        told: list[Any] = []
        assert await names.notice() is None
        following = asyncio.create_task(names.follow(told.append))
        assert await names.digest(BASE, NAME, "prod") == old.digest == await names.digest(BASE, NAME, "1")
        await asyncio.to_thread(promote, registry, new, "prod")
        assert await noticed(names, new.digest) < 1.0
        await asyncio.to_thread(roll_back, registry, BASE, NAME, "prod")
        assert await noticed(names, old.digest) < 1.0
        assert [publication.digest for publication in told] == [new.digest, old.digest]
        await asyncio.to_thread(registry.delete_alias, BASE, NAME, "prod")
        await asyncio.sleep(0.5)
        assert len(told) == 2, "there is nothing to load"
        with pytest.raises(AdapterNotFound):
            await names.digest(BASE, NAME, "prod")
        following.cancel()

    asyncio.run(asyncio.wait_for(follow(), 20))
