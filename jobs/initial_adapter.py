"""The adapter that a job starts from: found when the job is admitted, copied to where every rank finds it.

    init_adapter: smollm2-135m:triage                   its latest version now; @<version> names one
    init_adapter: /adapters/triage, s3://bucket/triage  PEFT's two files

The copy lies below the digest of the files, written once, so that nobody changes or deletes a job's start afterwards.
With a published one goes the fingerprint of the base that it was trained on: a name may come to mean other weights.
"""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import suppress
from pathlib import Path

from cluster.registry import (
    LATEST,
    MANIFEST,
    PUBLIC,
    AdapterNotFound,
    AdapterRegistry,
    AdapterVersion,
    content_digest,
)
from cluster.settings import Settings
from cluster.storage.base import Storage, StorageCorrupt, StorageNotFound
from cluster.storage.directory import open_storage
from cluster.storage.keys import init_adapter_key
from jobs.spec import is_published_adapter
from lora_core.adapters.adapter import Adapter
from lora_core.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from lora_core.adapters.targets import AdaptableModules

FILES = (CONFIG_FILE, WEIGHTS_FILE)
FINGERPRINT_FILE = "base_fingerprint"


def fetch_initial(source: str, base: str, storage: Storage, settings: Settings, folder: Path) -> None:
    """Copy the files of `source` into `folder`; `base` is the short name of the job's base model.

    Raises:
        ValueError: there is no such adapter, or it belongs to another base; the sentence says what to give.
        StorageError: the store does not answer, or what it holds is damaged.
    """
    if is_published_adapter(source):
        _fetch_published(source, base, AdapterRegistry(storage, settings.tenant), folder)
        return
    fetch_files(source, folder)


def fetch_files(source: str, folder: Path) -> None:
    """Copy the files of a PEFT adapter's directory or s3:// prefix into `folder`, and the manifest that it may have.

    Raises:
        ValueError: they are not there.
        StorageError: the store does not answer, or what it holds is damaged.
    """
    for file in (*FILES, MANIFEST):
        try:
            if "://" in source:
                open_storage(source).fetch(file, folder / file)
            else:
                (folder / file).write_bytes((Path(source) / file).read_bytes())
        except (OSError, StorageNotFound):
            if file != MANIFEST:
                raise ValueError(f"{source} holds no {file}; give a PEFT adapter's directory or s3:// prefix") from None


def store_initial(storage: Storage, folder: Path) -> str:
    """Put the files where ranks find them; returns their digest."""
    digest = files_digest(folder)
    for file in (*FILES, FINGERPRINT_FILE):
        if (folder / file).exists():
            storage.put(init_adapter_key(digest, file), folder / file, if_absent=True)
    return digest


def load_initial(storage: Storage, digest: str, adaptable: AdaptableModules, fingerprint: str) -> Adapter:
    """Return the adapter of this digest, on the base of `adaptable`, whose weights have this fingerprint.

    Raises:
        StorageCorrupt: the files are others.
        AdapterFormatError: they do not fit the base.
        ValueError: it was trained on other weights.
    """
    with suppress(StorageNotFound):
        trained_on = storage.get(init_adapter_key(digest, FINGERPRINT_FILE)).decode()
        if trained_on != fingerprint:
            raise ValueError(
                f"init_adapter: it was trained on other weights ({trained_on[:12]}) than base_model names now"
                f" ({fingerprint[:12]}); give an adapter of these, or the base that it was trained on"
            )
    with tempfile.TemporaryDirectory() as folder:
        for file in FILES:
            storage.fetch(init_adapter_key(digest, file), Path(folder) / file)
        if files_digest(Path(folder)) != digest:
            raise StorageCorrupt(f"the adapter {digest[:16]} that the job starts from is damaged; submit the job again")
        return read_adapter(Path(folder), adaptable)


def _fetch_published(source: str, base: str, registry: AdapterRegistry, folder: Path) -> None:
    model, _, version = source.partition("@")
    trained_on, _, name = model.rpartition(":")
    if trained_on != base:
        raise ValueError(f"{source} belongs to the base {trained_on}, and this job's is {base}; give an adapter of it")
    try:
        registry, found = _found(registry, trained_on, name, version or LATEST)
        registry.fetch(found, folder)
    except AdapterNotFound as error:
        raise ValueError(str(error)) from None
    if (fingerprint := found.manifest.get("base_fingerprint")) is not None:
        (folder / FINGERPRINT_FILE).write_text(fingerprint)


def _found(registry: AdapterRegistry, base: str, name: str, version: str) -> tuple[AdapterRegistry, AdapterVersion]:
    """Return what a tenant's name means, its own or what is published to all, and where. Raises AdapterNotFound."""
    try:
        return registry, registry.resolve(base, name, version)
    except AdapterNotFound as error:
        public = registry.of(PUBLIC)
        if not error.has_others:  # an adapter of its own hides all versions of another's
            with suppress(AdapterNotFound):
                return public, public.resolve(base, name, version)
        raise


def files_digest(folder: Path) -> str:
    """Return the digest of a PEFT adapter, which is that of a version with these files."""
    shas = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in FILES}
    return content_digest({file: {"sha256": sha} for file, sha in shas.items()})
