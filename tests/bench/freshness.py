"""How long a job's adapter takes from its last step to an answer: `python -m tests.bench.freshness [--base SOURCE]`.

Jobs of a few steps on an embedded Ray, beside the Serve application, in fp32 and in a LORA_HOME of their own. While one
trains, a client asks its adapter for a token every 20 ms: under a new name until that exists, under a live one until an
answer has the new version's fingerprint. The ends of the last step and of the upload are in the manifest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai

from cluster.registry import AdapterRegistry
from cluster.settings import Settings
from cluster.storage.directory import open_storage
from jobs.demo import served
from tests.support.machine import clean_environment, free_port
from tests.support.tiny_models import save_tiny_model

POLL_SECONDS, PATIENCE_SECONDS = 0.02, 240.0
STAGES = ("probes, files and upload", "noticed, loaded and first token", "last step to first token")


class Service:
    """A LORA_HOME with its Ray, its server, and a client."""

    def __init__(self, home: Path, base: str) -> None:
        source = str(save_tiny_model("llama", home / "tiny")) if base == "tiny" else base
        self.home, self.base = home, "base"
        environment = {
            "LORA_HOME": str(home),
            "LORA_BASE_MODELS": json.dumps({self.base: source}),
            "LORA_SERVE_PORT": str(free_port()),
            "LORA_SESSION_IDLE_SECONDS": "600",
            "HF_HUB_OFFLINE": "1",
        }
        kept = clean_environment()
        os.environ.clear()
        os.environ.update(kept | environment)
        self.settings = Settings()
        self.registry = AdapterRegistry(open_storage(self.settings.storage_url))
        self.client: openai.OpenAI

    def jobs(self, *arguments: str) -> subprocess.Popen[bytes]:
        """`python -m jobs ...`, quietly: the job may have ended before the command has."""
        return subprocess.Popen([sys.executable, "-m", "jobs", *arguments], stdout=subprocess.DEVNULL)

    def submit(self, adapter: str, seed: int) -> subprocess.Popen[bytes]:
        """A job of ten steps."""
        rows = [{"prompt": f"{adapter} item {i}: ", "completion": f"code {i * 7 % 13}"} for i in range(20)]
        dataset, spec = self.home / f"{adapter}-{seed}.jsonl", self.home / f"{adapter}-{seed}.json"
        dataset.write_text("\n".join(map(json.dumps, rows)))
        train = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "seed": seed}
        job = {"base_model": self.base, "dataset": str(dataset), "adapter": adapter, "train": train}
        spec.write_text(json.dumps(job | {"precision": "fp32", "lora": {"r": 16, "target_modules": "all-linear"}}))
        return self.jobs("submit", str(spec), "--detach")

    def first_answer(self, adapter: str, not_of: str | None) -> tuple[str, float]:
        """The digest that the adapter answers with and when it did, once that is another than `not_of`."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                answer = self.client.completions.create(
                    model=f"{self.base}:{adapter}", prompt=f"{adapter} item 1: ", max_tokens=1, temperature=0
                )
                if answer.system_fingerprint != not_of:
                    return str(answer.system_fingerprint), time.time()
            except openai.NotFoundError:
                pass
            time.sleep(POLL_SECONDS)
        raise SystemExit(f"{adapter} did not answer in {PATIENCE_SECONDS:.0f} s; look into {self.home}/logs")

    def measure(self, adapter: str, seed: int, not_of: str | None) -> tuple[str, list[float]]:
        """The digest of one job's adapter, and the milliseconds of `STAGES`."""
        submitting = self.submit(adapter, seed)
        digest, answered = self.first_answer(adapter, not_of)
        submitting.wait()
        manifest = self.registry.resolve(self.base, adapter).manifest
        assert manifest["digest"] == digest
        trained, published = manifest["trained_at"], manifest["created_at"]
        return digest, [1000 * (published - trained), 1000 * (answered - published), 1000 * (answered - trained)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny", help="a random tiny one, or a hub id, directory or GGUF file")
    parser.add_argument("--jobs", type=int, default=3, help="of each kind, after one that warms up")
    arguments = parser.parse_args()
    rows: dict[str, list[list[float]]] = {"a new name": [], "a live name": []}
    with tempfile.TemporaryDirectory(prefix="lora-fresh-") as folder:
        service = Service(Path(folder), arguments.base)
        try:
            service.submit("warm", 0).wait()
            url = served(service.settings)
            service.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
            live, _ = service.first_answer("warm", None)
            for seed in range(1, arguments.jobs + 1):
                rows["a new name"].append(service.measure(f"new-{seed}", seed, None)[1])
                live, times = service.measure("warm", seed, live)
                rows["a live name"].append(times)
                print({name: [round(ms) for ms in of_name[-1]] for name, of_name in rows.items()}, flush=True)
        finally:
            service.jobs("stop").wait()
    report(arguments.base, rows)


def report(base: str, rows: dict[str, list[list[float]]]) -> None:
    """Print the medians as a table, and a line of JSON."""
    medians = {
        name: {stage: statistics.median(times[i] for times in of_name) for i, stage in enumerate(STAGES)}
        for name, of_name in rows.items()
    }
    print(f"\n{base}, fp32, ms (median of {len(rows['a new name'])})")
    for name, stages in medians.items():
        print(f"{name:<14}" + "".join(f"{stage}: {median:.0f}   " for stage, median in stages.items()))
    print("\n" + json.dumps({"bench": "freshness", "base": base, "ms": medians, "all": rows}))


if __name__ == "__main__":
    main()
