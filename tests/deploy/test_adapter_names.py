"""What names mean: looked up once, again when something is published, and known while the storage is away."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import TypeVar

import pytest

from cluster.registry import AdapterNotFound, AdapterRegistry, Publication
from cluster.storage.base import StorageUnavailable
from cluster.storage.directory import open_storage
from deploy.api import adapter_names
from deploy.api.adapter_names import AdapterNames

T = TypeVar("T")


class Watched(AdapterRegistry):
    """A registry that counts look-ups, and can be away or slow."""

    def __init__(self, folder: Path) -> None:
        super().__init__(open_storage(folder.as_uri()))
        self.looked_up: list[str] = []
        self.away = False
        self.open = threading.Event()
        self.open.set()

    def put(self, name: str, content: int) -> str:
        return self.publish("tiny", name, {"weights": bytes([content])}, {}).digest

    def digest(self, base: str, name: str, version: str = "latest") -> str:
        self.looked_up.append(name)
        found = self._answer(super().digest(base, name, version))
        self.open.wait(10)
        return found

    def last_published(self) -> Publication | None:
        return self._answer(super().last_published())

    def _answer(self, value: T) -> T:
        if self.away:
            raise StorageUnavailable("the bucket does not answer")
        return value


@pytest.fixture
def registry(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_names_are_looked_up_again_when_something_was_published(registry: Watched) -> None:
    async def ask() -> None:
        names = AdapterNames(registry, 0.01)
        registry.put("a", 0)
        assert await names.notice() is None  # that is no news
        old = registry.put("a", 1)
        noticed = await names.notice()
        assert noticed is not None and (noticed.name, noticed.digest) == ("a", old)
        assert [await names.digest("tiny", "a", "latest") for _ in range(3)] == [old] * 3
        assert [entry.digest for entry in await names.entries()] == [old]
        assert registry.looked_up == ["a"] and await names.notice() is None
        new = registry.put("a", 2)
        told = asyncio.get_running_loop().create_future()
        following = asyncio.create_task(names.follow(told.set_result))
        assert (await asyncio.wait_for(told, 5)).digest == new
        following.cancel()
        assert await names.digest("tiny", "a", "latest") == new
        assert await names.digest("tiny", "a", old[:16]) == old
        assert [entry.digest for entry in await names.entries()] == [new]
        assert registry.looked_up == ["a"] * 3
        with pytest.raises(AdapterNotFound, match="published: tiny:a"):
            await names.digest("tiny", "b", "latest")

    asyncio.run(ask())


def test_one_look_up_for_all_who_ask_and_none_of_before_a_publication(registry: Watched) -> None:
    async def ask() -> None:
        names, old = AdapterNames(registry, 1.0), registry.put("a", 1)
        await names.notice()
        registry.open.clear()
        crowd = [asyncio.create_task(names.digest("tiny", "a", "latest")) for _ in range(5)]
        while not registry.looked_up:
            await asyncio.sleep(0.001)
        new = registry.put("a", 2)
        await names.notice()
        late = asyncio.create_task(names.digest("tiny", "a", "latest"))
        crowd[0].cancel()
        await asyncio.sleep(0)
        registry.open.set()
        assert await asyncio.gather(*crowd[1:], late) == [old] * 4 + [new]
        assert registry.looked_up == ["a", "a"]

    asyncio.run(ask())


def test_what_is_known_is_served_while_the_storage_is_away(registry: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        names, digest = AdapterNames(registry, 0.001), registry.put("a", 1)
        await names.notice()
        assert await names.digest("tiny", "a", "latest") == digest
        registry.put("b", 2)
        await names.notice()
        registry.away = True
        following = asyncio.create_task(names.follow(lambda _: None))
        assert await names.digest("tiny", "a", "latest") == digest
        with pytest.raises(StorageUnavailable):
            await names.digest("tiny", "b", "latest")
        registry.away = False
        assert await names.digest("tiny", "a", "latest") == digest
        assert not following.done()
        following.cancel()
        newer = registry.put("a", 3)  # whose publisher might have died before it said so
        assert await names.digest("tiny", "a", "latest") == digest
        monkeypatch.setattr(adapter_names, "_TRUSTED_SECONDS", 0.0)
        while await names.digest("tiny", "a", "latest") != newer:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(ask(), 20))
