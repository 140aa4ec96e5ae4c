"""What the names of adapters mean now. A request's is looked up once, and it is answered with that digest to its end.

    digest = await names.digest("tiny", "triage", "latest")      known already, in most cases
    await names.follow(told)                                     for ever, beside the requests

Where the registry says that something was published (one small read every so often, however many adapters there are),
what is known is looked up again before it is used. While storage does not answer, what is known goes on being served.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cluster.registry import AdapterEntry, AdapterNotFound, AdapterRegistry, Publication
from cluster.storage.base import StorageError
from deploy.serving.single_flight import SingleFlight

log = logging.getLogger("ray.serve.lora")

_KNOWN = 50_000  # names; about 20 MB
_TRUSTED_SECONDS = 60.0  # without looking: a publisher may die when the alias is written, and before it says so

_Name = tuple[str, str, str]
"""base, adapter, version"""


@dataclass(frozen=True)
class _Known:
    digest: str
    publication: int
    at: float


class AdapterNames:
    """The names in one registry. It lives on one event loop; `seconds` is how soon a publication is noticed."""

    def __init__(self, registry: AdapterRegistry, seconds: float) -> None:
        self._registry, self._seconds = registry, seconds
        self._publications = 0  # that were noticed
        self._last: Publication | None = None
        self._looked = False
        self._known: OrderedDict[_Name, _Known] = OrderedDict()  # the one asked for longest ago first
        self._lookups = SingleFlight[str]()
        self._listed: tuple[int, float, list[AdapterEntry]] | None = None

    async def digest(self, base: str, adapter: str, version: str) -> str:
        """Return the digest of the adapter's version of this id or number, or of what this alias means now.

        Raises:
            AdapterNotFound: naming what exists.
            StorageError: the storage does not answer and nothing is known.
        """
        name = (base, adapter, version)
        known = self._known.get(name)
        if known is None or known.publication != self._publications:
            try:
                return await self._lookups.do((name, self._publications), partial(self._look_up, name))
            except StorageError as error:
                if known is None:
                    raise
                log.warning("event=resolve_failed adapter=%s:%s error=%r", base, adapter, error)
                return known.digest
        self._known.move_to_end(name)
        if time.monotonic() - known.at > _TRUSTED_SECONDS:
            self._lookups.start((name, self._publications), partial(self._look_up, name))
        return known.digest

    async def entries(self) -> list[AdapterEntry]:
        """Return every adapter with its latest version. Raises StorageError."""
        now = time.monotonic()
        if self._listed is None or self._listed[0] != self._publications or now - self._listed[1] > _TRUSTED_SECONDS:
            publications = self._publications
            self._listed = (publications, now, await asyncio.to_thread(self._registry.list_adapters))
        return self._listed[2]

    async def follow(self, told: Callable[[Publication], None]) -> None:
        """Notice publications, for ever, and tell of each that can be loaded; of several at once, of the last."""
        while True:
            try:
                publication = await self.notice()
                if publication is not None and publication.digest is not None:
                    told(publication)
            except Exception as error:  # whatever it is, names must not stay what they are for ever
                log.warning("event=follow_failed error=%r", error)
            await asyncio.sleep(self._seconds)

    async def notice(self) -> Publication | None:
        """Return what was published since the last call, or None. Raises StorageError."""
        last = await asyncio.to_thread(self._registry.last_published)
        if self._looked and last == self._last:
            return None
        news = last if self._looked else None  # what was there before us is none
        self._publications, self._last, self._looked = self._publications + 1, last, True
        return news

    async def _look_up(self, name: _Name) -> str:
        publications = self._publications  # of before: what is published while we look is noticed later
        try:
            digest = await asyncio.to_thread(self._registry.digest, *name)
        except AdapterNotFound:
            self._known.pop(name, None)
            raise
        self._known[name] = _Known(digest, publications, time.monotonic())
        self._known.move_to_end(name)
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        return digest
