"""A Ray of this machine's own, where the environment names no cluster.

One detached process, the scheduler, owns it and writes down where it is; every other process reads that. Its folder,
ports and token are its own, below `LORA_HOME`, so that a `ray start` beside it notices nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

import psutil

from cluster.ray_runtime import SERVE_TRANSPORT, WHICH_RAY
from cluster.settings import Settings

QUIET = {
    "LOG_NAME_UPDATE_INTERVAL_S": "3",  # the log monitor's look for new files, each half second
    "REPORTER_UPDATE_INTERVAL_MS": "30000",  # the dashboard agent's look at every process, each 5 s
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process more, for nodes that a cloud takes back
}
"""What Ray's own processes can do less of where they share a few cores with training."""
PACED = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.proxy:middlewares"}
"""What Serve's proxies put around them, so that uploads wait for the gateway and not in their memory."""


@dataclass(frozen=True)
class EmbeddedRay:
    """Where the embedded Ray is, as its owner wrote it down."""

    owner_pid: int
    owner_started: float
    gcs_address: str
    api_url: str
    token_path: str

    @property
    def alive(self) -> bool:
        """Whether the owner still runs (a reused process id has another start time)."""
        return is_process(self.owner_pid, self.owner_started)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to connect: address, and the token that only this user can read."""
        return {"RAY_ADDRESS": self.gcs_address, "RAY_API_SERVER_ADDRESS": self.api_url, **_token(self.token_path)}


class OwnerLock:
    """Held by the process that owns the embedded Ray of a LORA_HOME, until that ends, however it does."""

    def __init__(self, settings: Settings) -> None:
        path = settings.home / "run" / "owner.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")

    def acquire(self) -> bool:
        """Take it, unless somebody has it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Let go of it."""
        fcntl.flock(self._file, fcntl.LOCK_UN)


def has_owner(settings: Settings) -> bool:
    """Return whether an owner of the embedded Ray runs, or is just starting."""
    lock = OwnerLock(settings)
    free = lock.acquire()
    if free:
        lock.release()
    return not free


def find_embedded(settings: Settings) -> EmbeddedRay | None:
    """Return the running embedded Ray of this LORA_HOME, if there is one."""
    try:
        embedded = EmbeddedRay(**json.loads(_record(settings).read_text()))
    except FileNotFoundError:
        return None
    return embedded if embedded.alive else None


def embedded_environment(settings: Settings) -> dict[str, str]:
    """Return what the embedded Ray's owner needs in its environment before it imports Ray, which reads it then."""
    token = settings.home / "ray_token"
    if not token.exists():
        token.parent.mkdir(parents=True, exist_ok=True)
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    repository = str(Path(__file__).resolve().parent.parent)
    return {
        **{name: os.environ.get(name, value) for name, value in (QUIET | SERVE_TRANSPORT).items()},
        **PACED,
        **dict.fromkeys(WHICH_RAY, ""),
        **_token(str(token)),
        "PYTHONPATH": os.pathsep.join(filter(None, [repository, os.environ.get("PYTHONPATH")])),
    }


def _token(path: str) -> dict[str, str]:
    """Return the variables that name a token. RAY_AUTH_TOKEN, which would count first, may be another cluster's."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": path, "RAY_AUTH_TOKEN": ""}


def start_embedded(settings: Settings) -> EmbeddedRay:
    """Start Ray inside this process, its owner, with which it ends. See `embedded_environment`."""
    import ray
    from ray._private.parameter import RayParams

    # `ray.init` always has the node's agent listen at port 52365, and a Ray whose agent finds it taken takes no jobs:
    # this one, or the one that somebody starts beside it.
    any_port = partialmethod(RayParams.__init__, dashboard_agent_listen_port=0)
    RayParams.__init__ = any_port  # type: ignore[assignment, method-assign]
    context: Any = ray.init(
        address="local",
        include_dashboard=True,
        dashboard_port=0,
        object_store_memory=256 * 2**20,
        log_to_driver=False,
        _temp_dir=str(_ray_folder(settings)),
        _node_ip_address="127.0.0.1",
    )
    embedded = EmbeddedRay(
        owner_pid=os.getpid(),
        owner_started=psutil.Process().create_time(),
        gcs_address=str(context.address_info["gcs_address"]),
        api_url=f"http://{context.address_info['webui_url']}",
        token_path=os.environ["RAY_AUTH_TOKEN_PATH"],
    )
    # `ray start` leaves this file and `ray.init` does not: without it a job is given the address of any Ray around.
    (_ray_folder(settings) / "ray_current_cluster").write_text(embedded.gcs_address)
    record = _record(settings)
    scratch = record.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(asdict(embedded)))
    scratch.replace(record)
    os.environ.update(embedded.environment)
    return embedded


def stop_embedded(settings: Settings) -> list[str]:
    """End the embedded Ray's owner and the orphans that it leaves after a kill -9; says what it ended."""
    ended = []
    embedded = find_embedded(settings)
    if embedded is not None:
        end_process(embedded.owner_pid)
        ended.append(f"scheduler and embedded Ray (process {embedded.owner_pid})")
    folder = f"{_ray_folder(settings)}/"
    orphans = list(_processes_of(folder))
    for process in orphans:
        process.terminate()
    for process in psutil.wait_procs(orphans, timeout=5)[1]:
        process.kill()
    if orphans:
        ended.append(f"{len(orphans)} Ray processes left behind")
    _record(settings).unlink(missing_ok=True)
    return ended


def record_process(settings: Settings, name: str, pid: int) -> None:
    """Remember a process that was started beside Ray, so that `stop_recorded` ends it, and no other of that number."""
    path = settings.home / "run" / f"{name}.process"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"pid": pid, "started": psutil.Process(pid).create_time()}))


def stop_recorded(settings: Settings) -> list[str]:
    """End every recorded process that still runs; says which."""
    ended = []
    for path in sorted((settings.home / "run").glob("*.process")):
        record = json.loads(path.read_text())
        if is_process(record["pid"], record["started"]):
            end_process(record["pid"])
            ended.append(f"{path.stem} (process {record['pid']})")
        path.unlink()
    return ended


def is_process(pid: int, started: float) -> bool:
    """Return whether process `pid` runs and is the one that started then."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_process(pid: int) -> None:
    """Send SIGTERM, then SIGKILL after twenty seconds."""
    try:
        process = psutil.Process(pid)
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.1)
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            process.kill()
    except psutil.NoSuchProcess:
        return


def _processes_of(folder: str) -> Iterator[psutil.Process]:
    """Yield this user's processes that name this folder of Ray's as an argument, or (workers) in the environment."""
    for process in psutil.process_iter(["pid", "uids", "cmdline"]):
        if process.pid == os.getpid() or process.info["uids"] is None or process.info["uids"].real != os.getuid():
            continue
        try:
            if any(folder in argument for argument in process.info["cmdline"] or []) or folder in (
                process.environ().get("RAY_SESSION_DIR", "") if process.name().startswith("ray::") else ""
            ):
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def _record(settings: Settings) -> Path:
    return settings.home / "run" / "ray.json"


def _ray_folder(settings: Settings) -> Path:
    """Return Ray's folder: below LORA_HOME, or, as a socket's path may have 107 characters, a short name below /tmp."""
    folder = settings.home.resolve() / "ray"
    if len(str(folder)) <= 40:
        return folder
    return Path("/tmp") / f"lora-{os.getuid()}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
