"""What only S3 has: uploads in parts, broken and lost answers, refusals, and one sentence for each wrong setting."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSRequest, AWSResponse, HeadersDict
from botocore.exceptions import ReadTimeoutError
from botocore.httpsession import URLLib3Session

from cluster.storage import s3 as storage_s3
from cluster.storage.base import (
    Storage,
    StorageConfigError,
    StorageCorrupt,
    StorageError,
    StorageNotFound,
    StorageUnavailable,
)
from cluster.storage.directory import open_storage
from cluster.storage.s3 import S3Storage
from tests.support.s3_server import S3Server

MIB = 2**20


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


class Body(io.BytesIO):
    """The body of an answer that no server sent, as urllib3 would give it."""

    def stream(self, *_: object, **__: object) -> Iterator[bytes]:
        yield self.read()


def refusal(request: AWSRequest, status: int, code: str) -> AWSResponse:
    body = Body(f"<Error><Code>{code}</Code></Error>".encode())
    return AWSResponse(request.url, status, HeadersDict(), body)


def head(storage: S3Storage, key: str, **options: Any) -> dict[str, Any]:
    answer: dict[str, Any] = storage.client.head_object(Bucket=storage.bucket, Key=storage.prefix + key, **options)
    return answer


def s3(url: str) -> S3Storage:
    storage = open_storage(url)
    assert isinstance(storage, S3Storage)
    return storage


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_large_objects_go_in_parts(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    assert storage_s3.MULTIPART_BYTES == 64 * MIB
    monkeypatch.setattr(storage_s3, "MULTIPART_BYTES", 10 * MIB)
    monkeypatch.setattr(storage_s3, "PART_BYTES", 5 * MIB)
    storage, content = s3(s3_url), os.urandom(10 * MIB + 1)
    (tmp_path / "source").write_bytes(content)
    storage.put("large", content if kind == "bytes" else tmp_path / "source")
    storage.put("small", content[:-1])
    assert head(storage, "large", PartNumber=1)["PartsCount"] == 3
    assert head(storage, "large")["ETag"].endswith('-3"')
    assert head(storage, "large")["Metadata"] == {"sha256": hashlib.sha256(content).hexdigest()}
    assert "-" not in head(storage, "small")["ETag"]
    assert storage.get("large") == content
    storage.fetch("large", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == content


def test_parts_come_in_order_and_those_that_break_again(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_s3, "PART_BYTES", MIB)
    monkeypatch.setattr(storage_s3, "READERS", 3)
    storage, content, asked = s3(s3_url), os.urandom(9 * MIB + 1), []
    storage.put("large", content)

    def disturb(request: AWSRequest, **_: object) -> AWSResponse | None:
        part = request.headers.get("Range")
        asked.append(part)
        if asked.count(part) == 1 and part == b"bytes=2097152-3145727":
            return AWSResponse(request.url, 206, HeadersDict({"content-length": str(MIB)}), Body(b"con"))
        if part == b"bytes=1048576-2097151":
            time.sleep(0.3)  # so that the next ones are there before it
        return None

    storage.client.meta.events.register("before-send.s3.GetObject", disturb)
    assert storage.get("large") == content
    assert len(asked) == 11 and asked[0] is None
    with pytest.raises(StorageCorrupt, match="large is damaged"):
        storage.fetch("large", tmp_path / "target", sha256="0" * 64)
    assert files_below(tmp_path) == []

    def overwrite(**_: object) -> None:
        asked.append("then")
        if asked.count("then") == 2:
            s3(s3_url).put("large", content[::-1])

    storage.client.meta.events.register_first("before-send.s3.GetObject", overwrite)
    with pytest.raises(StorageUnavailable, match="was written anew while it was read"):
        storage.get("large")


@pytest.mark.parametrize("verb", ["get", "fetch"])
def test_a_broken_answer_is_read_again(s3_url: str, tmp_path: Path, verb: str) -> None:
    storage, broken = s3(s3_url), []
    storage.put("key", b"content")

    def break_off(request: AWSRequest, **_: object) -> AWSResponse | None:
        broken.append(request.url)
        headers = HeadersDict({"content-length": "7"})
        return AWSResponse(request.url, 200, headers, Body(b"con")) if len(broken) <= 2 else None

    storage.client.meta.events.register("before-send.s3.GetObject", break_off)
    if verb == "get":
        assert storage.get("key") == b"content"
    else:
        storage.fetch("key", tmp_path / "target")
        assert (tmp_path / "target").read_bytes() == b"content"
    assert len(broken) == 3


@pytest.mark.parametrize("verb", ["get", "fetch"])
def test_an_answer_that_stays_broken_is_unavailable(s3_url: str, tmp_path: Path, verb: str) -> None:
    storage = s3(s3_url)
    storage.put("key", b"content")
    headers = HeadersDict({"content-length": "7"})
    storage.client.meta.events.register(
        "before-send.s3.GetObject", lambda request, **_: AWSResponse(request.url, 200, headers, Body(b"con"))
    )
    with pytest.raises(StorageUnavailable, match="does not answer"):
        storage.get("key") if verb == "get" else storage.fetch("key", tmp_path / "target")
    assert files_below(tmp_path) == []


def test_a_conditional_write_whose_answer_got_lost_has_won(s3_url: str) -> None:
    storage, sent = s3(s3_url), []

    def lose_the_first_answer(request: AWSRequest, **_: object) -> None:
        sent.append(request)
        if len(sent) == 1:
            assert URLLib3Session().send(request).status_code == 200
            raise ReadTimeoutError(endpoint_url=request.url)

    storage.client.meta.events.register("before-send.s3.PutObject", lose_the_first_answer)
    assert storage.put("key", b"mine", if_absent=True)
    assert len(sent) == 2
    assert not storage.put("key", b"mine", if_absent=True)  # equal content is no proof of having written it


@pytest.mark.parametrize(("conflicts", "kind"), [(2, None), (99, StorageUnavailable)])
def test_a_conflict_between_conditional_writers_is_settled(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, conflicts: int, kind: type[StorageError] | None
) -> None:
    """AWS answers 409 while another conditional write of the key is under way: neither won nor lost yet."""
    storage, sent, pauses = s3(s3_url), [], []
    monkeypatch.setattr(storage_s3.time, "sleep", pauses.append)

    def conflict(request: AWSRequest, **_: object) -> AWSResponse | None:
        sent.append(request)
        if len(sent) > conflicts:
            return None
        request.body.read()
        return refusal(request, 409, "ConditionalRequestConflict")

    storage.client.meta.events.register("before-send.s3.PutObject", conflict)
    if kind is None:
        assert storage.put("key", b"content", if_absent=True)
        assert storage.get("key") == b"content"
        assert pauses == [0.1, 0.2]
    else:
        with pytest.raises(kind, match="is being written by others"):
            storage.put("key", b"content", if_absent=True)
        assert len(sent) == storage_s3.CONFLICT_ATTEMPTS


@pytest.mark.parametrize(
    ("status", "code", "kind", "advice"),
    [
        (400, "KeyTooLongError", StorageNotFound, "has no key"),
        (400, "ExpiredToken", StorageConfigError, "(ExpiredToken); check AWS_ACCESS_KEY_ID"),
        (403, "AccessDenied", StorageConfigError, "(AccessDenied); check AWS_ACCESS_KEY_ID"),
        (503, "SlowDown", StorageUnavailable, "(SlowDown); try again later"),
        (400, "Strange", StorageError, "does not read"),
    ],
)
def test_refusals_of_other_servers(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, status: int, code: str, kind: type[StorageError], advice: str
) -> None:
    """Answers that AWS gives, and the test server does not."""
    storage = s3(s3_url)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between botocore's attempts
    storage.client.meta.events.register("before-send.s3.GetObject", lambda request, **_: refusal(request, status, code))
    with pytest.raises(kind) as caught:
        storage.get("key")
    assert type(caught.value) is kind
    assert advice in str(caught.value)


def test_check_refuses_a_store_that_ignores_conditions(s3_url: str) -> None:
    storage = s3(s3_url)
    storage.client.meta.events.register(
        "before-call.s3.PutObject", lambda params, **_: params["headers"].update({"If-None-Match": ""})
    )
    with pytest.raises(StorageConfigError, match="ignores If-None-Match"):
        storage.check()
    assert storage.list() == []


def all_verbs(storage: Storage, folder: Path) -> list[Callable[[], object]]:
    return [
        lambda: storage.put("key", b""),
        lambda: storage.put("key", b"", if_absent=True),
        lambda: storage.get("key"),
        lambda: storage.fetch("key", folder / "target"),
        lambda: storage.exists("key"),
        lambda: storage.list(),
        lambda: storage.delete("key"),
        lambda: storage.check(),
    ]


def assert_refused(storage: Storage, folder: Path, kind: type[StorageError], *advice: str) -> None:
    """Every verb raises this, with one sentence that says what to change."""
    for verb in all_verbs(storage, folder):
        with pytest.raises(kind) as caught:
            verb()
        assert all(part in str(caught.value) for part in advice), str(caught.value)
        assert "\n" not in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert files_below(folder) == []


def test_no_credentials(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert_refused(
        open_storage(s3_url), tmp_path, StorageConfigError, s3_url, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "wrong")
    assert_refused(open_storage(s3_url), tmp_path, StorageConfigError, s3_url, "check AWS_ACCESS_KEY_ID and")


def test_missing_bucket(s3_environment: S3Server, tmp_path: Path) -> None:
    url = "s3://no-such-bucket/prefix"
    advice = (s3_environment.endpoint, "has no bucket 'no-such-bucket'", f"change the URL {url}")
    assert_refused(open_storage(url), tmp_path, StorageConfigError, *advice)


def test_unreachable_endpoint(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between botocore's attempts
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert_refused(
        open_storage(s3_url),
        tmp_path,
        StorageUnavailable,
        "does not answer",
        "127.0.0.1:9",
        "check AWS_ENDPOINT_URL_S3",
    )


@pytest.mark.parametrize(
    ("variable", "value"), [("AWS_ENDPOINT_URL_S3", "localhost:8333"), ("AWS_PROFILE", "no-such-profile")]
)
def test_settings_that_boto3_refuses(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert_refused(
        open_storage(s3_url), tmp_path, StorageConfigError, "cannot be opened with these AWS_* settings", value
    )
