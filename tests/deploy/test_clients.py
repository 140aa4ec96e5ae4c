"""OpenAI's client in two major versions: the one beside these tests, and the one before it in a folder of its own."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.api_site import Site, running_site

ROOT = Path(__file__).parents[2]
OLDER = ROOT / "tests/support/older_client.txt"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(tmp_path_factory.mktemp("clients")) as site:
        yield site


@pytest.fixture(scope="module")
def older(pytestconfig: pytest.Config) -> Path:
    """A folder with the older client and those of its libraries that this environment lacks."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir(f"openai-{hashlib.sha256(OLDER.read_bytes()).hexdigest()[:12]}")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "openai").exists():
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
            command = [*install, "--requirement", OLDER, "--target", folder / "new"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=200)
            if done.returncode != 0:
                reason = f"the older client cannot be installed: {done.stderr[-300:]}"
                pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
            (folder / "new").rename(folder / "openai")
    return folder / "openai"


def call(site: Site, suffix: str, *folders: Path) -> str:
    """Return the version that has called everything."""
    job = site.create(suffix).id
    site.train(job)
    path = os.pathsep.join(map(str, (*folders, ROOT)))
    command = [sys.executable, "-m", "tests.support.client_calls", site.url, site.client.api_key, site.rows, job]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_client_beside_these_tests_calls_everything(site: Site) -> None:
    assert call(site, "newer").startswith("3.")


def test_the_major_version_before_calls_everything(site: Site, older: Path) -> None:
    assert call(site, "older", older).startswith("2.")


def test_the_example_trains_and_asks(site: Site) -> None:
    """What a session does to its job is done here as soon as it is there."""
    command = [sys.executable, "-u", "deploy/examples/client.py", "tiny", str(site.rows)]
    environment = {**os.environ, "OPENAI_BASE_URL": f"{site.url}/v1", "OPENAI_API_KEY": site.client.api_key}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as example:
        assert example.stdout is not None
        file, queued = (example.stdout.readline() for _ in range(2))
        assert file.endswith(" processed\n") and queued.endswith(" queued\n")
        site.train(queued.split()[0])
        told = example.stdout.read().splitlines()
    assert example.returncode == 0
    assert told[-3].endswith(" succeeded tiny:tone@1") and told[-2:] == ["tiny: hello", "tiny:tone@1: hello"]
