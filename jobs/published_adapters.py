"""Published adapters beside the queue: what an unfinished job still needs is not deleted, and what nobody needs goes.

Adapters from elsewhere come in as training's do, after the same checks, and go out as a tar file or merged into their
base.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
import tempfile
import time
from pathlib import Path

from cluster.adapter_lifecycle import AdapterConflict, delete_adapter, delete_version, drop_old_versions
from cluster.aliases import LATEST
from cluster.registry import MANIFEST, RESERVED, AdapterRegistry, AdapterVersion
from cluster.settings import Settings
from cluster.sources import local_source
from cluster.storage.base import Storage
from cluster.storage.keys import (
    all_adapters_prefix,
    all_jobs_prefix,
    job_of_checkpoint,
    job_prefix,
    owner_of_version,
)
from jobs.errors import JobNotFoundError
from jobs.job import TERMINAL, Job, JobStatus
from jobs.spec import SpecError
from jobs.store.jobs import JobQueue

log = logging.getLogger("lora.scheduler")

DAY = 86_400.0
GRACE = 3600.0
"""Seconds after a job has ended in which what it left is its session's, which deletes checkpoints and writes logs."""
FORGOTTEN_AT_ONCE, MOST_FORGOTTEN = 100, 10_000
"""Jobs in one transaction, and in one sweep."""


def delete_model(registry: AdapterRegistry, queue: JobQueue, base: str, name: str, version: str | None) -> str:
    """Delete an adapter with all its versions (None), one of its aliases, or one version; returns what it was.

    Raises:
        AdapterNotFound: there is no such thing.
        AdapterConflict: an alias means it, or a job that has not ended needs it; the sentence says which.
    """
    model = f"{base}:{name}"
    if version is None:
        versions = registry.list_versions(base, name)
        for job in unfinished(queue, registry.tenant):
            if job.base == base and job.spec.adapter == name:
                raise AdapterConflict(f"{model} is not deleted while {job.id} trains it; cancel that first")
        for one in versions:
            _refuse_needed(queue, registry.tenant, one)
        delete_adapter(registry, base, name)
        return model
    if version in registry.aliases(base, name):
        if version == LATEST:
            raise AdapterConflict(f"{LATEST} cannot be deleted, as every publish moves it; delete {model} or a version")
        registry.delete_alias(base, name, version)
        return f"{model}@{version}"
    found = registry.resolve(base, name, version)
    _refuse_needed(queue, registry.tenant, found)
    delete_version(registry, found)
    return f"{model}@{version}"


def unfinished(queue: JobQueue, tenant: str | None = None) -> list[Job]:
    """Return the jobs of a tenant, or of all, that have not ended."""
    jobs = queue.list(statuses=set(JobStatus) - TERMINAL)
    return [job for job in jobs if tenant in (None, job.tenant)]


def sweep(settings: Settings, queue: JobQueue, storage: Storage) -> None:
    """Delete old versions of every tenant's adapters, checkpoints that jobs left when they ended, and old jobs."""
    tenants = {owner_of_version(key)[0] for key in storage.list(all_adapters_prefix())}
    needed = {job.init_adapter_sha for job in unfinished(queue)} - {None}
    for tenant in sorted(tenants):
        registry, seconds = AdapterRegistry(storage, tenant), settings.version_ttl_days * DAY
        for version in drop_old_versions(registry, seconds, {str(digest) for digest in needed}):
            log.info("event=version_dropped tenant=%s version=%s", tenant, version)
    for job_id, keys in _checkpoints(storage).items():
        if _ended_before(queue, job_id, time.time() - GRACE):
            for key in keys:
                storage.delete(key)
            log.info("job=%s event=checkpoints_dropped", job_id)
    _forget_old_jobs(queue, storage, time.time() - max(GRACE, settings.job_ttl_days * DAY))


def _forget_old_jobs(queue: JobQueue, storage: Storage, before: float) -> None:
    """Delete all that there is of jobs that ended before then, but what they published: their rows last, so that what
    is left by whoever dies in between is found again.
    """
    forgotten = 0
    while forgotten < MOST_FORGOTTEN and (ids := queue.ended_before(before, FORGOTTEN_AT_ONCE)):
        for job_id in ids:
            for key in storage.list(job_prefix(job_id)):
                storage.delete(key)
        queue.forget(ids)
        forgotten += len(ids)
        log.info("event=jobs_forgotten number=%d last=%s", len(ids), ids[-1])


def import_adapter(registry: AdapterRegistry, settings: Settings, source: str, base: str, name: str) -> AdapterVersion:
    """Publish the PEFT adapter of a directory or s3:// prefix as a version of `<base>:<name>`, checked as training's
    are: shapes and finite numbers, and where it was exported from a registry, files and the base's weights.

    Raises:
        SpecError: everything that keeps it from being served.
    """
    # Late: these import torch, which other commands and the scheduler can do without.
    from jobs.initial_adapter import FILES, fetch_files
    from lora_core.adapters.peft_format import adapter_files, read_adapter
    from lora_core.adapters.targets import AdaptableModules
    from lora_core.models.base import describe_base
    from lora_core.models.files import chat_template_hash, fingerprint_of, local_folder

    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / (Path(source).name or "adapter")
            folder.mkdir()
            fetch_files(source, folder)
            exported = _exported(folder)
            base_folder = local_folder(
                local_source(settings.resolve_base(base), settings.cache_dir), settings.cache_dir
            )
            model, tokenizer = describe_base(str(base_folder), settings.cache_dir)
            adaptable = AdaptableModules(model)
            adapter = read_adapter(folder, adaptable)
            fingerprint = fingerprint_of(base_folder, settings.cache_dir)
            if exported is None:
                own = {"base_fingerprint": fingerprint, "tokenizer": chat_template_hash(tokenizer)}
                manifest = {**own, "imported_from": source, "metrics": {}}
                return registry.publish(base, name, adapter_files(adapter, adaptable, base), manifest)
            if (trained_on := exported.get("base_fingerprint")) != fingerprint:
                raise ValueError(
                    f"it was trained on other weights ({str(trained_on)[:12]}) than {base} has ({fingerprint[:12]});"
                    " import it as an adapter of its own base"
                )
            files = {file: (folder / file).read_bytes() for file in FILES}
            kept = {key: value for key, value in exported.items() if key not in RESERVED}
            return registry.publish(base, name, files, kept)
    except ValueError as error:
        raise SpecError([str(error)], source) from error


