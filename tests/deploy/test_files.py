"""Files and uploads over HTTP with OpenAI's own client, on a directory and on S3, and what is left of what stops."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import FileDeleted, FileObject, Upload
from openai.types.uploads import UploadPart

from cluster.settings import Settings
from cluster.sources import fetch_url
from cluster.storage.base import StorageUnavailable
from cluster.storage.directory import open_storage
from deploy.api import file_store, files, uploads
from deploy.api.errors import ApiError
from deploy.api.file_store import FileStore
from jobs.store.api_keys import KeyTable, Scope
from jobs.store.database import Database
from jobs.store.files import FileTable
from tests.support.api_server import running_gateway
from tests.support.s3_server import S3Server

ROWS = b"".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}).encode() + b"\n" for n in range(50))


class Site:
    """A running gateway, the clients of two tenants, and what its storage and disk hold."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.table = FileTable(Database(settings.database_url))
        self.storage = open_storage(settings.storage_url)
        keys = KeyTable(Database(settings.database_url))
        train = frozenset({Scope.TRAIN})
        self.secrets = [keys.create(tenant, scopes)[1] for tenant, scopes in
                        (("acme", train), ("other", train), ("acme", frozenset({Scope.INFER})))]  # fmt: skip
        self.url = ""
        self.gateway: Any = None

    def client(self, number: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.secrets[number], max_retries=0)

    @property
    def store(self) -> FileStore:
        store: FileStore = self.gateway._files
        return store

    def stored(self) -> list[str]:
        return self.storage.list("files/") + self.storage.list("uploads/")

    def spooled(self) -> list[Path]:
        return list((self.settings.home / "incoming").iterdir())


