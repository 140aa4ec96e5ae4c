"""Which Ray this process belongs to, and what its jobs and workers take over.

Inside a Ray job, or with `RAY_API_SERVER_ADDRESS` or `RAY_ADDRESS` set, the cluster is the one named there. With none
of them this is a laptop, whose Ray is in `embedded_ray.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import psutil

from cluster.log_format import LogFormat, formatter
from cluster.settings import Settings

LOCAL_CLUSTER = "local"
WHICH_RAY = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")

SERVE_TRANSPORT = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),  # the scores of a long prompt exceed gRPC's 4 MB
}
"""What lets the processes of Serve stream to each other by gRPC: through Ray's object store a token costs each three
times as much. They read it when they start.
"""


class NoClusterError(RuntimeError):
    """Ray is not there, or does not answer; the sentence says what to do."""


def log_to_stderr(form: LogFormat) -> None:
    """Write one line an event from this project's loggers, also in Ray's workers, which set up the root logger."""
    logger = logging.getLogger("lora")
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(form))
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def cluster_name(settings: Settings) -> str:
    """Return the name under which this cluster's jobs stand in the queue."""
    return settings.cluster or _named_cluster() or LOCAL_CLUSTER


def on_a_cluster() -> bool:
    """Return whether the environment names a Ray cluster (Ray sets RAY_ADDRESS inside its jobs)."""
    return bool(_named_cluster())


def _named_cluster() -> str:
    address = os.environ.get("RAY_ADDRESS", "")
    return ("" if address == "local" else address) or os.environ.get("RAY_API_SERVER_ADDRESS", "")


def use_own_ray() -> None:
    """Inside a Ray job, make RAY_ADDRESS the Ray that runs it: where there are two on a machine, Ray was seen to name
    the other one. Elsewhere the environment stays as it is.
    """
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if process.name() == "raylet" and (address := _gcs_address(process.cmdline())) is not None:
                # The other is of the shell in which `ray start` ran.
                os.environ |= dict.fromkeys(WHICH_RAY, "") | {"RAY_ADDRESS": address}
                return


def _gcs_address(raylet: list[str]) -> str | None:
    """Return the address in a raylet's command line."""
    flag = "--gcs-address="
    return next((part.removeprefix(flag) for part in raylet if part.startswith(flag)), None)


def job_runtime_env() -> dict[str, Any]:
    """Return the runtime environment of the Ray job that this process is part of: code package and variables, but those
    that say which Ray it is; empty outside one.
    """
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    runtime_env: dict[str, Any] = config.get("runtime_env") or {}
    kept = {
        key: value
        for key, value in runtime_env.items()
        if key in ("working_dir", "py_modules", "env_vars", "pip", "uv")
    }
    if "env_vars" in kept:
        kept["env_vars"] = {name: value for name, value in kept["env_vars"].items() if name not in WHICH_RAY}
    return kept


def code_version() -> str:
    """Return 12 hex digits over this project's Python files: which code a job was submitted with."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for package in ("cluster", "jobs", "lora_core"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
