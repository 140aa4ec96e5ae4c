"""Base models and datasets that lie in a bucket: fetched once, so that the rest reads plain files."""

from __future__ import annotations

import fcntl
import hashlib
from pathlib import Path

from cluster.storage.base import StorageConfigError
from cluster.storage.directory import open_storage

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def local_source(source: str, cache_dir: Path, *, weights: bool = True) -> str:
    """Return a source that `lora_core.models.base` can read: itself, or for an `s3://` prefix (or GGUF object) its
    local copy.

    Without `weights` only the small files come: config, tokenizer, templates.

    Raises:
        StorageError: the prefix holds nothing, or the store does not answer.
    """
    if "://" not in source:
        return source
    if source.endswith(".gguf"):
        return str(fetch_url(source, _folder(source, cache_dir) / source.rpartition("/")[2]))
    storage = open_storage(source)
    keys = storage.list()
    if "config.json" not in keys and "adapter_config.json" not in keys:  # of an adapter more can be said
        raise StorageConfigError(f"{source} holds no config.json: give the prefix of a Hugging Face model directory.")
    folder = _folder(source, cache_dir)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for key in keys:
            target = folder / key
            if (weights or not key.endswith(WEIGHT_SUFFIXES)) and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                storage.fetch(key, target)
    return str(folder)


def listed_files(source: str) -> list[str] | None:
    """Return the names of a bucket's files below an `s3://` prefix; None for a source of another kind.

    Raises:
        StorageError: the store does not answer.
    """
    return open_storage(source).list() if "://" in source and not source.endswith(".gguf") else None


def fetch_url(url: str, path: Path) -> Path:
    """Fetch one object by its full URL into `path`, unless that is there already."""
    if not path.exists():
        prefix, _, name = url.rpartition("/")
        open_storage(prefix).fetch(name, path)
    return path


def _folder(source: str, cache_dir: Path) -> Path:
    folder = cache_dir / "fetched" / hashlib.sha256(source.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder
