"""The plugin for vLLM, on what it takes of vLLM 0.32; `tests/bench/vllm_plugin.py` proves it in vLLM itself."""

from __future__ import annotations

import asyncio
import logging
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cluster.registry import AdapterRegistry, AdapterVersion
from lora_core.models.files import chat_template_hash, fingerprint_of, load_tokenizer
from tests.support.tiny_models import save_tiny_model

Publish = Callable[..., AdapterVersion]


class LoRARequest:
    """As vLLM's, whose fields are set without `__setattr__` first, and with it afterwards."""

    lora_name: str
    lora_int_id: int
    lora_path: str

    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str) -> None:
        self.__dict__.update(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=lora_path)


class Resolvers(dict[str, Any]):
    """vLLM's registry of them."""

    register_resolver = dict.__setitem__
    get_resolver = dict.__getitem__
    get_supported_resolvers = dict.keys


class VLLMClientError(Exception):
    """Answered with 400."""


class VLLMServerError(Exception):
    """Answered with 500."""


VLLM: dict[str, dict[str, Any]] = {
    "vllm": {"envs": SimpleNamespace(VLLM_ALLOW_RUNTIME_LORA_UPDATING=True)},
    "vllm.exceptions": {"VLLMClientError": VLLMClientError, "VLLMServerError": VLLMServerError},
    "vllm.lora": {},
    "vllm.lora.request": {"LoRARequest": LoRARequest},
    "vllm.lora.resolver": {"LoRAResolver": object, "LoRAResolverRegistry": Resolvers()},
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Registered, with all of it below a home of its own."""
    monkeypatch.setenv("LORA_HOME", str(tmp_path / "home"))
    for name, content in VLLM.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    import deploy.vllm_plugin

    deploy.vllm_plugin.LoRAResolverRegistry.clear()
    deploy.vllm_plugin.register()
    monkeypatch.setattr(deploy.vllm_plugin, "_FOLLOW_SECONDS", 0.01)
    yield deploy.vllm_plugin
    del sys.modules["deploy.vllm_plugin"]


@pytest.fixture
def publish(tmp_path: Path, model: Path) -> Publish:
    """Publishes content under a name, for the model unless the manifest says otherwise."""
    from cluster.storage.directory import open_storage

    storage = open_storage((tmp_path / "home" / "storage").as_uri())
    own = {"base_fingerprint": fingerprint_of(model, tmp_path), "tokenizer": chat_template_hash(load_tokenizer(model))}

    def publish(content: str, name: str = "triage", tenant: str = "default", **manifest: str) -> AdapterVersion:
        files = {"adapter_config.json": content.encode()}
        return AdapterRegistry(storage, tenant).publish("tiny", name, files, own | manifest)

    return publish


def resolve(plugin: Any, model: Path, name: str) -> Any:
    return asyncio.run(plugin.LoRAResolverRegistry.get_resolver("ray_lora").resolve_lora(str(model), name))


def test_a_name_is_the_content_that_the_registry_means(plugin: Any, model: Path, publish: Publish) -> None:
    plugin.LoRAResolverRegistry["ray_lora"].follows_latest = True
    first = publish("one")
    found = resolve(plugin, model, "tiny:triage")
    assert (Path(found.lora_path) / "adapter_config.json").read_text() == "one"
    assert found.lora_name == f"tiny:triage@{first.version}"
    second = publish("two")
    pinned, newer = resolve(plugin, model, f"tiny:triage@{first.version}"), resolve(plugin, model, "tiny:triage")
    assert (Path(newer.lora_path) / "adapter_config.json").read_text() == "two"
    assert (pinned.lora_name, pinned.lora_int_id, pinned.lora_path) == tuple(vars(found).values())
    assert newer.lora_name == f"tiny:triage@{second.version}" and newer.lora_path != found.lora_path
    numbers = {found.lora_int_id, newer.lora_int_id}
    assert len(numbers) == 2 and all(2**30 <= number < 2**31 for number in numbers)
    newer.lora_int_id = 1  # as each API server of vLLM counts
    assert newer.lora_int_id in numbers


def test_what_must_not_answer_does_not(plugin: Any, model: Path, publish: Publish, tmp_path: Path) -> None:
    resolver = plugin.LoRAResolverRegistry["ray_lora"]
    published = publish("one")
    with pytest.raises(VLLMClientError, match="would be served for ever: start vLLM with VLLM_PLUGINS=ray_lora"):
        resolve(plugin, model, "tiny:triage")
    assert resolve(plugin, model, f"tiny:triage@{published.version}") is not None
    resolver.follows_latest = True
    publish("one", "theirs", tenant="other")
    for name in ("tiny", "tiny:", ":triage", "tiny:triage@", "tiny:theirs", "tiny:nothing", "tiny:triage@../x"):
        assert resolve(plugin, model, name) is None, name
    publish("three", "foreign", base_fingerprint="0" * 64)
    publish("four", "spoken", tokenizer="0" * 64)
    for name, reason in (("foreign", "trained on another base"), ("spoken", "another tokenizer")):
        with pytest.raises(VLLMClientError, match=reason):
            resolve(plugin, model, f"tiny:{name}")
    version = publish("five", "damaged").version
    (stored,) = (tmp_path / "home" / "storage").rglob(f"{version}/adapter_config.json")
    stored.write_text("six")
    with pytest.raises(VLLMServerError, match="is damaged"):
        resolve(plugin, model, "tiny:damaged")


def test_contents_have_numbers_of_their_own(plugin: Any, tmp_path: Path) -> None:
    digests = [f"{0:07x}{last:057x}" for last in range(3)]
    numbers = [plugin._number(digest, tmp_path) for digest in digests]
    assert numbers == [2**30, 2**30 + 1, 2**30 + 2]
    assert [plugin._number(digest, tmp_path) for digest in reversed(digests)] == numbers[::-1]


def test_a_newer_version_takes_the_place_of_the_latest_alone(
    plugin: Any, model: Path, publish: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    first = publish("one")
    caplog.set_level(logging.WARNING)

    async def following() -> None:
        loaded: list[str] = []
        rejected: list[str] = []

        async def add_lora(request: Any) -> None:
            if (Path(request.lora_path) / "adapter_config.json").read_text() == "too large":
                rejected.append(request.lora_name)
                raise ValueError("rank 64 is greater than max_lora_rank 16")
            loaded.append(request.lora_name)

        models = SimpleNamespace(model_config=SimpleNamespace(model=str(model)), lora_requests={})
        models.lora_resolver_lock = defaultdict(asyncio.Lock)
        follower, args = plugin.LatestFollower(), Namespace(enable_lora=True)
        state = SimpleNamespace(openai_serving_models=models)
        await follower.init_state(SimpleNamespace(add_lora=add_lora), state, args)
        resolver = plugin.LoRAResolverRegistry["ray_lora"]
        resolver._registry.move("prod", first)
        for name in ("tiny:triage", f"tiny:triage@{first.version}", "tiny:triage@prod"):
            models.lora_requests[name] = await resolver.resolve_lora(str(model), name)
        models.lora_requests["static"] = LoRARequest("static", 1, "static")

        async def latest_is(version: AdapterVersion) -> None:
            async with asyncio.timeout(10):
                while models.lora_requests["tiny:triage"].lora_name != f"tiny:triage@{version.version}":
                    await asyncio.sleep(0.01)

        second = publish("two")
        await latest_is(second)
        assert loaded == [f"tiny:triage@{second.version}"]  # before it answers
        resolver._registry.move("prod", second)
        async with asyncio.timeout(10):
            while models.lora_requests["tiny:triage@prod"].lora_name != f"tiny:triage@{second.version}":
                await asyncio.sleep(0.01)
        publish("too large")
        async with asyncio.timeout(10):
            while "max_lora_rank" not in caplog.text:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert models.lora_requests["tiny:triage"].lora_name == f"tiny:triage@{second.version}"
        await latest_is(publish("three"))
        assert models.lora_requests[f"tiny:triage@{first.version}"].lora_name == f"tiny:triage@{first.version}"
        assert models.lora_requests["static"].lora_name == "static"
        assert len(rejected) == 1 == caplog.text.count("max_lora_rank")
        follower._task.cancel()

    asyncio.run(following())


def test_vllm_does_not_start_where_it_would_never_ask(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin.envs, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", False)
    started = plugin.LatestFollower().init_state(None, SimpleNamespace(), Namespace(enable_lora=False))
    with pytest.raises(ValueError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"):
        asyncio.run(started)
