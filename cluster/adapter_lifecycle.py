"""What becomes of versions once they are published: promoted, rolled back, deleted, and dropped when they are old.

    promote(registry, version, "prod", gates)      moves an alias, if the version passes
    roll_back(registry, base, name, "prod")        to what it meant before
    delete_version(registry, version)              refused while an alias means it

Whoever serves notices each of them as it notices a new version.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cluster.aliases import LATEST, Alias, Gate, alias_problem
from cluster.registry import MANIFEST, NUMBER, AdapterNotFound, AdapterRegistry, AdapterVersion
from cluster.storage.base import Storage, StorageCorrupt, StorageNotFound


class AdapterConflict(ValueError):  # noqa: N818
    """What an adapter is asked for goes against what else is true of it; the sentence says what to do first."""


def promote(
    registry: AdapterRegistry, version: AdapterVersion, alias: str, gates: Sequence[Gate] | None = None
) -> Alias:
    """Let an alias mean this version, which must pass `gates`; they stay with the alias (None: those that it has).

    Raises:
        AdapterConflict: it does not pass, is just being deleted, or the alias is no such name.
    """
    base, name = version.base, version.name
    if (problem := alias_problem(alias)) is not None:
        raise AdapterConflict(problem)
    version = replace(version, number=registry.number(version))
    try:
        before: Alias | None = registry.alias(base, name, alias)
    except AdapterNotFound:
        before = None
    kept = before.gates if before is not None and gates is None else tuple(gates or ())
    metrics = version.manifest.get("metrics", {})
    if problems := [problem for gate in kept if (problem := gate.problem(metrics)) is not None]:
        raise AdapterConflict(f"{version} does not become {base}:{name}@{alias}: {'; '.join(problems)}")
    moved = before.moved(version.meaning, time.time()) if before is not None else Alias(version.meaning)
    written = registry.write_alias(base, name, alias, replace(moved, gates=kept))
    # After the alias is written, as whoever deletes looks at aliases after the manifest is gone: one sees the other.
    if not registry.has(version):
        if before is not None:
            registry.write_alias(base, name, alias, before)
        else:
            registry.delete_alias(base, name, alias)
        raise AdapterConflict(f"{version} has just been deleted; promote another version")
    return written


def roll_back(registry: AdapterRegistry, base: str, name: str, alias: str) -> Alias:
    """Let an alias mean again what it meant before, the newest of it that exists; gates are not asked again.

    Raises:
        AdapterNotFound: there is no such alias.
        AdapterConflict: it never meant anything else that still exists.
    """
    alias_now = registry.alias(base, name, alias)
    for index in reversed(range(len(alias_now.former))):
        former = replace(alias_now.former[index], until=None)
        try:
            version = registry.resolve(base, name, former.version)
        except AdapterNotFound:
            continue
        moved = replace(alias_now, meaning=former, former=alias_now.former[:index])
        written = registry.write_alias(base, name, alias, moved)
        if registry.has(version):  # after the alias is written, as in `promote`
            return written
        registry.write_alias(base, name, alias, alias_now)
    raise AdapterConflict(f"{base}:{name}@{alias} has meant no other version that is still there; promote one")


def delete_version(registry: AdapterRegistry, version: AdapterVersion) -> None:
    """Delete a version; its number is never given again.

    Raises:
        AdapterConflict: an alias means it.
    """
    _refuse_named(registry, version)
    storage, prefix = registry.storage, registry.prefix(version)
    manifest = prefix + MANIFEST
    content = storage.get(manifest)
    with tempfile.TemporaryDirectory() as folder:
        copies = _copies(storage, prefix, [*version.manifest["files"], NUMBER], Path(folder))
        storage.delete(manifest)  # from now on it does not exist
        try:
            _refuse_named(registry, version)  # an alias that was moved to it meanwhile
        except AdapterConflict:
            _put_back(storage, copies)  # as somebody else may be deleting it, too
            storage.put(manifest, content, if_absent=True)
            raise
        for key in storage.list(prefix):
            if key != manifest:
                storage.delete(key)
        # Published again meanwhile, by somebody who may have found the files there that are gone now. Who comes later
        # finds them gone.
        if storage.exists(manifest):
            _put_back(storage, copies)
    registry.tell(version.base, version.name, None)


def delete_adapter(registry: AdapterRegistry, base: str, name: str) -> None:
    """Delete an adapter with all of its versions.

    Raises:
        AdapterNotFound: there is none.
        AdapterConflict: it has an alias beside `latest`.
    """
    aliases = registry.aliases(base, name)
    if LATEST not in aliases and not registry.versions(base, name):  # with some, deleting it was interrupted
        registry.alias(base, name, LATEST)
    if others := sorted(set(aliases) - {LATEST}):
        names = ", ".join(f"{base}:{name}@{alias}" for alias in others)
        raise AdapterConflict(f"{base}:{name} is not deleted while there is {names}; delete that first")
    registry.delete_alias(base, name, LATEST)
    for version in registry.versions(base, name):
        try:
            delete_version(registry, registry.resolve(base, name, version))
        except (AdapterNotFound, StorageNotFound):  # by somebody else
            continue


def drop_old_versions(registry: AdapterRegistry, seconds: float, kept: Collection[str] = ()) -> list[AdapterVersion]:
    """Delete versions that were published, and that an alias meant last, longer ago than this; but for what an alias
    means now, and digests in `kept`. Returns what it deleted.
    """
    dropped, before = [], time.time() - seconds
    for base, name in sorted(registry.with_versions()):
        aliases = registry.aliases(base, name).values()
        recent = {alias.meaning.version for alias in aliases}
        recent |= {one.version for alias in aliases for one in alias.former if (one.until or 0) > before}
        for version_id in set(registry.versions(base, name)) - recent:
            try:
                version = registry.resolve(base, name, version_id)
                if version.manifest["created_at"] < before and version.digest not in kept:
                    delete_version(registry, version)
                    dropped.append(version)
            except (AdapterNotFound, AdapterConflict, StorageNotFound):  # somebody else was faster
                continue
    return dropped


def _copies(storage: Storage, prefix: str, files: Sequence[str], folder: Path) -> dict[str, Path]:
    """Return copies of what is there below `prefix`, by key."""
    copies = {prefix + file: folder / file for file in files}
    for key, path in copies.items():
        with suppress(StorageNotFound, StorageCorrupt):
            storage.fetch(key, path)
    return {key: path for key, path in copies.items() if path.exists()}


def _put_back(storage: Storage, copies: Mapping[str, Path]) -> None:
    for key, path in copies.items():
        storage.put(key, path, if_absent=True)


def _refuse_named(registry: AdapterRegistry, version: AdapterVersion) -> None:
    aliases = registry.aliases(version.base, version.name).items()
    if names := sorted(name for name, alias in aliases if alias.meaning.version == version.version):
        raise AdapterConflict(
            f"{version} is not deleted while it is {' and '.join(names)} of {version.base}:{version.name};"
            " promote another version to that first"
        )
