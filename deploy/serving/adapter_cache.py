"""Adapters in memory, by the digest of their content: loaded once however many ask, checked before they answer anybody.

    version = await cache.resolve("triage", "latest")      what the registry says, at most a second old
    async with cache.use(version) as adapter:              never evicted while somebody uses it

Where the storage does not answer, what is known goes on being served.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from cluster.registry import AdapterRegistry, AdapterVersion
from cluster.storage.base import StorageError
from deploy.serving.decode_loop import DecodeLoop
from deploy.serving.metrics import ServingMetrics
from lora_core.adapters.peft_format import AdapterFormatError, read_adapter
from lora_core.data.dataset import Example
from lora_core.models.base import BaseModel
from lora_core.models.files import chat_template_hash
from lora_core.models.forward import Forward
from lora_core.models.probes import probe_losses
from lora_core.models.step import Bound

log = logging.getLogger("ray.serve.lora")

T = TypeVar("T")

_RESOLVED_SECONDS = 1.0
_CAPACITY_BYTES = 2 * 2**30  # about 200 adapters of r 16 on SmolLM2-135M in bf16, 25 on a Llama of 8B

# How far a probe's loss may be from what training saw, in nats a token times (1 + loss), by (trained in, served in).
# Seen on SmolLM2-135M: bf16 to bf16 0, bf16 to fp32 up to 0.013; the base in place of a trained adapter is 1.8 off.
_TOLERANCE = {("fp32", "fp32"): 0.001, ("bf16", "bf16"): 0.03}
_TOLERANCE_MIXED = 0.05
# nf4 is another base to a small model: SmolLM2-135M's tickets after 10 steps on nf4 were up to 0.165 off in bf16.
_TOLERANCE_NF4 = 0.25


class AdapterRefusedError(ValueError):
    """A published adapter that must not answer on this base; the sentence says why."""


@dataclass
class _Entry:
    adapter: Bound
    nbytes: int
    users: int = 0


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
    ) -> None:
        self._registry, self._name, self._base, self._forward = registry, name, base, forward
        self._loop, self._metrics, self._capacity = loop, metrics, _CAPACITY_BYTES
        self._template = chat_template_hash(base.tokenizer)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # by digest, the one used longest ago first
        self._refused: dict[str, str] = {}
        self._resolved: dict[tuple[str, str], tuple[float, AdapterVersion]] = {}
        self._in_flight: dict[object, asyncio.Task[Any]] = {}

    async def resolve(self, adapter: str, version: str) -> AdapterVersion:
        """Return what the registry names now.

        Raises:
            AdapterNotFound: naming what exists.
            StorageError: the storage does not answer and nothing is known.
        """
        known = self._resolved.get((adapter, version))
        if known is not None and time.monotonic() - known[0] < _RESOLVED_SECONDS:
            return known[1]
        try:
            found = await self._once((adapter, version), lambda: self._resolve(adapter, version))
        except StorageError as error:
            if known is None:
                raise
            log.warning("event=resolve_failed adapter=%s:%s error=%r", self._name, adapter, error)
            return known[1]
        return found

    @asynccontextmanager
    async def use(self, version: AdapterVersion) -> AsyncIterator[Bound]:
        """Yield the adapter of this version, in memory while the block lasts.

        Raises:
            AdapterRefusedError: it belongs to another base, or computes something else than in training.
            AdapterFormatError, StorageError: its files cannot be read.
        """
        entry = self._entries.get(version.digest)
        self._metrics.adapter_request(hit=entry is not None)
        if entry is None:
            entry = await self._once(version.digest, lambda: self._load(version))
        entry.users += 1
        if version.digest in self._entries:
            self._entries.move_to_end(version.digest)
        try:
            yield entry.adapter
        finally:
            entry.users -= 1
            self._evict()

    async def _once(self, key: object, start: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Share one load between all who ask for the same at once; it goes on when the one who started it leaves."""
        load: asyncio.Task[T] | None = self._in_flight.get(key)
        if load is None:
            load = self._in_flight[key] = asyncio.create_task(start())
            load.add_done_callback(lambda _: self._in_flight.pop(key))
        return await asyncio.shield(load)

    async def _resolve(self, adapter: str, version: str) -> AdapterVersion:
        found = await asyncio.to_thread(self._registry.resolve, self._name, adapter, version)
        self._resolved[adapter, version] = (time.monotonic(), found)
        return found

    async def _load(self, version: AdapterVersion) -> _Entry:
        what = f"{version.base}:{version.name}@{version.version}"
        try:
            self._check_origin(what, version)
            began = time.monotonic()
            entry = await asyncio.to_thread(self._read, version)
            await self._replay_probes(what, version, entry.adapter)
        except (AdapterRefusedError, AdapterFormatError) as error:
            self._refused[version.digest] = str(error)
            log.error("event=adapter_refused adapter=%s reason=%s", what, error)
            raise
        self._entries[version.digest] = entry
        log.info("event=adapter_loaded adapter=%s bytes=%d seconds=%.3f", what, entry.nbytes, time.monotonic() - began)
        return entry

    def _check_origin(self, what: str, version: AdapterVersion) -> None:
        """Check before anything is fetched that it has the same base weights, tokenizer and template."""
        if version.digest in self._refused:
            raise AdapterRefusedError(self._refused[version.digest])
        fingerprint = version.manifest.get("base_fingerprint")
        if fingerprint != self._base.fingerprint:
            raise AdapterRefusedError(
                f"{what} was trained on another base (weights {str(fingerprint)[:16]}) than {self._name} is here"
                f" ({self._base.fingerprint[:16]}); train it again on this one, or serve the other"
            )
        if version.manifest.get("tokenizer", self._template) != self._template:
            raise AdapterRefusedError(
                f"{what} was trained with another tokenizer or chat template than the one of {self._name};"
                " train it again with this one"
            )

    def _read(self, version: AdapterVersion) -> _Entry:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="lora-adapter-") as folder:
            self._registry.fetch(version, Path(folder))
            fetched = time.monotonic()
            read = read_adapter(Path(folder), self._forward.modules)
        entry = _Entry(self._forward.load(read), self._base.model.dtype.itemsize * sum(map(Tensor.numel, read.trained)))
        self._metrics.adapter_stage("fetch", fetched - began)
        self._metrics.adapter_stage("parse", time.monotonic() - fetched)
        return entry

    async def _replay_probes(self, what: str, version: AdapterVersion, adapter: Bound) -> None:
        """Measure again what training measured last; a step of the decode loop fits between two probes."""
        began = time.monotonic()
        precisions = (str(version.manifest.get("precision")), self._base.precision)
        mixed = _TOLERANCE_NF4 if "nf4" in precisions else _TOLERANCE_MIXED
        tolerance = version.manifest.get("probe_tolerance", _TOLERANCE.get(precisions, mixed))
        for probe in version.manifest.get("probes", []):
            example = Example(probe["ids"], probe["labels_mask"])
            labels = sum(probe["labels_mask"])
            (loss,) = await self._loop.call(partial(probe_losses, self._forward, adapter, [example]))
            here, there = loss / labels, probe["loss"] / labels
            if not abs(here - there) <= tolerance * (1 + there):
                raise AdapterRefusedError(
                    f"{what} does not compute here what it did in training (a probe's loss is {here:.4f} nats a token,"
                    f" not {there:.4f}; trained in {precisions[0]}, served in {precisions[1]}); train it again"
                )
        self._metrics.adapter_stage("probe", time.monotonic() - began)

    def _evict(self) -> None:
        total = sum(entry.nbytes for entry in self._entries.values())
        for digest, entry in list(self._entries.items()):
            if total <= self._capacity:
                return
            if entry.users == 0:
                total -= entry.nbytes
                del self._entries[digest]
                log.info("event=adapter_evicted digest=%s bytes=%d", digest[:16], entry.nbytes)
