"""A real Prometheus for tests, which scrapes once a second: a process on a port of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.support.machine import free_port

START_SECONDS = 30.0


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives now. Raises AssertionError where it is none."""
        return self._get("query", query=expression)["result"]

    def series(self, metric: str) -> list[dict[str, str]]:
        """The labels of all series of a metric."""
        return self._get("series", **{"match[]": metric})

    def _get(self, what: str, **parameters: str) -> Any:
        answer = requests.get(f"{self.url}/api/v1/{what}", parameters, timeout=10).json()
        assert answer["status"] == "success", answer
        return answer["data"]


@contextlib.contextmanager
def running_prometheus(folder: Path, targets: list[str], honor_labels: bool) -> Iterator[Prometheus]:
    """One that scrapes these `host:port`."""
    program = shutil.which("prometheus")
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Prometheus here: apt-get install prometheus")
    folder.mkdir()
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {"job_name": "lora", "honor_labels": honor_labels, "static_configs": [{"targets": targets}]}
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    port = free_port()
    command = [str(program), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        _wait(server, f"http://127.0.0.1:{port}", folder / "log")
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        server.terminate()
        server.wait(30)


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/-/ready", timeout=5).ok:
                return
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Prometheus did not start:\n{log.read_text(errors='replace')}")
        time.sleep(0.1)
