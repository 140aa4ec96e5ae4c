"""What a second Ray on this machine looks like to the first one: a raylet's process, and a node agent's port."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

AGENT_PORT = 52365


def raylet_command(folder: Path, code: str, gcs_address: str) -> list[str]:
    """Runs Python code in a process that is called raylet. It is by them and this argument that Ray finds others."""
    name = folder / "raylet"
    name.symlink_to(sys.executable)
    return [str(name), "-S", "-c", code, f"--gcs-address={gcs_address}"]


@contextlib.contextmanager
def another_ray(folder: Path) -> Iterator[None]:
    """As one does that runs on this machine already, though nobody answers at its address."""
    with socket.socket() as agent:
        with contextlib.suppress(OSError):  # there may be such a Ray
            agent.bind(("127.0.0.1", AGENT_PORT))
            agent.listen()
        with subprocess.Popen(raylet_command(folder, "input()", "127.0.0.1:9"), stdin=subprocess.PIPE) as raylet:
            yield
            raylet.terminate()
