"""How much memory this machine, or this container, has left."""

from __future__ import annotations

from pathlib import Path

import psutil


def free_host_bytes() -> int:
    """What processes may still take, with what is mapped from files and can be dropped."""
    available = int(psutil.virtual_memory().available)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (limit.parent / "memory.stat").read_text().splitlines())
        available = min(available, int(text) - int(stat["anon"]))
    return available
