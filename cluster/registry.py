"""Adapter versions and what their names mean: where training and serving meet.

    adapters/<tenant>/<base>/<name>/<version>/<files>, manifest.json      never changes once the manifest is there
    numbers/<tenant>/<base>/<name>/<number>.json                          names a version, for ever: 1, 2, 3 and so on
    aliases/<tenant>/<base>/<name>/latest.json                            names the version of the last publish
    published/<tenant>.json                                               which name changed its meaning last

A publish writes the files, then the manifest, which makes the version exist, then its number, then the alias, which
makes it the latest; then it says so, for those who serve: one small read tells them that a name may mean something
else now. So a reader finds all of a version or nothing, wherever the writer is killed, and publishing again completes
it. A version is the digest of its content: the same files are the same version, whoever publishes them. Nobody locks:
who publishes what somebody else deletes just then looks at the end whether all of it is there, and else begins again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cluster.aliases import (
    LATEST,
    READERS,
    AdapterAliases,
    AdapterEntry,
    AdapterNotFound,
    Alias,
    Meaning,
    Publication,
)
from cluster.storage.base import StorageCorrupt, StorageNotFound, StorageUnavailable
from cluster.storage.disk_cache import DiskCache, Fetch
from cluster.storage.keys import (
    adapter_prefix,
    adapter_versions_prefix,
    adapters_prefix,
    number_key,
    number_of_key,
    numbers_prefix,
    owner_of_version,
)

__all__ = ["LATEST", "AdapterEntry", "AdapterNotFound", "AdapterRegistry", "AdapterVersion", "Publication"]

PUBLIC = "public"
"""The tenant whose adapters every tenant sees."""
MANIFEST = "manifest.json"
NUMBER = "number"
"""Beside the manifest: the version's number, for those who know the version."""
RESERVED = ("files", "digest", "version", "base", "name", "tenant", "created_at")  # of the manifest: the registry's own
ATTEMPTS = 10  # to publish what somebody else deletes all the time
VERSION_DIGITS = 16  # of the digest: a chance of 1 in 10^9 that two of 200,000 versions of one adapter are the same


@dataclass(frozen=True)
class AdapterVersion:
    """One published version: `digest` (sha256, hex) identifies its content, `version` is the beginning of that.
    `number` counts an adapter's versions from 1, in the order in which they were published (None: nobody looked).

    `manifest` holds `files` {name: {sha256, size in bytes}}, `digest`, `version`, `base`, `name`, `tenant`,
    `created_at` (seconds since 1970) and what the publisher added.
    """

    base: str
    name: str
    version: str
    digest: str
    manifest: dict[str, Any]
    number: int | None = field(default=None, compare=False)

    @property
    def meaning(self) -> Meaning:
        """It, as an alias names it."""
        return Meaning(self.version, self.digest, self.manifest["created_at"], self.number)

    def __str__(self) -> str:
        return f"{self.base}:{self.name}@{self.number or self.version}"