@pytest.fixture(scope="module", params=["directory", "s3"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patched:
        url = (home / "storage").as_uri()
        if request.param == "s3":
            server: S3Server = request.getfixturevalue("s3_server")
            for name, value in server.environment.items():
                patched.setenv(name, value)
            url = f"s3://{server.bucket}/files"
        site = Site(Settings(home=home, base_models={"tiny": "/nowhere"}, storage_url=url))
        with running_gateway(site.settings) as (site.url, _, site.gateway):
            yield site


@pytest.fixture
def clean(site: Site) -> Iterator[Site]:
    """A test that leaves nothing has to begin with nothing."""
    for client in (site.client(0), site.client(1)):
        for file in client.files.list():
            client.files.delete(file.id)
    yield site


def upload(client: openai.OpenAI, content: bytes = ROWS, name: str = "rows.jsonl", **options: Any) -> FileObject:
    return client.files.create(file=(name, content), purpose="fine-tune", **options)


def test_every_method_of_files(clean: Site) -> None:
    client = clean.client()
    first = upload(client, expires_after={"anchor": "created_at", "seconds": 3600})
    assert isinstance(first, FileObject) and first.object == "file" and first.id.startswith("file-")
    assert (first.bytes, first.filename, first.purpose) == (len(ROWS), "rows.jsonl", "fine-tune")
    assert (first.status, first.status_details) == ("processed", None)
    assert first.expires_at == first.created_at + 3600 and abs(first.created_at - time.time()) < 60
    assert first.model_extra == {"sha256": hashlib.sha256(ROWS).hexdigest()}
    assert client.files.wait_for_processing(first.id) == client.files.retrieve(first.id) == first
    others = [upload(client, name=f"{n}.jsonl") for n in range(3)]
    assert others[0].expires_at is None
    assert [file.id for file in client.files.list()] == [file.id for file in (*others[::-1], first)]
    page = client.files.list(limit=2, order="asc", purpose="fine-tune")
    assert page.has_more and [file.id for file in page] == [first.id, *(file.id for file in others)]
    assert [file.id for file in client.files.list(after=others[1].id)] == [others[0].id, first.id]
    assert client.files.list(purpose="batch").data == []
    assert client.files.content(first.id).read() == ROWS
    deleted = client.files.delete(first.id)
    assert isinstance(deleted, FileDeleted) and (deleted.id, deleted.deleted, deleted.object) == (
        first.id,
        True,
        "file",
    )
    for ask in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(openai.NotFoundError, match="there is no file") as caught:
            ask(first.id)
        assert (caught.value.code, caught.value.param) == ("file_not_found", "file_id")
    assert len(clean.stored()) == 3 and clean.spooled() == []


def test_a_job_finds_a_file_by_its_id(clean: Site, tmp_path: Path) -> None:
    good, bad = upload(clean.client(), name="a.JSONL"), upload(clean.client(), b"{}\n")
    location = asyncio.run(clean.store.dataset_of("acme", good.id))
    path = fetch_url(location, tmp_path / "rows.jsonl") if "://" in location else Path(location)
    assert path.read_bytes() == ROWS and location.endswith(".jsonl")
    for tenant, file, status in (("acme", bad, 400), ("other", good, 404)):
        with pytest.raises(ApiError) as caught:
            asyncio.run(clean.store.dataset_of(tenant, file.id, "validation_file"))
        assert (caught.value.status, caught.value.param) == (status, "validation_file")


def test_mistakes_in_rows_are_told_and_the_file_is_kept(clean: Site) -> None:
    wrong = [{"prompt": "a"}, {"prompt": 1, "completion": ""}] * 80
    file = upload(clean.client(), ROWS * 9 + b"".join(json.dumps(row).encode() + b"\n" for row in wrong))
    assert file.status == "error" and file.status_details is not None
    first, *rest = file.status_details.splitlines()
    assert first == "line 451: column `completion`: missing; add it" and len(rest) == 100
    assert rest[-1] == "and 140 more" and "line 452: column `prompt`: a number; write a string" in rest
    assert clean.client().files.content(file.id).read().startswith(ROWS)


def test_a_large_file_is_checked_in_another_process(clean: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_store, "_SMALL_BYTES", 10)
    assert upload(clean.client()).status == "processed"
    assert upload(clean.client(), b'{"text": ""}\n').status_details == (
        "line 1: column `text`: empty; write the text, or leave the row out"
    )


def test_a_check_that_runs_out_of_memory_is_an_answer(clean: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the gateway reads nothing as a whole, however small it is."""
    monkeypatch.setattr(file_store, "check_file", lambda *_: 1 / 0)
    table, client = b"text\nx\n", clean.client()
    assert upload(client, table, "a.csv").status == "processed"
    monkeypatch.setattr(file_store.sys, "executable", "/bin/false")  # as one that is killed, it says nothing
    file = upload(client, table, "a.csv")
    said = "dataset a.csv: it takes too much memory to check; convert it to .jsonl"
    assert (file.status, file.status_details) == ("error", said)


@pytest.mark.parametrize(
    ("form", "param", "sentence"),
    [
        ({"data": {"purpose": "batch"}}, "purpose", "purpose is 'batch': files are for training here; send fine-tune"),
        ({"data": {}}, "purpose", "purpose is missing"),
        ({"files": {"file": ("a.pdf", b"x")}}, "file", "ends in '.pdf', which is not read; convert it to .jsonl"),
        ({"files": {"other": ("a.jsonl", b"x")}}, "file", "file is missing: send it as a file"),
        ({"data": {"purpose": "fine-tune", "expires_after[seconds]": "5"}}, "expires_after.anchor", "3600 to 2592000"),
        ({"data": {"purpose": "fine-tune", "x": "1"}}, "x", "x is no parameter here"),
        ({"files": [("file", ("a.jsonl", b"x")), ("file", ("b.jsonl", b"x"))]}, "file", "file is there twice"),
    ],
)
def test_what_is_wrong_with_a_form_is_said(clean: Site, form: dict[str, Any], param: str, sentence: str) -> None:
    client = clean.client()
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", ROWS)}, **form}
    headers = {"Authorization": f"Bearer {client.api_key}"}
    answer = client._client.post(f"{clean.url}/v1/files", headers=headers, **form)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and sentence in error["message"]
    assert answer.headers["x-should-retry"] == "false" and clean.stored() == clean.spooled() == []


def test_what_is_no_form_or_too_large_is_refused(clean: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    client = clean.client()
    with pytest.raises(openai.BadRequestError, match="must be a form"):
        client.post("/files", cast_to=object, body={"file": "x"})
    for query, said in (({"limit": 0}, "limit must be at least 1"), ({"order": "up"}, "order must be one of")):
        with pytest.raises(openai.BadRequestError, match=said) as caught:
            client.files.list(extra_query=query)
        assert caught.value.param == next(iter(query))
    with pytest.raises(openai.NotFoundError) as unknown:
        client.files.list(after="file-0").data  # noqa: B018
    assert unknown.value.param == "after"
    monkeypatch.setattr(files, "MOST_BYTES_UNPACED", 100)
    for rows in (ROWS, ROWS * 1500):
        with pytest.raises(openai.APIStatusError, match="is larger than 0 MiB: send it in parts") as large:
            upload(client, rows)
        assert (large.value.status_code, large.value.code) == (413, "file_too_large")
    parts = b"--b\r\n\r\n\r\n" * 33_000, b'--b\r\nContent-Disposition: form-data; name="%d"\r\n\r\n\r\n' * 1500
    headers = {"Authorization": f"Bearer {client.api_key}", "content-type": "multipart/form-data; boundary=b"}
    for empty in parts:
        answer = client._client.post(f"{clean.url}/v1/files", headers=headers, content=empty * 2)
        assert answer.status_code == 413 and "all but file is larger than 64 KiB" in answer.text
    assert clean.stored() == clean.spooled() == []


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_an_upload_that_stops_half_way_leaves_nothing(clean: Site) -> None:
    """The client dies in the middle of the body; or sends less than a form; or the storage is away at the end."""
    host, port = clean.url.removeprefix("http://").split(":")
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + ROWS * 10
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {clean.secrets[0]}\r\n"
        f"Content-Type: multipart/form-data; boundary=x\r\nConnection: close\r\nContent-Length: {{}}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head.format(10**8).encode() + body)
        until(lambda: len(clean.spooled()) == 1)
    until(lambda: clean.spooled() == [])
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head.format(len(body)).encode() + body)
        assert b"the form ends before its last boundary" in client.makefile("rb").read()
    with pytest.MonkeyPatch.context() as patched:

        def away(*_: Any, **__: Any) -> None:
            raise StorageUnavailable("the bucket does not answer")

        patched.setattr(clean.store._storage, "put", away)
        with pytest.raises(openai.InternalServerError, match="does not answer") as caught:
            upload(clean.client())
        assert (caught.value.status_code, caught.value.code) == (503, "storage_unavailable")
        assert caught.value.response.headers["retry-after"] == "1"
    assert clean.stored() == clean.spooled() == list(clean.client().files.list()) == []
    assert FileTable(clean.table._db, lambda: time.time() + 1e6).dead_files() == [], "nor is there a row"


def test_a_client_that_leaves_once_all_is_sent_finds_its_file(clean: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    put, going, go = clean.store._storage.put, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> bool:
        going.set()
        return go.wait(20) and put(*arguments)

    monkeypatch.setattr(clean.store._storage, "put", slow)
    with pytest.raises(openai.APITimeoutError):
        upload(clean.client().with_options(timeout=1.0))
    assert going.wait(20) and list(clean.client().files.list()) == [], "it is not all there yet"
    go.set()
    until(lambda: [file.status for file in clean.client().files.list()] == ["processed"])
    assert len(clean.stored()) == 1 and clean.spooled() == []


def test_what_is_begun_is_not_given_up_with_the_request() -> None:
    """Serve cancels that when its client leaves."""

    async def leave() -> None:
        closed, done = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            await asyncio.sleep(0.05)
            assert not closed.is_set(), "the file on disk is still there"
            done.set()

        stack = ExitStack()
        stack.callback(closed.set)
        asking = asyncio.create_task(files.to_the_end(work(), stack))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait_for(done.wait(), 5)
        await asyncio.wait_for(closed.wait(), 5)
        assert asking.cancelled()

    asyncio.run(leave())


def test_what_has_expired_or_was_left_is_swept(clean: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    client = clean.client()
    kept = upload(client)
    gone = upload(client, expires_after={"anchor": "created_at", "seconds": 3600})
    left = clean.table.begin("acme", "left.jsonl", "fine-tune", 1, "0", None)
    begun = client.uploads.create(bytes=5, filename="a.jsonl", mime_type="x", purpose="fine-tune")
    client.uploads.parts.create(begun.id, data=b"12345")
    now = time.time()
    for seconds, number in ((3000, 3), (4000, 2), (90_000, 1)):
        later = FileTable(clean.table._db, lambda seconds=seconds: now + seconds)  # type: ignore[misc]
        monkeypatch.setattr(clean.store, "table", later)
        assert (later.file("acme", gone.id) is not None) == (seconds == 3000)

        async def sweep_once() -> None:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(clean.store.sweep(), 1.0)

        asyncio.run(sweep_once())
        assert len(clean.stored()) == number
    assert later.upload("acme", begun.id) is None and clean.table.dead_files() == []
    assert clean.stored() == [f"files/acme/{kept.id}.jsonl"] and left.id not in str(clean.stored())


def test_every_method_of_uploads(clean: Site, tmp_path: Path) -> None:
    client = clean.client()
    begun = client.uploads.create(
        bytes=len(ROWS), filename="big.jsonl", mime_type="application/jsonl", purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )  # fmt: skip
    assert isinstance(begun, Upload) and (begun.status, begun.file, begun.bytes) == ("pending", None, len(ROWS))
    half = len(ROWS) // 2
    second = client.uploads.parts.create(begun.id, data=io.BytesIO(ROWS[half:]))
    first = client.uploads.parts.create(begun.id, data=ROWS[:half])
    client.uploads.parts.create(begun.id, data=ROWS[:half])  # whose answer was lost, say
    assert isinstance(second, UploadPart) and (second.object, second.upload_id) == ("upload.part", begun.id)
    for part_ids, md5, said in (
        ([first.id], None, "the upload was begun for"),
        ([first.id, "part_0"], None, "'part_0' is no part of this upload"),
        ([first.id, first.id], None, "is there twice"),
        ([first.id, second.id], "0" * 32, "the parts have the md5"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            client.uploads.complete(begun.id, part_ids=part_ids, **({"md5": md5} if md5 else {}))
    md5 = hashlib.md5(ROWS).hexdigest()
    done = client.uploads.complete(begun.id, part_ids=[first.id, second.id], md5=md5)
    assert done.status == "completed" and done.file is not None and done.file.status == "processed"
    assert client.files.content(done.file.id).read() == ROWS and done.file.filename == "big.jsonl"
    assert done.file.expires_at == done.file.created_at + 7200
    assert client.uploads.complete(begun.id, part_ids=[first.id, second.id]) == done, "the same, asked again"
    assert clean.stored() == [f"files/acme/{done.file.id}.jsonl"] and clean.spooled() == []
    (tmp_path / "chunked.jsonl").write_bytes(ROWS)
    chunked = client.uploads.upload_file_chunked(
        file=tmp_path / "chunked.jsonl", mime_type="application/jsonl", purpose="fine-tune", part_size=1000
    )
    assert chunked.file is not None and client.files.content(chunked.file.id).read() == ROWS


def test_a_part_that_comes_while_its_upload_ends_leaves_nothing(clean: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """In storage before the upload ends, or after."""
    client, store = clean.client(), clean.store
    put, end = store._storage.put, store.table.end_upload
    begun = client.uploads.create(**NEW)

    def put_late(*given: Any) -> None:
        client.uploads.cancel(begun.id)
        put(*given)

    with monkeypatch.context() as patched, pytest.raises(openai.BadRequestError, match="is completed or cancelled"):
        patched.setattr(store._storage, "put", put_late)
        client.uploads.parts.create(begun.id, data=b"1234")
    assert clean.stored() == []
    begun = client.uploads.create(**NEW)
    late = list[UploadPart]()

    def end_late(*given: Any) -> bool:
        late.append(client.uploads.parts.create(begun.id, data=b"1234"))
        return end(*given)

    monkeypatch.setattr(store.table, "end_upload", end_late)
    assert client.uploads.cancel(begun.id).status == "cancelled" and len(late) == 1 and clean.stored() == []


def test_slow_storage_and_a_slow_database_hold_nobody_else_up(clean: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    client, uploaders, pools = clean.client(), 20, set[str]()
    for owner, name in ((clean.store._storage, "put"), (clean.store.table, "begin")):
        going_on, slow = threading.Event(), getattr(owner, name)

        def wait(*given: Any, going_on: threading.Event = going_on, slow: Any = slow) -> Any:
            pools.add(threading.current_thread().name.partition("_")[0])
            going_on.wait(20)
            return slow(*given)

        with monkeypatch.context() as patched, ThreadPoolExecutor(uploaders) as threads:
            patched.setattr(owner, name, wait)
            uploads = [threads.submit(upload, client) for _ in range(uploaders)]
            until(lambda: len(clean.spooled()) == uploaders)
            try:
                assert list(client.with_options(timeout=5).files.list()) == []
            finally:
                going_on.set()
        for one in uploads:
            client.files.delete(one.result().id)
    assert pools == {"files", "gateway"}


def test_an_upload_that_is_cancelled_leaves_nothing(clean: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    client = clean.client()
    begun = client.uploads.create(bytes=4, filename="a.jsonl", mime_type="x", purpose="fine-tune")
    part = client.uploads.parts.create(begun.id, data=b"1234")
    assert client.uploads.cancel(begun.id).status == "cancelled" and clean.stored() == []
    for ask in (
        lambda: client.uploads.parts.create(begun.id, data=b"1"),
        lambda: client.uploads.complete(begun.id, part_ids=[part.id]),
        lambda: client.uploads.cancel(begun.id),
    ):
        with pytest.raises(openai.BadRequestError, match="is completed or cancelled"):
            ask()
    with pytest.raises(openai.BadRequestError) as caught:
        client.uploads.create(bytes=0, filename="a.exe", mime_type="x", purpose="batch", extra_body={"size": 1})
    assert caught.value.param == "bytes" and "bytes must be at least 1; size is no parameter" in caught.value.message
    with pytest.raises(openai.BadRequestError, match=r"purpose is 'batch'.*; the file's name ends in '.exe'"):
        client.uploads.create(bytes=1, filename="a.exe", mime_type="x", purpose="batch")
    monkeypatch.setattr(uploads, "MOST_PART_BYTES", 10)
    another = client.uploads.create(bytes=40, filename="a.jsonl", mime_type="x", purpose="fine-tune")
    with pytest.raises(openai.APIStatusError, match="larger than"):
        client.uploads.parts.create(another.id, data=ROWS)
    assert clean.stored() == clean.spooled() == []


def test_no_other_tenant_and_no_other_scope_gets_at_anything(clean: Site) -> None:
    mine, other, infers = (clean.client(number) for number in range(3))
    file = upload(mine)
    begun = mine.uploads.create(bytes=4, filename="a.jsonl", mime_type="x", purpose="fine-tune")
    part = mine.uploads.parts.create(begun.id, data=b"1234")
    asks: list[Callable[[openai.OpenAI], Any]] = [
        lambda client: client.files.retrieve(file.id),
        lambda client: client.files.content(file.id),
        lambda client: client.files.delete(file.id),
        lambda client: client.files.list(after=file.id),
        lambda client: client.uploads.parts.create(begun.id, data=b"1234"),
        lambda client: client.uploads.complete(begun.id, part_ids=[part.id]),
        lambda client: client.uploads.cancel(begun.id),
    ]
    for ask in asks:
        with pytest.raises(openai.NotFoundError):
            ask(other)
    asks += [lambda client: client.files.list(), upload, lambda client: client.uploads.create(**NEW)]
    for ask in asks:
        with pytest.raises(openai.PermissionDeniedError, match="lacks the scope train"):
            ask(infers)
    assert list(other.files.list()) == [] and mine.files.retrieve(file.id) == file
    theirs = other.uploads.create(**NEW)
    with pytest.raises(openai.BadRequestError, match="is no part of this upload"):
        other.uploads.complete(theirs.id, part_ids=[part.id])
    assert mine.uploads.cancel(begun.id).status == "cancelled"


NEW: dict[str, Any] = {"bytes": 4, "filename": "a.jsonl", "mime_type": "x", "purpose": "fine-tune"}


def test_what_a_killed_process_left_on_disk_is_removed_and_what_another_writes_is_not(tmp_path: Path) -> None:
    table = FileTable(Database(f"sqlite:///{tmp_path}/lora.db"))
    storage = open_storage((tmp_path / "storage").as_uri())

    async def opened() -> FileStore:
        return FileStore(table, storage, tmp_path / "incoming")

    with asyncio.run(opened()).spool() as writing:
        left = tmp_path / "incoming" / "left"
        left.write_bytes(os.urandom(10))
        asyncio.run(opened())
        assert not left.exists() and Path(writing.name).exists()
