"""What processes that tests start need of this machine: a port, and an environment that names no Ray or service."""

from __future__ import annotations

import os
import socket


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def clean_environment(*more: str) -> dict[str, str]:
    """This process's, without what names a Ray, a service of ours, or begins with one of `more`."""
    names = ("RAY_", "LORA_", *more)
    return {name: value for name, value in os.environ.items() if not name.startswith(names)}