class AdapterRegistry(AdapterAliases):
    """The adapters of one tenant."""

    def of(self, tenant: str) -> AdapterRegistry:
        """Return the registry of another tenant in the same storage, or this one where it is the same tenant."""
        return self if tenant == self.tenant else AdapterRegistry(self.storage, tenant)

    def publish(self, base: str, name: str, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> AdapterVersion:
        """Publish files as a version of `<base>:<name>`, and make it the latest.

        Returns what readers see: of publishes of the same content, the first one's manifest stays.

        Raises:
            ValueError: no files, a file name with a slash, or a manifest key that is the registry's own.
            StorageUnavailable: somebody deletes it whenever it is there.
        """
        version, document = self._document(base, name, files, manifest)
        prefix, number = adapter_prefix(self.tenant, base, name, version), None
        whole = {*files, MANIFEST, NUMBER}
        for _ in range(ATTEMPTS):
            # Before the look for the manifest: if there is none, whoever numbers it takes a number above these.
            numbers = map(number_of_key, self.storage.list(numbers_prefix(self.tenant, base, name)))
            highest, there = max(numbers, default=0), self._files(prefix)
            if MANIFEST in there:
                highest, number = 0, number or self._number(prefix)
            if not there >= {*files, MANIFEST}:
                for file, content in files.items():
                    self.storage.put(prefix + file, content)
                self.storage.put(prefix + MANIFEST, document, if_absent=True)
            number = number or self._claim_number(base, name, version, highest)
            try:
                published = replace(self._read(base, name, version), number=number)
            except StorageNotFound:
                continue
            self.move(LATEST, published)
            if not there >= {MANIFEST, NUMBER}:
                self.storage.put(prefix + NUMBER, str(number).encode())
            # After the alias is written, as in `promote`; and after the manifest, since who deletes looks for one last.
            if self._files(prefix) >= whole:
                return published
        raise StorageUnavailable(f"{base}:{name}@{version} was deleted while it was published; publish it again")

    def keep(self, base: str, name: str, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> AdapterVersion:
        """Publish files as a version that has no number and that no alias means: it is found by its id, until it is
        old. Published once more, by `publish`, it has both. Raises ValueError as that does.
        """
        version, document = self._document(base, name, files, manifest)
        prefix = adapter_prefix(self.tenant, base, name, version)
        for file, content in files.items():
            self.storage.put(prefix + file, content)
        self.storage.put(prefix + MANIFEST, document, if_absent=True)
        return self._read(base, name, version)

    def move(self, alias: str, version: AdapterVersion) -> Alias:
        """Let an alias mean this version, and say so to those who serve. Returns what it is now."""
        try:
            moved = self.alias(version.base, version.name, alias).moved(version.meaning, time.time())
        except AdapterNotFound:
            moved = Alias(version.meaning)
        return self.write_alias(version.base, version.name, alias, moved)

    def resolve(self, base: str, name: str, version: str = LATEST) -> AdapterVersion:
        """Return the version of this id or number, or the one that this alias means now.

        Raises:
            AdapterNotFound: naming what exists.
            StorageCorrupt: its manifest is not what was published.
        """
        if not base or not name:
            raise AdapterNotFound(f"adapter {base}:{name}", tuple(self._names()))
        try:
            number, version_id = self._meant(base, name, version)
            return replace(self._read(base, name, version_id), number=number)
        except StorageNotFound:
            known = tuple(self.versions(base, name))
            raise AdapterNotFound(f"version {version} of {base}:{name}", known, has_others=bool(known)) from None

    def digest(self, base: str, name: str, version: str = LATEST) -> str:
        """Return the digest of what `resolve` would; an alias costs one small read. Raises what that does."""
        if base and name and not is_fixed(version):
            return self.alias(base, name, version).meaning.digest
        return self.resolve(base, name, version).digest

    def fetch(self, version: AdapterVersion, folder: Path, *, durable: bool = True) -> Path:
        """Copy a version's files into `folder`, checked, and return it. One file appears after the other, each whole;
        after a crash of the machine too, where they are `durable`.

        Raises:
            StorageCorrupt: a file is not what was published.
        """
        prefix = self.prefix(version)
        for file, sha256 in _sha256s(version).items():
            self.storage.fetch(prefix + file, folder / file, sha256=sha256, durable=durable)
        return folder

    def contents(self, version: AdapterVersion) -> dict[str, bytes]:
        """Return a version's files, checked.

        Raises:
            StorageCorrupt: a file is not what was published.
        """
        prefix = self.prefix(version)
        return {file: self.storage.get(prefix + file, sha256=sha256) for file, sha256 in _sha256s(version).items()}

    @contextmanager
    def files(self, version: AdapterVersion, cache: DiskCache | None = None) -> Iterator[Path]:
        """Yield a folder with a version's files, checked: the storage's own where it has folders, or one in `cache`,
        where they are kept. It is read during the block.

        Raises:
            StorageCorrupt: a file is not what was published.
        """
        with ExitStack() as stack:
            folder = self.storage.folder(self.prefix(version), _sha256s(version))
            if folder is None and cache is not None:
                with suppress(OSError):  # a disk that is full, or cannot be written
                    folder = stack.enter_context(cache.using(version.digest, _sha256s(version), self._fetch(version)))
            if folder is None:
                folder = self.fetch(version, Path(stack.enter_context(TemporaryDirectory())), durable=False)
            yield folder

    def hold(self, version: AdapterVersion, cache: DiskCache) -> Path:
        """Return the folder in `cache` that has a version's files, checked, as long as this process lives.

        Raises:
            StorageCorrupt: a file is not what was published.
        """
        return cache.hold(version.digest, _sha256s(version), self._fetch(version))

    def versions(self, base: str, name: str) -> list[str]:
        """Return the ids of the versions that exist, in no particular order of time."""
        keys = self.storage.list(adapter_versions_prefix(self.tenant, base, name))
        return [key.split("/")[-2] for key in keys if key.endswith(f"/{MANIFEST}")]

    def list_versions(self, base: str, name: str) -> list[AdapterVersion]:
        """Return an adapter's versions, the oldest first: two small reads each. Raises AdapterNotFound."""
        ids = self.versions(base, name)
        if not ids:  # else it is there, be it without `latest`, as where deleting it was interrupted
            self.alias(base, name, LATEST)

        def read(version: str) -> AdapterVersion | None:
            try:
                found = self._read(base, name, version)
            except StorageNotFound:  # deleted meanwhile
                return None
            return replace(found, number=self._number(self.prefix(found)))

        with ThreadPoolExecutor(READERS) as readers:
            found = [version for version in readers.map(read, ids) if version is not None]
        return sorted(found, key=lambda version: (version.number or 0, version.manifest["created_at"]))

    def with_versions(self) -> set[tuple[str, str]]:
        """Return base and name of every adapter that has versions, be it without any alias."""
        return {owner_of_version(key)[1:] for key in self.storage.list(adapters_prefix(self.tenant))}

    def number(self, version: AdapterVersion) -> int | None:
        """Return a version's number; None where it has none."""
        return version.number or self._number(self.prefix(version))

    def prefix(self, version: AdapterVersion) -> str:
        """Return the beginning of the keys of a version's files."""
        return adapter_prefix(self.tenant, version.base, version.name, version.version)

    def has(self, version: AdapterVersion) -> bool:
        """Return whether a version still exists."""
        return self.storage.exists(self.prefix(version) + MANIFEST)

    def _document(
        self, base: str, name: str, files: Mapping[str, bytes], manifest: Mapping[str, Any]
    ) -> tuple[str, bytes]:
        """Return the id of the version with this content, and its manifest as it is stored. Raises ValueError."""
        reserved = sorted(set(RESERVED) & manifest.keys())
        if reserved:
            raise ValueError(f"the manifest's keys {', '.join(reserved)} are written by the registry; leave them out")
        entries = {file: _entry(file, content) for file, content in sorted(files.items())}
        if not entries:
            raise ValueError(f"{base}:{name} has no files to publish")
        digest = content_digest(entries)
        version = version_of(digest)
        own = (entries, digest, version, base, name, self.tenant, time.time())
        return version, _json({**manifest, **dict(zip(RESERVED, own, strict=True))})

    def _files(self, prefix: str) -> set[str]:
        return {key.removeprefix(prefix) for key in self.storage.list(prefix)}

    def _fetch(self, version: AdapterVersion) -> Fetch:
        prefix, sha256s = self.prefix(version), _sha256s(version)

        def fetch(file: str, path: Path) -> None:
            self.storage.fetch(prefix + file, path, sha256=sha256s[file], durable=False)

        return fetch

    def _meant(self, base: str, name: str, version: str) -> tuple[int | None, str]:
        """Return number, where that costs nothing, and id of what somebody names by id, number or alias. Raises
        StorageNotFound, AdapterNotFound.
        """
        if _is_id(version):
            return None, version
        if _is_number(version):
            claim = self.storage.get(number_key(self.tenant, base, name, int(version)))
            return int(version), json.loads(claim)["version"]
        meaning = self.alias(base, name, version).meaning
        return meaning.number, meaning.version

    def _number(self, prefix: str) -> int | None:
        """Return a version's number; None where it has none, or whoever gave it one died just then."""
        content = self._content(prefix + NUMBER)
        return None if content is None else int(content)

    def _claim_number(self, base: str, name: str, version: str, above: int) -> int:
        """Return the version's number above this one: the next that is free, or one that it was given already, by
        another publisher of the same content.
        """
        claim = _json({"version": version})
        for number in itertools.count(above + 1):
            key = number_key(self.tenant, base, name, number)
            if self.storage.put(key, claim, if_absent=True) or json.loads(self.storage.get(key))["version"] == version:
                return number
        raise AssertionError("there is always another number")

    def _read(self, base: str, name: str, version: str) -> AdapterVersion:
        key = adapter_prefix(self.tenant, base, name, version) + MANIFEST
        try:
            manifest = json.loads(self.storage.get(key))
            digest = content_digest(manifest["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise StorageCorrupt(f"{key} is damaged ({error!r}); restore it, or delete it and publish again") from error
        if digest != manifest.get("digest") or version_of(digest) != version:
            raise StorageCorrupt(f"{key} is damaged: it lists other files; restore it, or delete it and publish again")
        return AdapterVersion(base, name, version, digest, manifest)


def _sha256s(version: AdapterVersion) -> dict[str, str]:
    return {file: entry["sha256"] for file, entry in version.manifest["files"].items()}


def content_digest(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the sha256 (hex) over the sorted file names with the sha256 of each file."""
    lines = [f"{file}\n{entries[file]['sha256']}\n" for file in sorted(entries)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def version_of(digest: str) -> str:
    """Return the id of the version with the content of this digest."""
    return digest[:VERSION_DIGITS]


def is_fixed(version: str) -> bool:
    """Return whether what stands behind the @ means one version for ever: an id or a number, and no alias."""
    return _is_id(version) or _is_number(version)


def _is_number(version: str) -> bool:
    return re.fullmatch(r"[1-9][0-9]{0,14}", version) is not None


def _is_id(version: str) -> bool:
    return re.fullmatch(rf"[0-9a-f]{{{VERSION_DIGITS}}}", version) is not None


def _entry(file: str, content: bytes) -> dict[str, Any]:
    if "/" in file or file in (MANIFEST, NUMBER):
        raise ValueError(f"{file!r} cannot be a file of an adapter: use a plain name other than {MANIFEST} or {NUMBER}")
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True).encode()
