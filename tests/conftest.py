"""Fixtures that several test files share."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported, which asks for it then: models are small, and one thread is the fastest. Processes that
# tests start have one, too, and so have tests' threads. Where a test has more, they wait without spinning: where there
# are more of them than cores, a test of 20 s took 240.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# Before transformers is imported, and with it triton, whose own functions are made for the one or for the other then.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # how kernels run without a GPU; read when one is defined

from cluster.storage.base import Storage
from cluster.storage.directory import open_storage
from lora_core.models import files as base_files
from lora_core.models.exactness import ask_for_exact_products
from tests.support.s3_server import S3Server, running_s3_server

ask_for_exact_products()  # before the first one: many tests make bases without loading any

if not torch.cuda.is_available():
    with contextlib.suppress(ImportError):
        from triton.runtime import interpreter

        def call_function(called: Any, *arguments: Any, **options: Any) -> Any:
            """A function that a kernel calls. It would patch what its module sees of triton.language at every call, and
            not take that back: a fifth of the time.
            """
            if id(called.fn.__globals__) not in patched:
                patched.add(id(called.fn.__globals__))
                interpreter._patch_lang(called.fn)
            return called.rewrite()(*arguments, **options)

        patched: set[int] = set()
        interpreter.InterpretedFunction.__call__ = call_function


@pytest.fixture(scope="session")
def shared_cache(pytestconfig: pytest.Config) -> Path:
    """Where real models are converted once for all processes and runs of this code: from GGUF that takes a minute."""
    code = hashlib.sha256(Path(base_files.__file__).read_bytes()).hexdigest()
    assert pytestconfig.cache is not None
    return Path(os.environ.get("LORA_TEST_CACHE") or pytestconfig.cache.mkdir(f"bases-{code[:16]}"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with an empty bucket, which no environment knows yet: see `s3_environment`."""
    with running_s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with the AWS_* variables of this process and its children set to it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_url(s3_environment: S3Server) -> str:
    """A storage URL of this test alone."""
    return f"s3://{s3_environment.bucket}/{uuid.uuid4().hex}"


@pytest.fixture(params=["directory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage: every test that takes it runs on a directory and on the S3 server."""
    if request.param == "s3":
        return open_storage(request.getfixturevalue("s3_url"))
    return open_storage((tmp_path / "storage").as_uri())
