"""Which adapters a tenant sees, and what their names mean now: its own, then those that are published to all.

    owner, digest = await names.digest("acme", "tiny", "triage", "latest")

A tenant's publications are followed while somebody asks for it; those of the service's own tenant, and of the one that
is published to all, always.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.registry import PUBLIC, AdapterEntry, AdapterNotFound, AdapterRegistry, Publication
from deploy.api.adapter_names import AdapterNames

_IDLE_SECONDS = 600.0  # without a request, before a tenant's publications are not looked for any more
_ABSENT_SECONDS = 1.0  # that a name which is published to all is not looked for among the tenant's own
_ABSENT = 50_000  # names


@dataclass
class _Followed:
    names: AdapterNames
    task: asyncio.Task[None]
    asked_at: float
    absent: dict[tuple[str, str], float] = field(default_factory=dict)
    """When (base, adapter) was not found."""


class TenantNames:
    """The names in one storage. It lives on one event loop; `told` hears of publications and whose they are."""

    def __init__(
        self, registry: AdapterRegistry, tenant: str, seconds: float, told: Callable[[str, Publication], None]
    ) -> None:
        self._registry, self._seconds, self._told = registry, seconds, told
        self._always = {tenant, PUBLIC}
        self._followed: dict[str, _Followed] = {}
        for one in self._always:
            self._of(one)

    async def digest(self, tenant: str, base: str, adapter: str, version: str) -> tuple[str, str]:
        """Return whose adapter this is, and the digest of the version.

        Raises:
            AdapterNotFound: naming what exists.
            StorageError: the storage does not answer and nothing is known.
        """
        own, name = self._of(tenant), (base, adapter)
        if tenant == PUBLIC or time.monotonic() - own.absent.get(name, -_ABSENT_SECONDS) >= _ABSENT_SECONDS:
            try:
                return tenant, await own.names.digest(base, adapter, version)
            except AdapterNotFound as error:
                if tenant == PUBLIC or error.has_others:  # an adapter of its own hides all versions of another's
                    raise
                missing_at = time.monotonic()
        else:
            missing_at = own.absent[name]
        found = await self._of(PUBLIC).names.digest(base, adapter, version)
        own.absent[name] = missing_at
        if len(own.absent) > _ABSENT:
            del own.absent[next(iter(own.absent))]
        return PUBLIC, found

    async def entries(self, tenant: str) -> list[tuple[str, AdapterEntry]]:
        """Return every adapter that a tenant sees with its latest version, and whose it is. Raises StorageError."""
        found: dict[tuple[str, str], tuple[str, AdapterEntry]] = {}
        for owner in dict.fromkeys((tenant, PUBLIC)):
            for entry in await self._of(owner).names.entries():
                found.setdefault((entry.base, entry.name), (owner, entry))
        return [found[name] for name in sorted(found)]

    def _of(self, tenant: str) -> _Followed:
        now = time.monotonic()
        if (followed := self._followed.get(tenant)) is not None:
            followed.asked_at = now
            return followed
        for idle in [name for name, one in self._followed.items() if now - one.asked_at > _IDLE_SECONDS]:
            if idle not in self._always:
                self._followed.pop(idle).task.cancel()
        names = AdapterNames(self._registry.of(tenant), self._seconds)
        task = asyncio.get_running_loop().create_task(names.follow(lambda published: self._told(tenant, published)))
        self._followed[tenant] = _Followed(names, task, now)
        return self._followed[tenant]
