"""Files and uploads in SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobs.store.database import Database
from jobs.store.files import ABANDONED_SECONDS, FileStatus, FileTable, StoredFile, UploadStatus

pytest_plugins = ["tests.support.queue_kit"]


class Table(FileTable):
    """One at a time of its own."""

    def __init__(self, database: Database) -> None:
        self.now = 1000.0
        super().__init__(database, lambda: self.now)

    def add(self, tenant: str = "acme", *, seconds: int | None = None, finished: bool = True) -> StoredFile:
        file = self.begin(tenant, "a\x00.jsonl", "fine-tune", 2**40, "0", seconds)
        if finished:
            self.finish(file.id, FileStatus.PROCESSED, None)
        return file


@pytest.fixture
def table(url: str) -> Iterator[Table]:
    database = Database(url)
    yield Table(database)
    database.close()


def test_pages_have_each_file_once_also_of_one_moment(table: Table) -> None:
    ids = sorted(table.add().id for _ in range(5))
    table.now += 1
    ids.append(table.add().id)
    table.add("other")
    table.add(finished=False)
    for newest, order in ((False, ids), (True, ids[::-1])):
        seen: list[str] = []
        last = None
        while page := table.list("acme", limit=2, after=last, newest=newest):
            seen += [file.id for file in page]
            last = page[-1]
        assert seen == order
    found = table.file("acme", ids[0])
    assert found is not None and (found.bytes, found.suffix) == (2**40, ".jsonl")
    assert found.filename == "a\N{REPLACEMENT CHARACTER}.jsonl"
    assert table.list("acme", limit=9, purpose="batch") == [] and table.file("other", ids[0]) is None


def test_what_has_expired_is_not_there_and_what_never_came_is_found(table: Table) -> None:
    short, endless, left = table.add(seconds=3600), table.add(), table.add(finished=False)
    assert table.dead_files() == [] and table.file("acme", left.id) is None
    table.now += 3600
    assert table.file("acme", short.id) is None and [file.id for file in table.list("acme", limit=9)] == [endless.id]
    assert [file.id for file in table.dead_files()] == [short.id]
    table.now += ABANDONED_SECONDS
    assert {file.id for file in table.dead_files()} == {short.id, left.id}
    table.delete(short.id)
    assert [file.id for file in table.dead_files()] == [left.id]


def test_an_upload_ends_once(table: Table) -> None:
    upload, expires = (table.begin_upload("acme", "a.jsonl", "fine-tune", 9, None) for _ in range(2))
    part = table.begin_part(upload.id, 9)
    assert part is not None and table.parts(upload.id) == [part] and table.upload("other", upload.id) is None
    assert table.end_upload(upload.id, UploadStatus.COMPLETED, "file-1")
    assert not table.end_upload(upload.id, UploadStatus.CANCELLED)
    assert table.begin_part(upload.id, 1) is None and table.parts(upload.id) == []
    found = table.upload("acme", upload.id)
    assert found is not None and (found.status, found.file_id) == (UploadStatus.COMPLETED, "file-1")
    table.now += ABANDONED_SECONDS
    assert [one.id for one in table.dead_uploads()] == [expires.id] and table.upload("acme", expires.id) is None
