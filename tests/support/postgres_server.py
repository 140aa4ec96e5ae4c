"""A real PostgreSQL server for tests: its own data folder and port, started once a test session and stopped at its end.

Use it from a test file with `pytest_plugins = ["postgres_server"]` and the fixture `postgres_schema`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.support.machine import free_port

START_SECONDS = 60.0  # 0.3 s on an idle machine
UNPRIVILEGED = "nobody"  # initdb and postgres refuse to run as root


def find_binaries() -> Path | None:
    """The folder with initdb and postgres: Debian keeps it off the PATH."""
    on_path = shutil.which("initdb")
    places = [Path(on_path).resolve().parent] if on_path else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: -float(path.parent.name))
    return next((place for place in places if (place / "postgres").exists()), None)


def run_server(binaries: Path, folder: Path) -> Iterator[str]:
    """Yields the server's URL, without a database; the server is gone when the generator is closed."""
    user = UNPRIVILEGED if os.geteuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user)
    data, port = folder / "data", free_port()
    initdb = [str(binaries / "initdb"), "-D", str(data), "-U", "lora", "--auth=trust", "--encoding=UTF8", "--no-sync"]
    subprocess.run(initdb, user=user, cwd=folder, check=True, capture_output=True)
    options = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": folder,
        "fsync": "off",  # nothing here outlives the test session
        "max_connections": 200,
    }
    arguments = itertools.chain.from_iterable(("-c", f"{name}={value}") for name, value in options.items())
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [binaries / "postgres", "-D", data, *arguments], user=user, cwd=folder, stdout=log, stderr=log
        )
    try:
        _wait(server, port, folder / "log")
        yield f"postgresql://lora@127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGQUIT)  # at once, without a last checkpoint: the data goes too
        server.wait(30)


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            psycopg.connect(f"postgresql://lora@127.0.0.1:{port}/postgres", connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text(errors='replace')}") from None
            time.sleep(0.05)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    binaries = find_binaries()
    if binaries is None:
        missing = "no PostgreSQL server here: apt-get install postgresql"
        # Where everything is meant to be tested, a test that did not run has failed.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    # Not below pytest's folder, which only root may enter.
    with tempfile.TemporaryDirectory(prefix="lora-postgres-", ignore_cleanup_errors=True) as folder:
        yield from run_server(binaries, Path(folder))


@pytest.fixture
def postgres_schema(postgres_server: str) -> str:
    """The URL of an empty schema. (A database each takes a second to make and 300 files to delete.)"""
    name = f"t{time.monotonic_ns()}"
    with psycopg.connect(f"{postgres_server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"{postgres_server}/postgres?options=-csearch_path%3D{name}"
