"""Storage in an S3 bucket, by boto3.

The server is found the AWS way: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, and any credentials that
boto3 finds. boto3 sends a CRC32 with every upload; a store too old for that needs
AWS_REQUEST_CHECKSUM_CALCULATION=when_required. The sha256 of the content is in the object's metadata. An upload in
parts whose process is killed stays invisible; a lifecycle rule (AbortIncompleteMultipartUpload) frees its room.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import boto3.session
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as aws
from botocore.config import Config
from s3transfer.exceptions import RetriesExceededError  # type: ignore[import-untyped]

from cluster.proxies import reach_this_machine_directly
from cluster.storage.base import (
    Keys,
    Storage,
    StorageConfigError,
    StorageCorrupt,
    StorageError,
    StorageNotFound,
    StorageUnavailable,
    checked_key,
    checked_prefix,
    hashed,
    name_file,
    opened,
    sha256_of,
    temporary_file,
    verify,
)

MULTIPART_BYTES = 64 * 2**20
PART_BYTES = 16 * 2**20
READERS = 8  # of parts of one object at a time
# With pauses of at most 1, 2 and 4 s between attempts: a server that cannot be reached is reported within 27 s.
CONFIG = Config(connect_timeout=5, read_timeout=60, retries={"mode": "standard", "total_max_attempts": 4})
BODY_ATTEMPTS = 3  # of reading an answer's body: botocore's own retries end where the body begins
CONFLICT_ATTEMPTS = 5  # of a conditional write that S3 answers with 409, another being under way: 3 s together
NO_CREDENTIALS = (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError)
NO_ANSWER = (aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError, RetriesExceededError)
EXPIRED = ("ExpiredToken", "InvalidToken")  # these come with status 400


class S3Storage(Storage):
    """Objects in a bucket, below a prefix."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise StorageConfigError(
                "a storage URL must not hold credentials, as it is printed; set AWS_ACCESS_KEY_ID and"
                " AWS_SECRET_ACCESS_KEY, and write s3://bucket/prefix"
            )
        if parts.query or parts.fragment or not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", parts.netloc):
            raise StorageConfigError(
                f"the storage URL {url!r} must be s3://bucket/prefix, the bucket of 3 to 63 lower-case letters, digits,"
                " dots and hyphens; a server other than AWS goes into AWS_ENDPOINT_URL_S3"
            )
        self.bucket = parts.netloc
        self.prefix = f"{parts.path.strip('/')}/".lstrip("/")

    @functools.cached_property
    def client(self) -> Any:
        """Make it on first use, in a session of its own: boto3's default session is not safe between threads."""
        reach_this_machine_directly()  # where the server may be, and boto3 reads the environment's proxies now
        try:
            return boto3.session.Session().client("s3", config=CONFIG)
        except (aws.BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
            raise StorageConfigError(f"{self.url} cannot be opened with these AWS_* settings: {error}") from error

    def put(self, key: str, content: bytes | Path, *, if_absent: bool = False) -> bool:
        target = self._target(key)
        with opened(content) as source, self._explained("write", key):
            metadata = {"sha256": sha256_of(source)}
            if if_absent:
                return self._put_if_absent(target, source, metadata)
            size = source.seek(0, os.SEEK_END)
            source.seek(0)
            if size > MULTIPART_BYTES:
                config = TransferConfig(multipart_threshold=MULTIPART_BYTES, multipart_chunksize=PART_BYTES)
                self.client.upload_fileobj(source, **target, ExtraArgs={"Metadata": metadata}, Config=config)
            else:
                self.client.put_object(**target, Body=source, Metadata=metadata)
        return True

    def _put_if_absent(self, target: dict[str, str], source: BinaryIO, metadata: dict[str, str]) -> bool:
        metadata = metadata | {"writer": uuid.uuid4().hex}
        for attempt in range(CONFLICT_ATTEMPTS):
            source.seek(0)
            try:
                self.client.put_object(**target, Body=source, Metadata=metadata, IfNoneMatch="*")
                return True
            except aws.ClientError as error:
                status = _status(error)
                if status == 412:  # also after a first try that was stored while its answer got lost: so, who wrote it?
                    return bool(self.client.head_object(**target)["Metadata"].get("writer") == metadata["writer"])
                if status != 409:
                    raise
            time.sleep(0.1 * 2**attempt)
        raise StorageUnavailable(f"{self.url}/{target['Key']} is being written by others; try again later")

    def get(self, key: str, *, sha256: str | None = None) -> bytes:
        with self._explained("read", key):
            return b"".join(self._checked(key, sha256))

    def fetch(self, key: str, path: Path, *, sha256: str | None = None, durable: bool = True) -> None:
        with temporary_file(path) as file:
            with self._explained("read", key):
                for part in self._checked(key, sha256):
                    file.write(part)
            name_file(file, path, durable=durable)

    def folder(self, prefix: str, sha256s: Mapping[str, str]) -> None:
        return None

    def _checked(self, key: str, sha256: str | None) -> Iterator[bytes]:
        """Yield an object's content. Raises StorageCorrupt at its end."""
        digest, target = hashlib.sha256(), self._target(key)
        answer, first = self._answer(target)
        yield from hashed(self._parts(target, answer, first), digest)
        verify(f"{self.url}/{key}", digest.hexdigest(), sha256 or answer["Metadata"].get("sha256"))

    def _parts(self, target: dict[str, str], answer: dict[str, Any], first: bytes) -> Iterator[bytes]:
        """Yield the first part of an object and then the others, which come over several connections at a time: one
        alone is what AWS bounds, to about 90 MB/s.
        """
        yield first
        same, size = {**target, "IfMatch": answer["ETag"]}, answer["ContentLength"]
        with ThreadPoolExecutor(READERS) as readers:
            coming = deque[Future[tuple[dict[str, Any], bytes]]]()
            for start in range(PART_BYTES, size, PART_BYTES):
                part = f"bytes={start}-{min(start + PART_BYTES, size) - 1}"
                coming.append(readers.submit(self._answer, {**same, "Range": part}))
                if len(coming) == READERS:
                    yield coming.popleft().result()[1]
            while coming:
                yield coming.popleft().result()[1]

    def _answer(self, target: dict[str, str]) -> tuple[dict[str, Any], bytes]:
        """Return an answer and the first `PART_BYTES` of its body; where that breaks off, it is asked for again."""
        for attempt in range(BODY_ATTEMPTS):
            answer = self.client.get_object(**target)
            with contextlib.closing(answer["Body"]) as body:
                wanted = min(answer["ContentLength"], PART_BYTES)
                try:
                    part = body.read(PART_BYTES)
                    if len(part) < wanted:
                        raise aws.IncompleteReadError(actual_bytes=len(part), expected_bytes=wanted)
                    return answer, part
                except NO_ANSWER:
                    if attempt == BODY_ATTEMPTS - 1:
                        raise
        raise AssertionError("the last attempt returns or raises")

    def open(self, key: str) -> BinaryIO:
        target = self._target(key)
        with self._explained("read", key):
            body: BinaryIO = self.client.get_object(**target)["Body"]
        return body

    def location(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{checked_key(key)}"

    def exists(self, key: str) -> bool:
        target = self._target(key)
        try:
            with self._explained("read", key):
                self.client.head_object(**target)
        except StorageNotFound:
            return False
        return True

    def list(self, prefix: str = "") -> Keys:
        start = self.prefix + checked_prefix(prefix)
        with self._explained("list", prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
            names = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return sorted(name.removeprefix(self.prefix) for name in names if not name.endswith("/"))  # consoles' "folders"

    def delete(self, key: str) -> None:
        target = self._target(key)
        with self._explained("delete", key):
            self.client.delete_object(**target)

    def _target(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + checked_key(key)}

    @contextlib.contextmanager
    def _explained(self, verb: str, key: str) -> Iterator[None]:
        """Raise botocore's exceptions as ours, each with what to change."""
        try:
            yield
        except aws.ClientError as error:
            raise self._refusal(error, verb, key) from error
        except NO_CREDENTIALS as error:
            raise StorageConfigError(
                f"{self.url} needs credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE,"
                " or give this machine a role"
            ) from error
        except NO_ANSWER as error:
            raise StorageUnavailable(
                f"{self.url} does not answer ({error}); check AWS_ENDPOINT_URL_S3 and that the server runs"
            ) from error
        except aws.FlexibleChecksumError as error:
            raise StorageCorrupt(f"{self.url}/{key} is damaged ({error}); restore it or write it again") from error

    def _refusal(self, error: aws.ClientError, verb: str, key: str) -> StorageError:
        code, status, endpoint = error.response["Error"]["Code"], _status(error), self.client.meta.endpoint_url
        # A HEAD's 404 does not say what is missing.
        if code == "NoSuchBucket" or (code == "404" and not self._bucket_exists()):
            return StorageConfigError(
                f"{endpoint} has no bucket {self.bucket!r}; make it, or change the URL {self.url}"
            )
        if status == 404 or (code == "KeyTooLongError" and verb == "read"):
            return StorageNotFound(f"{self.url} has no {key}")
        if status in (401, 403) or code in EXPIRED:
            return StorageConfigError(
                f"{endpoint} does not let these credentials {verb} {self.url}/{key} ({code}); check AWS_ACCESS_KEY_ID"
                " and AWS_SECRET_ACCESS_KEY, or their policy"
            )
        if status == 412 and verb == "read":
            return StorageUnavailable(f"{self.url}/{key} was written anew while it was read; try again")
        if status >= 500:
            return StorageUnavailable(f"{endpoint} cannot {verb} {self.url}/{key} now ({code}); try again later")
        return StorageError(
            f"{endpoint} does not {verb} {self.url}/{key}: {error.response['Error'].get('Message', code)}"
        )

    def _bucket_exists(self) -> bool:
        try:
            self.client.head_bucket(Bucket=self.bucket)
        except aws.ClientError as error:
            return _status(error) != 404
        return True


def _status(error: aws.ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])
