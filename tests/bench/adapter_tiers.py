"""What an adapter costs from each tier of a server's memory: `python -m tests.bench.adapter_tiers [--device cuda]`.

An adapter of r 16 on all linears of a random base, as the server brings it to where the base computes: from a bucket (a
local S3 server; a directory where there is none), from files on disk, from host memory. What lies on the device already
costs nothing. A tier pays where it is faster than the one below it by more than it costs to keep.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from cluster.registry import AdapterRegistry, AdapterVersion
from cluster.storage.directory import open_storage
from cluster.storage.disk_cache import DiskCache
from lora_core.adapters.adapter import Adapter
from lora_core.adapters.init import init_adapter
from lora_core.adapters.peft_format import adapter_files, read_adapter
from lora_core.config import LoraConfig
from lora_core.models.base import BaseModel, placed
from lora_core.models.forward import Forward, open_forward
from tests.bench.checkpoint import smollm2_shaped
from tests.bench.engines import base_of
from tests.bench.peers import SHAPES, random_llama
from tests.bench.report import seconds_of
from tests.support.s3_server import running_s3_server

ROUNDS = 9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["smollm2-135m", *SHAPES], default="smollm2-135m")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cpu")
    arguments = parser.parse_args()
    base = _base(arguments.shape, torch.device(arguments.device))
    forward = open_forward(base)
    adapter = init_adapter(forward.modules, LoraConfig(r=16), seed=0)
    for b in adapter.b.values():
        torch.nn.init.normal_(b)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        url = Path(folder, "storage").as_uri()
        with contextlib.suppress(FileNotFoundError):  # no SeaweedFS
            server = stack.enter_context(running_s3_server(Path(folder, "s3")))
            os.environ |= server.environment
            url = f"s3://{server.bucket}/bench"
        registry = AdapterRegistry(open_storage(url))
        version = registry.publish("base", "adapter", adapter_files(adapter, forward.modules, "base"), {})
        seconds = _measure(base, forward, registry, version, DiskCache(Path(folder, "cache"), 2**40))
    megabytes = sum(entry["size"] for entry in version.manifest["files"].values()) / 1e6
    _report(arguments, url.partition(":")[0], megabytes, seconds)


def _base(shape: str, device: torch.device) -> BaseModel:
    if shape == "smollm2-135m":
        return placed(smollm2_shaped("fp32"), device)
    return base_of(random_llama(shape, device), "bf16")


def _measure(
    base: BaseModel, forward: Forward, registry: AdapterRegistry, version: AdapterVersion, cache: DiskCache
) -> dict[str, float]:
    """Median seconds from each tier."""

    def host(of: DiskCache | None) -> Adapter:
        with registry.files(version, of) as folder:
            return forward.stage(read_adapter(folder, forward.modules))

    kept = host(cache)
    cases: dict[str, Callable[[], object]] = {
        "storage": lambda: forward.load(host(None)),
        "disk": lambda: forward.load(host(cache)),
        "host": lambda: forward.load(kept),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, load in cases.items():
            times[name].append(seconds_of(load, base.device))
    return {name: statistics.median(of_case) for name, of_case in times.items()}


def _report(arguments: argparse.Namespace, storage: str, megabytes: float, seconds: dict[str, float]) -> None:
    words = {"bench": "adapter_tiers", "shape": arguments.shape, "device": arguments.device, "storage": storage}
    print(f"{words}, {megabytes:.0f} MB of files, median of {ROUNDS}\n")
    for name, median in seconds.items():
        print(f"{name:<10}{1000 * median:>10.1f} ms")
    milliseconds = {name: round(1000 * median, 1) for name, median in seconds.items()}
    print("\n" + json.dumps(words | {"megabytes": round(megabytes, 1), "ms": milliseconds}))


if __name__ == "__main__":
    main()
