"""Sessions and schedulers as Ray jobs: launch and look. The only file that speaks Ray Jobs' words.

A submission id is deterministic (`<session>-a<attempt>`), so that after a crash the scheduler asks Ray whether it
exists instead of guessing. "Cannot reach Ray" is its own answer: it never means that a job is dead.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import requests
from ray.exceptions import RayError
from ray.job_submission import JobStatus as RayStatus
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException

from cluster.ray_runtime import job_runtime_env
from jobs.errors import JobError
from jobs.job import FailureCode

NO_ANSWER = (RuntimeError, RayError, RayStateApiException, requests.RequestException, ConnectionError)
SCHEDULERS = "lora-scheduler-"  # how their submission ids begin
FORGOTTEN = "Ray does not know it any more"
ENDS = {
    r"out of memory|outofmemory|low on memory|memoryerror|bad_alloc": FailureCode.OUT_OF_MEMORY,
    rf"node has died|nodedied|node .*(dead|terminated|preempted)|{FORGOTTEN}": FailureCode.LOST_NODE,
}
"""What words of Ray's, of Python's and of C++'s, about how a session ended, mean."""
KNOCK_SECONDS = 5.0
AGENT_SECONDS = 30.0
"""A node takes jobs only some seconds after it joined; until then Ray answers that it has no agent."""


def scheduler_id(number: int) -> str:
    """Return the submission id of a cluster's scheduler, which callers that start one at once share."""
    return f"{SCHEDULERS}{number}"


class SubmissionState(StrEnum):
    """What Ray knows of one submission."""

    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"
    ABSENT = "absent"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class SubmissionStatus:
    """A submission's state, and what Ray said when it ended, or why it has not started."""

    state: SubmissionState
    message: str = ""


@dataclass(frozen=True)
class ClusterSize:
    """Ranks that the nodes alive now can hold, one a GPU, or a CPU where there is no GPU (not `on_gpus`); and how many
    nodes these are.
    """

    workers: int
    nodes: int
    on_gpus: bool = False


def end_code(reason: str) -> FailureCode:
    """Return what it comes to when a session ended, from what Ray says of it."""
    return next((code for words, code in ENDS.items() if re.search(words, reason, re.IGNORECASE)), FailureCode.UNKNOWN)


class RayUnreachableError(JobError, RuntimeError):
    """Ray's API does not answer."""


class Launcher:
    """Ray Jobs behind a few verbs. Sessions run the code and variables of the Ray job that this process is part of."""

    def __init__(self, driver_labels: dict[str, str]) -> None:
        self._driver_labels = driver_labels
        self._connected: JobSubmissionClient | None = None

    def launch_session(self, submission_id: str, session_id: str, fence: int) -> None:
        """Start the driver of a session; starting it a second time under the same id changes nothing."""
        command = [sys.executable, "-m", "jobs.session", "--id", session_id, "--fence", str(fence)]
        # SIGINT lets `fit()` take its worker group down.
        self._submit(submission_id, command, {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "15"})

    def launch_scheduler(self, submission_id: str) -> None:
        """Start a scheduler as a Ray job of its own, which outlives whoever asked for it."""
        self._submit(submission_id, [sys.executable, "-m", "jobs", "scheduler"], {})

    def state(self, submission_id: str) -> SubmissionStatus:
        """Return what Ray knows of a submission."""
        try:
            info = self._client().get_job_info(submission_id)
        except NO_ANSWER as error:
            if isinstance(error, RuntimeError) and "does not exist" in str(error):
                return SubmissionStatus(SubmissionState.ABSENT)
            return SubmissionStatus(SubmissionState.UNKNOWN, str(error))
        if info.status == RayStatus.PENDING:
            return SubmissionStatus(SubmissionState.STARTING, info.message or "")
        if info.status == RayStatus.RUNNING:
            return SubmissionStatus(SubmissionState.RUNNING)
        return SubmissionStatus(SubmissionState.ENDED, f"{info.status.lower()}: {info.message or ''}")

    def size(self) -> ClusterSize:
        """Return what the cluster holds now.

        Raises:
            RayUnreachableError: Ray does not answer.
        """
        client = self._client()
        with _must_answer():
            nodes = [node for node in list_nodes(client.get_address(), detail=True) if node.state == "ALIVE"]
        gpus = int(sum((node.resources_total or {}).get("GPU", 0) for node in nodes))
        cpus = int(sum((node.resources_total or {}).get("CPU", 0) for node in nodes))
        return ClusterSize(workers=gpus or cpus, nodes=len(nodes), on_gpus=gpus > 0)

    def others_running(self) -> bool:
        """Return whether anything but schedulers uses this cluster: a session, a Serve application, somebody's driver.

        Raises:
            RayUnreachableError: Ray does not answer.
        """
        client = self._client()
        with _must_answer():
            jobs = client.list_jobs()
        return any(
            job.status in (RayStatus.PENDING, RayStatus.RUNNING)
            for job in jobs
            if not (job.submission_id or "").startswith(SCHEDULERS) and "jobs scheduler" not in (job.entrypoint or "")
        )

    def _client(self) -> JobSubmissionClient:
        if self._connected is None:
            with _must_answer():
                _knock(os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", ""))
                self._connected = JobSubmissionClient()
        return self._connected

    def _submit(self, submission_id: str, command: list[str], env_vars: dict[str, str]) -> None:
        runtime_env: dict[str, Any] = job_runtime_env()
        runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **env_vars}
        deadline = time.monotonic() + AGENT_SECONDS
        while True:
            try:
                self._client().submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=submission_id,
                    runtime_env=runtime_env,
                    entrypoint_label_selector=self._driver_labels or None,
                )
                return
            except RuntimeError as error:
                # Ray answers a known id with HTTP 500 and a traceback; the id is ours: it is the launch we asked for.
                if "already exists" in str(error):
                    return
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            except (requests.RequestException, ConnectionError) as error:
                raise RayUnreachableError(f"Ray's API does not answer: {error}") from error
            time.sleep(0.5)


@contextmanager
def _must_answer() -> Iterator[None]:
    """Raise RayUnreachableError where Ray does not answer."""
    try:
        yield
    except (*NO_ANSWER, OSError) as error:
        raise RayUnreachableError(f"Ray's API does not answer: {error}") from error


def _knock(address: str) -> None:
    """See that somebody listens at `host:port`: Ray itself takes 40 s to notice that nobody does. Raises OSError."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()
        except OSError as error:
            raise OSError(f"nothing listens at {address} ({error}); is RAY_ADDRESS of a cluster that runs?") from error
