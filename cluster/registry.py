"""Adapter versions and their aliases: where training and serving meet.

    adapters/<tenant>/<base>/<name>/<version>/<files>, manifest.json      never changes once the manifest is there
    aliases/<tenant>/<base>/<name>/latest.json                            names the version of the last publish
    published/<tenant>.json                                               what was published last, of all adapters

A publish writes the files, then the manifest, which makes the version exist, then the alias, which makes it the latest;
then it says so, for those who serve: one small read tells them that a name may mean something else now.
So a reader finds all of a version or nothing, wherever the writer is killed, and publishing again completes it.
A version is the digest of its content: the same files are the same version, whoever publishes them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.storage.base import Storage, StorageCorrupt, StorageNotFound
from cluster.storage.disk_cache import DiskCache
from cluster.storage.keys import (
    adapter_of_alias,
    adapter_prefix,
    adapter_versions_prefix,
    alias_key,
    aliases_prefix,
    last_published_key,
)

LATEST = "latest"
PUBLIC = "public"
"""The tenant whose adapters every tenant sees."""
MANIFEST = "manifest.json"
RESERVED = ("files", "digest", "version", "base", "name", "tenant", "created_at")  # of the manifest: the registry's own
VERSION_DIGITS = 16  # of the digest: a chance of 1 in 10^9 that two of 200,000 versions of one adapter are the same
NAMES_SHOWN = 20
READERS = 16


@dataclass(frozen=True)
class AdapterVersion:
    """One published version: `digest` (sha256, hex) identifies its content, `version` is the beginning of that.

    `manifest` holds `files` {name: {sha256, size in bytes}}, `digest`, `version`, `base`, `name`, `tenant`,
    `created_at` (seconds since 1970) and what the publisher added.
    """

    base: str
    name: str
    version: str
    digest: str
    manifest: dict[str, Any]


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter in a listing: its latest version, and when that was first published (seconds since 1970)."""

    base: str
    name: str
    version: str
    digest: str
    created_at: float


@dataclass(frozen=True)
class Publication:
    """That `<base>:<name>` is the content of this digest since `at` (seconds since 1970)."""

    base: str
    name: str
    digest: str
    at: float


class AdapterNotFound(LookupError):  # noqa: N818
    """No such adapter or version; `known` are the names (`<base>:<adapter>`), or the adapter's versions, that exist."""

    def __init__(self, wanted: str, known: tuple[str, ...]) -> None:
        super().__init__(wanted, known)
        self.wanted, self.known = wanted, known

    def __str__(self) -> str:
        more = f" and {len(self.known) - NAMES_SHOWN} more" if len(self.known) > NAMES_SHOWN else ""
        return f"there is no {self.wanted}; published: {', '.join(self.known[:NAMES_SHOWN]) or 'nothing yet'}{more}"


