"""Names that move from one version of an adapter to another: `latest`, which every publish moves, and those that people
promote, such as `prod`.

    aliases/<tenant>/<base>/<name>/prod.json      one small object: what it means now, and what it meant before
    published/<tenant>.json                       which adapter has a name that changed its meaning last
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.storage.base import Storage, StorageNotFound
from cluster.storage.keys import (
    adapter_aliases_prefix,
    adapter_of_alias,
    alias_key,
    aliases_prefix,
    last_published_key,
)

LATEST = "latest"
ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,63}")
HISTORY = 20  # former meanings that are remembered
NAMES_SHOWN = 20
READERS = 16


@dataclass(frozen=True)
class Meaning:
    """A version, its digest and number (None: it was published before versions had numbers), when that was first
    published and, of a former meaning, until when it was meant (seconds since 1970).
    """

    version: str
    digest: str
    created_at: float
    number: int | None = None
    until: float | None = None


@dataclass(frozen=True)
class Gate:
    """What a metric of the manifest has to be for an alias to move to its version."""

    metric: str
    min: float | None = None
    max: float | None = None

    def problem(self, metrics: Mapping[str, Any]) -> str | None:
        """Say, with the numbers, why these metrics do not pass; None where they do."""
        value = metrics.get(self.metric)
        if isinstance(value, bool) or not isinstance(value, int | float):
            known = ", ".join(sorted(name for name, one in metrics.items() if isinstance(one, int | float)))
            return f"it records no {self.metric} (but {known or 'nothing'})"
        if not (-math.inf if self.min is None else self.min) <= value:
            return f"its {self.metric} is {value:.6g}, which has to be at least {self.min:.6g}"
        if not value <= (math.inf if self.max is None else self.max):
            return f"its {self.metric} is {value:.6g}, which has to be at most {self.max:.6g}"
        return None


@dataclass(frozen=True)
class Alias:
    """What a name means now, what it meant before, the newest last, and what a version must pass to be promoted."""

    meaning: Meaning
    former: tuple[Meaning, ...] = ()
    gates: tuple[Gate, ...] = ()

    def moved(self, to: Meaning, at: float) -> Alias:
        """Return it with another meaning; the same one again is no move."""
        if to.version == self.meaning.version:
            return self
        former = (*self.former, replace(self.meaning, until=at))[-HISTORY:]
        return replace(self, meaning=to, former=former)

    def to_json(self) -> bytes:
        """Write it: the meaning's fields stand at the top."""
        rest = {"former": [asdict(one) for one in self.former], "gates": [asdict(gate) for gate in self.gates]}
        return json.dumps(asdict(self.meaning) | rest, indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Alias:
        document = json.loads(content)
        former = tuple(Meaning(**one) for one in document.pop("former", []))
        gates = tuple(Gate(**one) for one in document.pop("gates", []))
        return cls(Meaning(**document), former, gates)


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter in a listing: its latest version, when that was first published (seconds since 1970) and its number,
    and what its other aliases mean.
    """

    base: str
    name: str
    version: str
    digest: str
    created_at: float
    number: int | None
    aliases: Mapping[str, Meaning]


@dataclass(frozen=True)
class Publication:
    """That a name of `<base>:<name>` means the content of this digest since `at` (seconds since 1970); None: something
    was deleted.
    """

    base: str
    name: str
    digest: str | None
    at: float


class AdapterNotFound(LookupError):  # noqa: N818
    """No such adapter or version; `known` are the names (`<base>:<adapter>`), or the adapter's versions, that exist.
    `has_others` says that the adapter is there, and has other versions.
    """

    def __init__(self, wanted: str, known: tuple[str, ...], has_others: bool = False) -> None:
        super().__init__(wanted, known, has_others)
        self.wanted, self.known, self.has_others = wanted, known, has_others

    def __str__(self) -> str:
        more = f" and {len(self.known) - NAMES_SHOWN} more" if len(self.known) > NAMES_SHOWN else ""
        return f"there is no {self.wanted}; published: {', '.join(self.known[:NAMES_SHOWN]) or 'nothing yet'}{more}"


def alias_problem(alias: str) -> str | None:
    """Say why this cannot be an alias that people promote; None where it can."""
    if ALIAS.fullmatch(alias) is not None and re.fullmatch(r"[0-9a-f]{16}", alias) is None:
        return None
    return (
        f"{alias!r} cannot be an alias: use up to 64 lower-case letters, digits, '.', '_' or '-', a letter first,"
        " and not what looks like a version"
    )


class AdapterAliases:
    """What the names of one tenant's adapters mean; `AdapterRegistry` adds the versions."""

    def __init__(self, storage: Storage, tenant: str = "default") -> None:
        self.storage = storage
        self.tenant = tenant

    def alias(self, base: str, name: str, alias: str) -> Alias:
        """Return an alias. Raises AdapterNotFound."""
        try:
            return Alias.from_json(self.storage.get(alias_key(self.tenant, base, name, alias)))
        except StorageNotFound:
            known = () if alias == LATEST else tuple(self.aliases(base, name))
            if not known:
                raise AdapterNotFound(f"adapter {base}:{name}", tuple(self._names())) from None
            raise AdapterNotFound(f"version or alias {alias} of {base}:{name}", known, has_others=True) from None

    def aliases(self, base: str, name: str) -> dict[str, Alias]:
        """Return an adapter's aliases by name, `latest` among them."""
        return {alias: found for (_, _, alias), found in self._aliases(adapter_aliases_prefix(self.tenant, base, name))}

    def write_alias(self, base: str, name: str, alias: str, written: Alias) -> Alias:
        """Put an alias in the place of what it was, and say so to those who serve."""
        self.storage.put(alias_key(self.tenant, base, name, alias), written.to_json())
        self.tell(base, name, written.meaning.digest)
        return written

    def delete_alias(self, base: str, name: str, alias: str) -> None:
        """Let a name mean nothing any more."""
        self.storage.delete(alias_key(self.tenant, base, name, alias))
        self.tell(base, name, None)

    def tell(self, base: str, name: str, digest: str | None) -> None:
        """Say that a name means something else now: whoever serves looks again."""
        told = Publication(base, name, digest, time.time())
        self.storage.put(last_published_key(self.tenant), json.dumps(asdict(told)).encode())

    def last_published(self) -> Publication | None:
        """Return what was published last, of all adapters; None where nothing was yet."""
        try:
            return Publication(**json.loads(self.storage.get(last_published_key(self.tenant))))
        except StorageNotFound:
            return None

    def list_adapters(self) -> list[AdapterEntry]:
        """Return every adapter with its latest version and its aliases, by base and name: one small read an alias."""
        adapters: dict[tuple[str, str], dict[str, Meaning]] = {}
        for (base, name, alias), found in self._aliases(aliases_prefix(self.tenant)):
            adapters.setdefault((base, name), {})[alias] = found.meaning
        return [
            AdapterEntry(base, name, latest.version, latest.digest, latest.created_at, latest.number, others)
            for (base, name), others in sorted(adapters.items())
            if (latest := others.pop(LATEST, None)) is not None
        ]

    def _aliases(self, prefix: str) -> Iterator[tuple[tuple[str, str, str], Alias]]:
        """Yield ((base, name, alias), what it is) of each below `prefix`."""
        keys = self.storage.list(prefix)
        with ThreadPoolExecutor(READERS) as readers:
            for key, content in zip(keys, readers.map(self._content, keys), strict=True):
                if content is not None:
                    yield adapter_of_alias(key), Alias.from_json(content)

    def _content(self, key: str) -> bytes | None:
        """Return an object; None where it was deleted since it was listed."""
        try:
            return self.storage.get(key)
        except StorageNotFound:
            return None

    def _names(self) -> list[str]:
        keys = self.storage.list(aliases_prefix(self.tenant))
        return sorted({":".join(adapter_of_alias(key)[:2]) for key in keys})