def export_tar(registry: AdapterRegistry, version: AdapterVersion, path: Path) -> None:
    """Write a version's files and manifest as a tar file, the same bytes each time.

    Raises:
        StorageCorrupt: a file is not what was published.
    """
    contents = {**registry.contents(version), MANIFEST: json.dumps(version.manifest, indent=1, sort_keys=True).encode()}
    with tarfile.open(path, "w") as archive:
        for file, content in sorted(contents.items()):
            member = tarfile.TarInfo(f"{version.name}/{file}")
            member.size, member.mtime = len(content), int(version.manifest["created_at"])
            archive.addfile(member, io.BytesIO(content))


def export_merged(
    registry: AdapterRegistry, settings: Settings, version: AdapterVersion, folder: Path, precision: str
) -> None:
    """Write a version merged into its base, as a model directory, in `fp32` or `bf16`.

    Raises:
        SpecError: it does not belong to the base as it is here.
    """
    from lora_core.models.base import load_base
    from lora_core.models.merge import write_merged

    try:
        source = local_source(settings.resolve_base(version.base), settings.cache_dir)
        base = load_base(source, precision=precision, cache_dir=settings.cache_dir)  # type: ignore[arg-type]
        _refuse_other_weights(version, base.fingerprint)
        with tempfile.TemporaryDirectory() as scratch:
            write_merged(base, registry.fetch(version, Path(scratch)), folder)
    except ValueError as error:
        raise SpecError([str(error)], str(version)) from error


def export_gguf(registry: AdapterRegistry, settings: Settings, version: AdapterVersion, path: Path) -> None:
    """Write a version as llama.cpp loads it beside its base.

    Raises:
        SpecError: it does not belong to the base as it is here, or llama.cpp could not add it.
    """
    from lora_core.adapters.peft_format import read_adapter
    from lora_core.adapters.targets import AdaptableModules
    from lora_core.models.base import describe_base
    from lora_core.models.files import fingerprint_of, local_folder
    from lora_core.models.gguf_adapter import write_gguf_adapter

    try:
        source = local_source(settings.resolve_base(version.base), settings.cache_dir)
        folder = local_folder(source, settings.cache_dir)
        _refuse_other_weights(version, fingerprint_of(folder, settings.cache_dir))
        model, _ = describe_base(str(folder), settings.cache_dir)
        with tempfile.TemporaryDirectory() as scratch:
            adapter = read_adapter(registry.fetch(version, Path(scratch)), AdaptableModules(model))
        write_gguf_adapter(model.config, adapter, path)
    except ValueError as error:
        raise SpecError([str(error)], str(version)) from error


def _refuse_other_weights(version: AdapterVersion, fingerprint: str) -> None:
    if (trained_on := version.manifest.get("base_fingerprint")) not in (None, fingerprint):
        raise ValueError(
            f"it was trained on other weights ({str(trained_on)[:12]}) than {version.base} has here"
            f" ({fingerprint[:12]}); name those in LORA_BASE_MODELS"
        )


def _refuse_needed(queue: JobQueue, tenant: str, version: AdapterVersion) -> None:
    for job in unfinished(queue, tenant):
        if job.init_adapter_sha == version.digest:
            raise AdapterConflict(f"{version} is not deleted while {job.id} starts from it; cancel that first")


def _checkpoints(storage: Storage) -> dict[str, list[str]]:
    """Return the keys of all checkpoints by job."""
    found: dict[str, list[str]] = {}
    for key in storage.list(all_jobs_prefix()):
        if (job_id := job_of_checkpoint(key)) is not None:
            found.setdefault(job_id, []).append(key)
    return found


def _ended_before(queue: JobQueue, job_id: str, at: float) -> bool:
    """Whether a job of this database has ended before then; another's may run."""
    try:
        finished_at = queue.get(job_id).finished_at
    except JobNotFoundError:
        return False
    return finished_at is not None and finished_at < at


def _exported(folder: Path) -> dict[str, object] | None:
    """Return the manifest where the files were exported from a registry, which they must still be what it says of."""
    from jobs.initial_adapter import files_digest

    if not (folder / MANIFEST).exists():
        return None
    try:
        manifest: dict[str, object] = json.loads((folder / MANIFEST).read_text())
        digest = manifest["digest"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"its {MANIFEST} cannot be read ({error!r}); export it again, or leave that file out"
        ) from error
    if digest != files_digest(folder):
        raise ValueError(f"its files are not those of its {MANIFEST}; export it again, or leave that file out")
    return manifest
