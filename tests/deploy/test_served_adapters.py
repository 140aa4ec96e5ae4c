"""Adapters in a server without Ray around it: what it loads, refuses and keeps, and whose answer it gives."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from cluster.registry import AdapterVersion, Publication
from cluster.storage.base import StorageUnavailable
from deploy.serving.memory_tier import MemoryTier
from deploy.serving.protocol import Completion, ErrorResponse
from lora_core.adapters.adapter import Adapter
from lora_core.adapters.peft_format import AdapterFormatError
from lora_core.data.dataset import Example
from lora_core.models.probes import probe_losses
from tests.support.adapter_service import QUESTION, Service, about, run, until
from tests.support.models import random_adapter


def test_one_adapter_is_loaded_once_for_all_who_ask(service: Service, fetches: list[str]) -> None:
    version = service.publish("once", 1)

    async def crowd() -> list[Any]:
        tasks = [asyncio.create_task(service.server.answer(about(version))) for _ in range(6)]
        await until(lambda: bool(fetches))
        tasks[0].cancel()  # it was the first to ask, and the load goes on without it
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = run(crowd())
    assert isinstance(first, asyncio.CancelledError)
    assert {answer.start.digest for answer in others} == {version.digest}
    assert len({answer.choices for answer in others}) == 1
    assert others[0].choices != run(service.server.answer(QUESTION)).choices, "the adapter must change the answer"
    assert fetches == [version.version]
    run(service.server.answer(about(version)))
    assert len(fetches) == 1


def test_answers_are_of_the_digest_that_was_asked_for(service: Service, fetches: list[str]) -> None:
    """Whatever is published meanwhile under the name, and while a prompt of another version lies in the cache."""
    old = service.publish("moving", 2)
    before = run(service.server.answer(about(old)))
    patient = dataclasses.replace(about(old), max_tokens=200)
    whole = run(service.server.answer(patient))

    async def published_while_answering() -> tuple[Completion, AdapterVersion]:
        answering = asyncio.create_task(service.server.answer(patient))
        await until(lambda: not service.idle)
        new = await asyncio.to_thread(service.publish, "moving", 3)
        await service.server.load(Publication("tiny", "moving", new.digest, 0.0), "default")
        return await answering, new

    during, new = run(published_while_answering())
    assert during == whole
    assert fetches == [old.version, new.version]  # what is pushed is there before it is asked for
    after = run(service.server.answer(about(new)))
    assert (before.start.digest, after.start.digest) == (old.digest, new.digest)
    assert after.choices[0].text == service.alone(new) != before.choices[0].text
    assert run(service.server.answer(about(old))) == before
    assert len(fetches) == 2


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ({"base_fingerprint": "0" * 64}, "was trained on another base (weights 0000000000000000) than tiny is here"),
        ({"base_fingerprint": None}, "was trained on another base"),
        ({"tokenizer": "0" * 64}, "another tokenizer or chat template"),
        ({"probe_tolerance": -1.0}, "does not compute here what it did in training"),  # on any machine
    ],
)
def test_an_adapter_of_something_else_is_refused(
    service: Service, fetches: list[str], manifest: dict[str, Any], reason: str
) -> None:
    name = f"refused-{len(reason)}-{len(manifest)}-{next(iter(manifest))[0]}"
    version = service.publish(name, 4 + len(reason), **manifest)
    answer = run(service.server.answer(about(version)))
    assert isinstance(answer, ErrorResponse) and (answer.status, answer.code) == (409, "adapter_refused")
    assert reason in answer.message
    count = len(fetches)
    run(service.server.load(Publication("tiny", name, version.digest, 0.0), "default"))
    assert run(service.server.answer(about(version))) == answer and len(fetches) == count  # known bad: not tried again
    twin = service.publish(f"{name}-twin", 4 + len(reason))
    assert twin.digest == version.digest  # the same content with another manifest
    assert isinstance(run(service.server.answer(about(twin))), Completion)


@pytest.mark.parametrize("damage", [lambda loss: loss + 60.0, lambda loss: float("nan")])
def test_an_adapter_that_computes_something_else_is_refused(service: Service, damage: Callable[[float], float]) -> None:
    adapter = random_adapter(service.bank, 20)
    example = Example(list(range(40, 60)), [False] * 10 + [True] * 10)
    (loss,) = probe_losses(service.forward, service.forward.load(adapter), [example])
    name = f"damaged-{damage(1.0) > 0}".lower()
    probe = {"ids": example.ids, "labels_mask": example.labels_mask, "loss": damage(loss)}
    version = service.publish(name, 20 + len(name), probes=[probe])
    answer = run(service.server.answer(about(version)))
    assert isinstance(answer, ErrorResponse) and "does not compute here" in answer.message


def test_probes_of_another_precision_pass(service: Service) -> None:
    """What other tests rely on, said once and strictly: trained in fp32, served in what this machine computes in."""
    version = service.publish("probed", 30, probe_tolerance=0.01)
    assert isinstance(run(service.server.answer(about(version))), Completion)


@pytest.mark.parametrize(("precision", "passes"), [("bf16", False), ("nf4", True)])
def test_what_was_trained_in_four_bits_may_be_further_off(service: Service, precision: str, passes: bool) -> None:
    seed = 900 + passes
    adapter = random_adapter(service.bank, seed)
    example = Example(list(range(40, 60)), [False] * 10 + [True] * 10)
    (loss,) = probe_losses(service.forward, service.forward.load(adapter), [example])
    probe = {"ids": example.ids, "labels_mask": example.labels_mask, "loss": loss + 10 * 0.15 * (1 + loss / 10)}
    version = service.publish(f"from-{precision}", seed, probes=[probe], precision=precision)
    assert isinstance(run(service.server.answer(about(version))), Completion if passes else ErrorResponse)


def test_the_least_used_adapter_makes_room_and_one_in_use_is_waited_for(
    service: Service, fetches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, versions = service.server._adapters, [service.publish(f"room-{i}", 40 + i) for i in range(3)]
    tier = MemoryTier[Any]("device", 1, service.server._metrics)
    monkeypatch.setattr(cache, "_device", tier)

    async def ask() -> None:
        async with cache.use("default", "room-0", versions[0].digest):
            waiting = [asyncio.create_task(service.server.answer(about(version))) for version in versions[1:]]
            await until(lambda: len(tier._line) == 2)
            assert isinstance(await service.server.answer(about(versions[0])), Completion)  # the loop goes on
            assert versions[0].digest in tier and not any(task.done() for task in waiting)
        assert all(isinstance(answer, Completion) for answer in await asyncio.gather(*waiting))
        assert len(tier._entries) == 1 and versions[0].digest not in tier

    run(ask())
    assert len(fetches) == 3


def test_what_the_device_has_no_room_for_comes_back_from_host_memory(
    service: Service, fetches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, versions = service.server._adapters, [service.publish(f"host-{i}", 45 + i) for i in range(2)]
    monkeypatch.setattr(cache, "_device", MemoryTier[Any]("device", 1, service.server._metrics))
    monkeypatch.setattr(cache, "_host", MemoryTier[Any]("host", 2**30, service.server._metrics))
    first, other, again = (run(service.server.answer(about(versions[i]))) for i in (0, 1, 0))
    assert again == first and other.choices != first.choices
    assert fetches == [version.version for version in versions]


def test_a_storage_that_is_away_keeps_what_is_loaded_in_service(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady, other = service.publish("steady", 50), service.publish("never-asked-for", 51)
    before = run(service.server.answer(about(steady)))

    def away(*_: Any) -> AdapterVersion:
        raise StorageUnavailable("the bucket does not answer")

    monkeypatch.setattr(service.served, "resolve", away)
    assert run(service.server.answer(about(steady))) == before
    unknown = run(service.server.answer(about(other)))
    assert unknown == ErrorResponse(503, "the bucket does not answer", "storage_unavailable")


def test_a_file_that_cannot_be_read_now_may_be_read_later(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    version = service.publish("unreadable", 52)

    def unreadable(*_: Any) -> Adapter:
        raise AdapterFormatError("unreadable: not a readable PEFT adapter") from OSError("input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("deploy.serving.adapter_cache.read_adapter", unreadable)
        assert isinstance(run(service.server.answer(about(version))), ErrorResponse)
    assert isinstance(run(service.server.answer(about(version))), Completion)
