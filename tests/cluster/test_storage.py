"""Storage: the same properties on a directory and on a real S3 server; then URLs, and what only a directory has."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.sources import fetch_url
from cluster.storage import s3 as storage_s3
from cluster.storage.base import Storage, StorageConfigError, StorageCorrupt, StorageError, StorageNotFound
from cluster.storage.directory import DirectoryStorage, open_storage
from cluster.storage.keys import (
    adapter_of_alias,
    adapter_prefix,
    alias_key,
    checkpoint_marker_key,
    checkpoint_state_key,
    checkpoints_prefix,
    committed_checkpoint,
)
from cluster.storage.s3 import S3Storage

MIB = 2**20
ODD_NAMES = ["Qwen2.5 7B (chat)", "a/b", "..", ".", ".tmp-x", "50%", "a%2Fb", "a+b&c=d", "a:b@c"]
ODD_NAMES += ["ü", "日本語", "a?b#c", "a\\b", "x'\"*<>|", "\ud800", "\n\x00"]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def overwrite_behind_its_back(storage: Storage, key: str, content: bytes) -> None:
    """What a bad disk or a stray hand does: other content, and on S3 still the old sha256 beside it."""
    if isinstance(storage, S3Storage):
        target = {"Bucket": storage.bucket, "Key": storage.prefix + key}
        metadata = storage.client.head_object(**target)["Metadata"]
        storage.client.put_object(**target, Body=content, Metadata=metadata)
    else:
        assert isinstance(storage, DirectoryStorage)
        (storage.root / key).write_bytes(content)


# Both


def test_what_is_too_large_for_memory_is_a_stream_and_its_location_is_for_another_process(
    storage: Storage, tmp_path: Path
) -> None:
    storage.put("files/a b/large", b"abc" * 1000)
    with storage.open("files/a b/large") as stream:
        assert (stream.read(4), stream.read()) == (b"abca", b"bc" + b"abc" * 998)
    location = storage.location("files/a b/large")
    path = fetch_url(location, tmp_path / "large") if "://" in location else Path(location)
    assert path.read_bytes() == b"abc" * 1000
    with pytest.raises(StorageNotFound):
        storage.open("files/none")


def test_round_trip(storage: Storage, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "below" / "target"
    source.write_bytes(os.urandom(3 * MIB + 1))
    for key, content in {"a/bytes": b"\x00\xff", "a/empty": b"", "a/file": source}.items():
        expected = content if isinstance(content, bytes) else content.read_bytes()
        assert not storage.exists(key)
        assert storage.put(key, content)
        assert storage.exists(key)
        assert storage.get(key, sha256=sha256(expected)) == storage.get(key) == expected
        storage.fetch(key, target, sha256=sha256(expected))
        assert target.read_bytes() == expected
    assert storage.put("a/bytes", b"newer")
    assert storage.get("a/bytes") == b"newer"
    for _ in range(2):
        storage.delete("a/bytes")
        assert not storage.exists("a/bytes")
    assert storage.list() == ["a/empty", "a/file"]


def test_missing_objects(storage: Storage, tmp_path: Path) -> None:
    storage.put("folder/object", b"")
    kept = tmp_path / "kept"
    kept.write_bytes(b"old")
    for key in ("nothing", "folder", "folder/object2", "folder/object/below", "x" * 2000):
        with pytest.raises(StorageNotFound, match="has no"):
            storage.get(key)
        with pytest.raises(StorageNotFound, match="has no"):
            storage.fetch(key, kept)
    assert not storage.exists("folder")
    assert kept.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["kept"]


def test_list_takes_any_prefix_and_sorts(storage: Storage) -> None:
    keys = ["a/b/c", "a/b", "a.json", "a b/c", "ab/c", "b/ü", "b/%C3%BC"]
    keys.remove("a/b")  # a file beside a folder of its name: S3 can, a directory cannot, the layout never does
    for key in keys:
        storage.put(key, key.encode())
    for prefix in ("", "a", "a/", "a/b/", "a/b/c", "a/x", "b", "b/%", "zz/", "zz"):
        assert storage.list(prefix) == sorted(key for key in keys if key.startswith(prefix)), prefix


def test_list_is_complete_past_one_page(storage: Storage) -> None:
    keys = [f"{number % 7}/{number}" for number in range(1_100)]  # an S3 page has 1,000
    with ThreadPoolExecutor(8) as writers:
        list(writers.map(lambda key: storage.put(key, b""), keys))
    assert storage.list() == sorted(keys)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_one_part_of_a_key(storage: Storage, name: str) -> None:
    prefix, alias = adapter_prefix("tenant", name, "adapter", "0123"), alias_key("tenant", name, "adapter", "latest")
    assert prefix.count("/") == 5
    assert adapter_of_alias(alias) == (name, "adapter", "latest")
    for key in (f"{prefix}file", alias):
        storage.put(key, key.encode())
        assert storage.get(key) == key.encode()
    assert storage.list() == sorted([f"{prefix}file", alias])
    assert storage.list(prefix) == [f"{prefix}file"]


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "./a", ".tmp-1", "a/.tmp-1/b"])
def test_keys_stay_below_the_root(storage: Storage, tmp_path: Path, key: str) -> None:
    uses: list[Callable[[], object]] = [
        lambda: storage.put(key, b""),
        lambda: storage.get(key),
        lambda: storage.fetch(key, tmp_path / "x"),
        lambda: storage.exists(key),
        lambda: storage.delete(key),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="is no storage key"):
            use()
    with pytest.raises(ValueError, match="is no storage key"):
        storage.list("../")


@pytest.mark.parametrize("damaged", [b"", b"conten", b"Content", b"content and more"])
def test_damage_is_refused_on_reading(storage: Storage, tmp_path: Path, damaged: bytes) -> None:
    expected = sha256(b"content")
    storage.put("key", b"content")
    overwrite_behind_its_back(storage, "key", damaged)
    target = tmp_path / "target"
    target.write_bytes(b"old")
    with pytest.raises(StorageCorrupt, match="key is damaged"):
        storage.get("key", sha256=expected)
    with pytest.raises(StorageCorrupt, match="key is damaged"):
        storage.fetch("key", target, sha256=expected)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["target"]
    if isinstance(storage, S3Storage):  # which has kept the sha256 itself
        with pytest.raises(StorageCorrupt, match="key is damaged"):
            storage.get("key")
        with pytest.raises(StorageCorrupt, match="key is damaged"):
            storage.fetch("key", target)


def test_one_of_many_conditional_writers_wins(storage: Storage) -> None:
    writers, rounds = 8, 5
    for round_ in range(rounds):
        fresh = open_storage(storage.url)  # the first use, of all threads at once, is part of the race
        barrier = threading.Barrier(writers)

        def write(
            number: int, store: Storage = fresh, start: threading.Barrier = barrier, key: str = f"{round_}"
        ) -> bool:
            start.wait()
            return store.put(key, f"{number}".encode(), if_absent=True)

        with ThreadPoolExecutor(writers) as pool:
            won = list(pool.map(write, range(writers)))
        assert won.count(True) == 1
        assert storage.get(f"{round_}") == f"{won.index(True)}".encode()
    assert storage.list() == sorted(f"{round_}" for round_ in range(rounds))


def test_conditional_write_of_something_large(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_s3, "MULTIPART_BYTES", 5 * MIB)  # boto3's upload in parts has no condition
    source = tmp_path / "source"
    source.write_bytes(os.urandom(6 * MIB))
    assert storage.put("key", source, if_absent=True)
    assert not storage.put("key", b"other", if_absent=True)
    assert storage.get("key") == source.read_bytes()


def test_readers_see_whole_objects_while_they_are_replaced(storage: Storage, tmp_path: Path) -> None:
    contents = [bytes([number]) * (3 * MIB) for number in range(2)]
    storage.put("key", contents[0])
    done = threading.Event()

    def rewrite() -> None:
        for number in range(30):
            storage.put("key", contents[number % 2])
        done.set()

    with ThreadPoolExecutor(1) as writer:
        written = writer.submit(rewrite)
        reads = 0
        while not done.is_set() or reads < 5:
            assert storage.get("key") in contents
            assert storage.list() == ["key"]
            reads += 1
        written.result()


KILLED_WRITER = """
import os, sys
from cluster.storage import directory, s3
from cluster.storage.directory import open_storage

