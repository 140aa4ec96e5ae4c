"""Adapters in memory, by the digest of their content: loaded once however many ask, checked before they answer anybody.

async with cache.use("acme", "triage", digest) as adapter:      never evicted while somebody uses it
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import torch

from cluster.registry import AdapterRegistry, AdapterVersion, version_of
from cluster.settings import Settings
from cluster.storage.base import StorageCorrupt, StorageError
from cluster.storage.directory import DirectoryStorage
from cluster.storage.disk_cache import DiskCache
from deploy.serving.decode_loop import DecodeLoop
from deploy.serving.memory_tier import MemoryTier
from deploy.serving.metrics import ServingMetrics
from deploy.serving.origin import origin_problem
from deploy.serving.single_flight import SingleFlight
from lora_core.adapters.adapter import Adapter
from lora_core.adapters.peft_format import AdapterFormatError, read_adapter
from lora_core.data.dataset import Example
from lora_core.models.base import BaseModel
from lora_core.models.files import chat_template_hash
from lora_core.models.forward import Forward
from lora_core.models.probes import probe_losses
from lora_core.models.step import Bound

log = logging.getLogger("ray.serve.lora")

# How far a probe's loss may be from what training saw, in nats a token times (1 + loss), by (trained in, served in).
# Seen on SmolLM2-135M: bf16 to bf16 0, bf16 to fp32 up to 0.013; the base in place of a trained adapter is 1.8 off.
_TOLERANCE = {("fp32", "fp32"): 0.001, ("bf16", "bf16"): 0.03}
_TOLERANCE_MIXED = 0.05
# nf4 is another base to a small model: SmolLM2-135M's tickets after 10 steps on nf4 were up to 0.165 off in bf16.
_TOLERANCE_NF4 = 0.25


_CPU_BYTES = 2 * 2**30  # about 200 adapters of r 16 on SmolLM2-135M in bf16
_GPU_SHARE = 0.1  # on an H200 with a Llama of 8B about 140 adapters of r 16


class AdapterRefusedError(ValueError):
    """A published adapter that must not answer on this base; the sentence says why."""


class AdapterCache:
    """The adapters of one base. It lives on one event loop; whatever needs the model runs on the decode loop."""

    def __init__(
        self,
        registry: AdapterRegistry,
        name: str,
        base: BaseModel,
        forward: Forward,
        loop: DecodeLoop,
        metrics: ServingMetrics,
        settings: Settings,
    ) -> None:
        self._registry, self._name, self._base, self._forward = registry, name, base, forward
        self._loop, self._metrics = loop, metrics
        self._template = chat_template_hash(base.tokenizer)
        self._refused: dict[tuple[str, str, str], str] = {}  # by tenant, name, digest: another's manifest may be right
        self._loads = SingleFlight[Bound]()
        on_gpu = base.device.type == "cuda"
        self._device = MemoryTier[Bound]("device", _device_bytes(settings, base.device), metrics)
        self._host = MemoryTier[Adapter]("host", int(settings.adapter_host_gib * 2**30) if on_gpu else 0, metrics)
        disk = 0 if isinstance(registry.storage, DirectoryStorage) else int(settings.adapter_disk_gib * 2**30)
        self._disk = DiskCache(settings.cache_dir / "versions", disk) if disk else None

    @asynccontextmanager
    async def use(self, tenant: str, adapter: str, digest: str) -> AsyncIterator[Bound]:
        """Yield the content of this digest, which a tenant's adapter of this name has or had, in memory while the block
        lasts.

        Raises:
            AdapterNotFound: it is not there any more.
            AdapterRefusedError: it belongs to another base, or computes something else than in training.
            AdapterFormatError, StorageError: its files cannot be read.
        """
        with self._device.using(digest):
            bound = self._device.get(digest)
            yield await self._loaded(tenant, adapter, digest) if bound is None else bound

    @property
    def memory(self) -> MemoryTier[Bound]:
        """Where adapters lie that answer."""
        return self._device

    async def load(self, tenant: str, adapter: str, digest: str) -> None:
        """Have it in memory before somebody uses it. Raises what `use` does."""
        if digest not in self._device:
            await self._loaded(tenant, adapter, digest)

    async def _loaded(self, tenant: str, adapter: str, digest: str) -> Bound:
        return await self._loads.do((tenant, adapter, digest), partial(self._load, tenant, adapter, digest))

    async def _load(self, tenant: str, adapter: str, digest: str) -> Bound:
        """Bring it from the nearest tier that has it to the device, and check what comes from storage."""
        if (reason := self._refused.get((tenant, adapter, digest))) is not None:
            raise AdapterRefusedError(reason)
        began, what = time.monotonic(), f"{self._name}:{adapter}@{version_of(digest)}"
        host = self._host.get(digest)
        try:
            if host is not None:
                bound, nbytes = await self._to_device(digest, host)
            else:
                registry = self._registry.of(tenant)
                version = await asyncio.to_thread(registry.resolve, self._name, adapter, version_of(digest))
                assert version.digest == digest
                self._check_origin(version)
                host = await asyncio.to_thread(self._read, registry, what, version)
                bound, nbytes = await self._to_device(digest, host, partial(self._replay_probes, what, version))
        except (AdapterRefusedError, AdapterFormatError) as error:
            if not isinstance(error.__cause__, OSError):
                self._refused[tenant, adapter, digest] = str(error)
            self._metrics.load_failed("refused")
            log.error("event=adapter_refused adapter=%s reason=%s", what, error)
            raise
        except StorageError as error:
            self._metrics.load_failed("damaged" if isinstance(error, StorageCorrupt) else "unavailable")
            raise
        self._host.offer(digest, host, 1 << (nbytes - 1).bit_length())  # as torch rounds pinned memory up
        log.info("event=adapter_loaded adapter=%s bytes=%d seconds=%.3f", what, nbytes, time.monotonic() - began)
        return bound

    async def _to_device(
        self, digest: str, host: Adapter, check: Callable[[Bound], Awaitable[None]] | None = None
    ) -> tuple[Bound, int]:
        """Return the adapter where it computes, and its bytes, once there is room and `check` lets it pass."""
        nbytes = sum(weight.numel() for weight in host.trained) * self._base.model.dtype.itemsize
        await self._device.reserve(nbytes)
        try:
            bound = await asyncio.to_thread(self._forward.load, host)
            if check is not None:
                await check(bound)
        except BaseException:
            self._device.give_back(nbytes)
            raise
        return self._device.put(digest, bound, nbytes), nbytes

    def _check_origin(self, version: AdapterVersion) -> None:
        """Check before anything is fetched that it has the same base weights, tokenizer and template."""
        problem = origin_problem(version, self._name, self._base.fingerprint, self._template)
        if problem is not None:
            raise AdapterRefusedError(problem)

    def _read(self, registry: AdapterRegistry, what: str, version: AdapterVersion) -> Adapter:
        """Return it in host memory, ready for the device."""
        began = time.monotonic()
        with registry.files(version, self._disk) as folder:
            fetched = time.monotonic()
            adapter = self._forward.stage(read_adapter(folder, self._forward.modules, what))
        self._metrics.adapter_stage("fetch", fetched - began)
        self._metrics.adapter_stage("parse", time.monotonic() - fetched)
        return adapter

    async def _replay_probes(self, what: str, version: AdapterVersion, adapter: Bound) -> None:
        """Measure again what training measured last, in one pass between two steps of the decode loop."""
        began = time.monotonic()
        precisions = (str(version.manifest.get("precision")), self._base.precision)
        mixed = _TOLERANCE_NF4 if "nf4" in precisions else _TOLERANCE_MIXED
        tolerance = version.manifest.get("probe_tolerance", _TOLERANCE.get(precisions, mixed))
        probes = version.manifest.get("probes", [])
        examples = [Example(probe["ids"], probe["labels_mask"]) for probe in probes]
        losses = await self._loop.call(partial(probe_losses, self._forward, adapter, examples)) if probes else []
        for probe, loss in zip(probes, losses, strict=True):
            labels = sum(probe["labels_mask"])
            here, there = loss / labels, probe["loss"] / labels
            if not abs(here - there) <= tolerance * (1 + there):
                raise AdapterRefusedError(
                    f"{what} does not compute here what it did in training (a probe's loss is {here:.4f} nats a token,"
                    f" not {there:.4f}; trained in {precisions[0]}, served in {precisions[1]}); train it again"
                )
        self._metrics.adapter_stage("probe", time.monotonic() - began)


def _device_bytes(settings: Settings, device: torch.device) -> int:
    """Return how much of the memory where a replica computes adapters may take."""
    if settings.adapter_memory_gib is not None:
        return int(settings.adapter_memory_gib * 2**30)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _GPU_SHARE)
    return _CPU_BYTES
