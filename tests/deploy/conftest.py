"""A server for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from cluster.registry import AdapterVersion
from tests.support.adapter_service import Service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    return Service(tmp_path_factory.mktemp("service"))


@pytest.fixture
def fetches(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The versions whose files were fetched."""
    seen: list[str] = []
    files = service.served.files

    def counting(version: AdapterVersion, cache: Any) -> AbstractContextManager[Path]:
        seen.append(version.version)
        return files(version, cache)

    monkeypatch.setattr(service.served, "files", counting)
    yield seen