class AdapterRegistry:
    """The adapters of one tenant."""

    def __init__(self, storage: Storage, tenant: str = "default") -> None:
        self.storage = storage
        self._tenant = tenant

    def of(self, tenant: str) -> AdapterRegistry:
        """Return the registry of another tenant in the same storage, or this one where it is the same tenant."""
        return self if tenant == self._tenant else AdapterRegistry(self.storage, tenant)

    def publish(self, base: str, name: str, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> AdapterVersion:
        """Publish files as a version of `<base>:<name>`, and make it the latest.

        Returns what readers see: of publishes of the same content, the first one's manifest stays.

        Raises:
            ValueError: no files, a file name with a slash, or a manifest key that is the registry's own.
        """
        reserved = sorted(set(RESERVED) & manifest.keys())
        if reserved:
            raise ValueError(f"the manifest's keys {', '.join(reserved)} are written by the registry; leave them out")
        entries = {file: _entry(file, content) for file, content in sorted(files.items())}
        if not entries:
            raise ValueError(f"{base}:{name} has no files to publish")
        digest = content_digest(entries)
        version = version_of(digest)
        prefix = adapter_prefix(self._tenant, base, name, version)
        if not self.storage.exists(prefix + MANIFEST):
            for file, content in files.items():
                self.storage.put(prefix + file, content)
            own = (entries, digest, version, base, name, self._tenant, time.time())
            document = {**manifest, **dict(zip(RESERVED, own, strict=True))}
            self.storage.put(prefix + MANIFEST, _json(document), if_absent=True)
        published = self._read(base, name, version)
        pointer = {"version": version, "digest": digest, "created_at": published.manifest["created_at"]}
        self.storage.put(alias_key(self._tenant, base, name, LATEST), _json(pointer))
        told = Publication(base, name, digest, time.time())
        self.storage.put(last_published_key(self._tenant), _json(asdict(told)))
        return published

    def resolve(self, base: str, name: str, version: str = LATEST) -> AdapterVersion:
        """Return the version of this id, or the one that `latest` is now.

        Raises:
            AdapterNotFound: naming what exists.
            StorageCorrupt: its manifest is not what was published.
        """
        if not base or not name:
            raise AdapterNotFound(f"adapter {base}:{name}", tuple(self._names()))
        version = self._latest(base, name)["version"] if version == LATEST else version
        try:
            return self._read(base, name, version)
        except StorageNotFound:
            raise AdapterNotFound(f"version {version} of {base}:{name}", tuple(self.versions(base, name))) from None

    def digest(self, base: str, name: str, version: str = LATEST) -> str:
        """Return the digest of what `resolve` would; `latest` costs one small read. Raises what that does."""
        if version == LATEST and base and name:
            return str(self._latest(base, name)["digest"])
        return self.resolve(base, name, version).digest

    def last_published(self) -> Publication | None:
        """Return what was published last, of all adapters; None where nothing was yet."""
        try:
            return Publication(**json.loads(self.storage.get(last_published_key(self._tenant))))
        except StorageNotFound:
            return None

    def fetch(self, version: AdapterVersion, folder: Path) -> Path:
        """Copy a version's files into `folder`, checked, and return it. One file appears after the other, each whole.

        Raises:
            StorageCorrupt: a file is not what was published.
        """
        prefix = adapter_prefix(self._tenant, version.base, version.name, version.version)
        for file, entry in version.manifest["files"].items():
            self.storage.fetch(prefix + file, folder / file, sha256=entry["sha256"])
        return folder

    def contents(self, version: AdapterVersion, cache: DiskCache | None = None) -> dict[str, bytes]:
        """Return a version's files, checked; those that `cache` has come from there, and others are kept in it.

        Raises:
            StorageCorrupt: a file is not what was published.
        """
        prefix = adapter_prefix(self._tenant, version.base, version.name, version.version)
        contents = {}
        for file, entry in version.manifest["files"].items():
            content = cache.get(entry["sha256"]) if cache else None
            if content is None:
                content = self.storage.get(prefix + file, sha256=entry["sha256"])
                if cache:
                    cache.put(entry["sha256"], content)
            contents[file] = content
        return contents

    def fetch_once(self, version: AdapterVersion, cache_dir: Path) -> Path:
        """Return the folder below `cache_dir` that holds the files of this content; one process at a time fetches.

        Raises:
            StorageCorrupt: a file is not what was published.
        """
        folder = cache_dir / "versions" / version.digest
        folder.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not all((folder / file).exists() for file in version.manifest["files"]):
                self.fetch(version, folder)
        return folder

    def versions(self, base: str, name: str) -> list[str]:
        """Return the ids of the versions that exist, in no particular order of time."""
        keys = self.storage.list(adapter_versions_prefix(self._tenant, base, name))
        return [key.split("/")[-2] for key in keys if key.endswith(f"/{MANIFEST}")]

    def list_adapters(self) -> list[AdapterEntry]:
        """Return every adapter with its latest version, sorted by base and name: one small read each."""
        keys = self.storage.list(aliases_prefix(self._tenant))
        with ThreadPoolExecutor(READERS) as readers:
            pointers = [json.loads(content) for content in readers.map(self.storage.get, keys)]
        entries = [
            AdapterEntry(*adapter_of_alias(key)[:2], pointer["version"], pointer["digest"], pointer["created_at"])
            for key, pointer in zip(keys, pointers, strict=True)
        ]
        return sorted(entries, key=lambda entry: (entry.base, entry.name))

    def _latest(self, base: str, name: str) -> dict[str, Any]:
        try:
            pointer: dict[str, Any] = json.loads(self.storage.get(alias_key(self._tenant, base, name, LATEST)))
        except StorageNotFound:
            raise AdapterNotFound(f"adapter {base}:{name}", tuple(self._names())) from None
        return pointer

    def _names(self) -> list[str]:
        keys = self.storage.list(aliases_prefix(self._tenant))
        return sorted(":".join(adapter_of_alias(key)[:2]) for key in keys)

    def _read(self, base: str, name: str, version: str) -> AdapterVersion:
        key = adapter_prefix(self._tenant, base, name, version) + MANIFEST
        try:
            manifest = json.loads(self.storage.get(key))
            digest = content_digest(manifest["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise StorageCorrupt(f"{key} is damaged ({error!r}); restore it, or delete it and publish again") from error
        if digest != manifest.get("digest") or version_of(digest) != version:
            raise StorageCorrupt(f"{key} is damaged: it lists other files; restore it, or delete it and publish again")
        return AdapterVersion(base, name, version, digest, manifest)


def content_digest(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the sha256 (hex) over the sorted file names with the sha256 of each file."""
    lines = [f"{file}\n{entries[file]['sha256']}\n" for file in sorted(entries)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def version_of(digest: str) -> str:
    """Return the id of the version with the content of this digest."""
    return digest[:VERSION_DIGITS]


def _entry(file: str, content: bytes) -> dict[str, Any]:
    if "/" in file or file == MANIFEST:
        raise ValueError(f"{file!r} cannot be a file of an adapter: use a plain name other than {MANIFEST}")
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True).encode()
