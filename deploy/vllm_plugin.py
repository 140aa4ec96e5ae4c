"""vLLM beside this service: stock `vllm serve` answers for every published adapter of its base, by name.

    VLLM_PLUGINS=ray_lora VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank 64

    model="<base>:<adapter>"               the latest version: a new one a second or two after it is published
    model="<base>:<adapter>@<alias>"       what that means, likewise
    model="<base>:<adapter>@<version>"     this one, by its id or number

vLLM knows an adapter by its name, folder and number. Here all three are of its content, so that two versions are two
adapters, in the engine and in its prefix cache, and an answer that has begun ends with the version that it began with.
This file is imported by vLLM alone, which finds it by the entry points `vllm.general_plugins` and
`vllm.endpoint_plugins`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from argparse import Namespace
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.exceptions import VLLMClientError, VLLMServerError
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from cluster.registry import LATEST, AdapterNotFound, AdapterRegistry, AdapterVersion, is_fixed
from cluster.settings import load_settings
from cluster.storage.base import StorageError
from cluster.storage.directory import open_storage
from cluster.storage.disk_cache import DiskCache
from deploy.serving.origin import origin_problem
from lora_core.models.files import chat_template_hash, fingerprint_of, load_tokenizer, local_folder

log = logging.getLogger("vllm.ray_lora")  # below `vllm`, whose handlers write the server's log

NAME = "ray_lora"
_FOLLOW_SECONDS = 1.0
_FIRST_NUMBER = 1 << 30  # vLLM counts its own from 1, and keeps numbers in 32 bits


class PublishedAdapter(LoRARequest):  # type: ignore[misc]
    """One version as vLLM takes it. Its number stays what it is: each API server of vLLM would give it one by counting
    anew, and the engine knows adapters by number alone, so that those of two servers would answer for each other.
    """

    def __setattr__(self, field: str, value: Any) -> None:
        if field != "lora_int_id":
            super().__setattr__(field, value)


class RegistryResolver(LoRAResolver):  # type: ignore[misc]
    """Finds adapters of one tenant in the registry, and fetches them into this machine's cache."""

    def __init__(self) -> None:
        settings = load_settings()
        self._registry = AdapterRegistry(open_storage(settings.storage_url), settings.tenant)
        self._cache_dir = settings.cache_dir
        self._disk = DiskCache(settings.cache_dir / "versions", int(settings.adapter_disk_gib * 2**30))
        self._origin = cache(self._origin_of)
        self.follows_latest = False

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The adapter of a name; None where it is no name of ours, or nothing is published under it.

        Raises:
            VLLMClientError: it must not answer on this base.
            VLLMServerError: its files are damaged, or the storage does not answer.
        """
        base, _, rest = lora_name.partition(":")
        adapter, at, version = rest.partition("@")
        if not adapter or (at and not version):
            return None
        if not is_fixed(version) and not self.follows_latest:
            raise VLLMClientError(
                f"what {lora_name} means now would be served for ever: start vLLM with VLLM_PLUGINS={NAME},"
                f" or ask for {base}:{adapter}@<number>"
            )
        try:
            found = await asyncio.to_thread(self._registry.resolve, base, adapter, version or LATEST)
            return await asyncio.to_thread(self._request, base_model_name, found)
        except AdapterNotFound as error:
            log.info("event=adapter_unknown adapter=%s reason=%s", lora_name, error)
            return None
        except StorageError as error:
            raise VLLMServerError(str(error)) from error

    def _request(self, base_model_name: str, version: AdapterVersion) -> PublishedAdapter:
        problem = origin_problem(version, base_model_name, *self._origin(base_model_name))
        if problem is not None:
            raise VLLMClientError(problem)
        folder = self._registry.hold(version, self._disk)  # vLLM may read it again at any time
        name = f"{version.base}:{version.name}@{version.version}"
        return PublishedAdapter(name, _number(version.digest, folder.parent), str(folder))

    def _origin_of(self, base_model_name: str) -> tuple[str, str]:
        """Fingerprint of the weights, hash of tokenizer and chat template: of the base that vLLM serves."""
        folder = local_folder(base_model_name, self._cache_dir)
        return fingerprint_of(folder, self._cache_dir), chat_template_hash(load_tokenizer(folder))


class LatestFollower:
    """Puts newer versions in the place of those that vLLM remembers by name for ever."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """It answers no requests of its own."""

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Begin to follow.

        Raises:
            ValueError: vLLM would not ask for adapters at run time.
        """
        wanted = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True": envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING}
        wanted["--enable-lora"] = args.enable_lora
        if missing := [name for name, given in wanted.items() if not given]:
            raise ValueError(f"published adapters need {' and '.join(missing)}; start vLLM with it")
        self._engine, self._models = engine_client, state.openai_serving_models
        self._resolver: RegistryResolver = LoRAResolverRegistry.get_resolver(NAME)
        self._resolver.follows_latest = True
        self._reasons: dict[str, str] = {}
        self._rejected: set[str] = set()
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        while True:
            known = [name for name, lora in self._models.lora_requests.items() if _may_move(name, lora)]
            await asyncio.gather(*map(self._renew, known))
            await asyncio.sleep(_FOLLOW_SECONDS)

    async def _renew(self, name: str) -> None:
        """Load the latest version, then let it answer from the next request on; the older one stays if that fails."""
        try:
            latest = await self._resolver.resolve_lora(self._models.model_config.model, name)
        except (VLLMClientError, VLLMServerError) as error:
            self._warn(name, str(error))
            return
        async with self._models.lora_resolver_lock[name]:
            known = self._models.lora_requests.get(name)
            if latest is None or known is None or latest.lora_path in (known.lora_path, *self._rejected):
                return
            try:
                await self._engine.add_lora(latest)
            except Exception as error:  # vLLM's own reasons come as any: a rank that is too large, DoRA
                self._rejected.add(latest.lora_path)
                self._warn(latest.lora_name, str(error))
                return
            self._models.lora_requests[name] = latest
            log.info("event=adapter_renewed adapter=%s", latest.lora_name)

    def _warn(self, name: str, reason: str) -> None:
        """Once for each reason, though it is tried every second."""
        if self._reasons.get(name) != reason:
            self._reasons[name] = reason
            log.warning("event=renewal_failed adapter=%s reason=%s", name, reason)


def register() -> None:
    """Let vLLM ask the registry for adapters that it does not know; it calls this in each of its processes."""
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, RegistryResolver())


def _may_move(name: str, lora: LoRARequest) -> bool:
    return isinstance(lora, PublishedAdapter) and not is_fixed(name.partition("@")[2])


def _number(digest: str, folder: Path) -> int:
    """A number that no other content has on this machine: of those from its digest on the first whose link in `folder`
    is its own.
    """
    numbers = itertools.count(_FIRST_NUMBER + int(digest[:7], 16))
    return next(number for number in numbers if _is_linked(folder / str(number), digest))


def _is_linked(link: Path, digest: str) -> bool:
    """Whether the link, which is made where it is missing, leads there."""
    with suppress(FileExistsError):
        link.symlink_to(digest)
    return link.readlink() == Path(digest)