def die(*_, **__):
    os.kill(os.getpid(), 9)

s3.MULTIPART_BYTES = s3.PART_BYTES = 5 * 2**20
storage = open_storage(sys.argv[1])
if sys.argv[1].startswith("s3"):
    storage.client.meta.events.register("before-send.s3.CompleteMultipartUpload", die)
else:
    directory.sync_file = die
storage.put("a/key", b"n" * 12 * 2**20)
"""


def half_written(storage: Storage) -> int:
    """How many unfinished writes lie in a storage."""
    if isinstance(storage, S3Storage):
        uploads = storage.client.list_multipart_uploads(Bucket=storage.bucket).get("Uploads", [])
        return sum(upload["Key"].startswith(storage.prefix) for upload in uploads)
    assert isinstance(storage, DirectoryStorage)
    return sum(path.name.startswith(".tmp-") for path in files_below(storage.root))


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_killed_writer_leaves_nothing_to_see(storage: Storage, before: bytes | None) -> None:
    if before is not None:
        storage.put("a/key", before)
    command = [sys.executable, "-c", KILLED_WRITER, storage.url]
    child = subprocess.run(command, cwd=Path(__file__).parents[2], check=False, timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert half_written(storage) == 1
    assert storage.list() == storage.list("a/") == ([] if before is None else ["a/key"])
    assert storage.exists("a/key") == (before is not None)
    if before is not None:
        assert storage.get("a/key") == before
    assert storage.put("a/key", b"new")
    assert storage.get("a/key") == b"new"


def test_storages_pickle(storage: Storage) -> None:
    storage.put("key", b"content")
    copy = pickle.loads(pickle.dumps(storage))
    assert type(copy) is type(storage)
    assert copy.get("key") == b"content"


def test_errors_pickle(storage: Storage) -> None:
    storage.put("key", b"content")
    uses: dict[type[StorageError], Callable[[], object]] = {
        StorageNotFound: lambda: storage.get("nothing"),
        StorageCorrupt: lambda: storage.get("key", sha256=sha256(b"")),
        StorageConfigError: lambda: open_storage("ftp://x"),
    }
    for kind, use in uses.items():
        with pytest.raises(kind) as caught:
            use()
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (type(copy), str(copy)) == (kind, str(caught.value))


def test_check_passes_and_leaves_nothing(storage: Storage) -> None:
    storage.check()
    assert storage.list() == []


def test_checkpoint_markers_are_told_from_checkpoints() -> None:
    marker = checkpoint_marker_key("job-1", 2, 30)
    assert marker.startswith(checkpoints_prefix("job-1"))
    assert committed_checkpoint(marker) == (2, 30)
    assert committed_checkpoint(checkpoint_state_key("job-1", 2, 30)) is None


# URLs


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("gs://bucket/x", "file:///absolute/path or s3://bucket/prefix"),
        ("/data/storage", "file:///absolute/path or s3://bucket/prefix"),
        ("", "file:///absolute/path or s3://bucket/prefix"),
        ("file://data/storage", "with three slashes"),
        ("file://", "with three slashes"),
        ("file://~/storage", "with three slashes"),
        ("s3://", "must be s3://bucket/prefix"),
        ("s3://ab/x", "3 to 63 lower-case"),
        ("s3://localhost:8333/bucket", "AWS_ENDPOINT_URL_S3"),
        ("s3://bucket/x?endpoint_override=localhost", "AWS_ENDPOINT_URL_S3"),
        ("s3://KEY:SECRET@bucket/x", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_bad_urls_say_what_to_write(url: str, advice: str) -> None:
    with pytest.raises(StorageConfigError) as caught:
        open_storage(url)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "SECRET@" not in str(caught.value)


def test_urls_with_and_without_prefix(tmp_path: Path) -> None:
    spaced = open_storage((tmp_path / "with space%").as_uri())
    assert isinstance(spaced, DirectoryStorage)
    assert spaced.root == tmp_path / "with space%"
    places = {url: open_storage(url) for url in ("s3://bucket", "s3://bucket/", "s3://bucket/a/b", "s3://bucket/a/b/")}
    prefixes = [place.prefix for place in places.values() if isinstance(place, S3Storage)]
    assert prefixes == ["", "", "a/b/", "a/b/"]


# Directory


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = os.fsync, Path.replace

    def record_sync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        events.append(f"sync {path.name if path.is_dir() else path.parent.name + '/file'}")
        sync(handle)

    def record_rename(path: Path, target: Path) -> Path:
        assert path.parent == target.parent
        events.append("rename")
        return rename(path, target)

    storage = open_storage((tmp_path / "root").as_uri())
    storage.put("a/other", b"")
    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_rename)
    storage.put("a/key", b"content")
    assert events == ["sync a/file", "rename", "sync a"]
    events.clear()
    storage.put("new/folder/key", b"content")
    assert events == ["sync root", "sync new", "sync folder/file", "rename", "sync folder"]


def test_a_writer_that_comes_between_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last look at the name and taking it, whichever call takes it."""
    storage = open_storage((tmp_path / "root").as_uri())
    link, rename = os.link, Path.replace

    def come_first(take: Callable[[Path, Path], object]) -> Callable[[Path, Path], object]:
        def call(source: Path, target: Path) -> object:
            target.write_bytes(b"first")
            return take(source, target)

        return call

    monkeypatch.setattr(os, "link", come_first(link))
    monkeypatch.setattr(Path, "replace", come_first(rename))
    assert not storage.put("key", b"second", if_absent=True)
    assert storage.get("key") == b"first"


def test_directory_problems_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write a: File exists"):
        open_storage((tmp_path / "file" / "root").as_uri()).put("a", b"")

    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root, as who tests run in containers, may write everywhere
    with pytest.raises(StorageConfigError, match=r"may not write .*/new; change its permissions, or the storage URL"):
        open_storage((tmp_path / "new").as_uri()).check()


def test_an_unreadable_source_is_not_blamed_on_the_storage(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.put("key", tmp_path / "nothing")
