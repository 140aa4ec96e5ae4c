"""Minutes of mixed load on the Serve application: `python -m tests.bench.soak [--minutes 30]`.

Sixteen clients ask a tiny base and forty adapters of it, of which the replica has room for a few: whole and streamed,
greedy and drawn. Some leave in the middle, ask for what does not exist, or for what cannot be. Meanwhile new versions
are published under live names. An error is an answer of another kind than the question's, or a fingerprint that the
name never had. The memory is what all processes of the application have for themselves; growth is the median of its
last fifth over that of its second, the first being the warm-up.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import psutil

from cluster.registry import AdapterRegistry, content_digest
from cluster.storage.directory import open_storage
from lora_core.adapters.peft_format import adapter_files
from lora_core.models.base import load_base
from lora_core.models.hooks.bank import AdapterBank
from tests.support.models import random_adapter
from tests.support.serve_app import running_app
from tests.support.tiny_models import save_tiny_model

CLIENTS, ADAPTERS, SAMPLE_SECONDS, PUBLISH_SECONDS = 16, 40, 2.0, 1.5
ALLOWED_GROWTH = 0.02


class Soak:
    """The published adapters, and what clients saw."""

    def __init__(self, home: Path, port: int, seconds: float) -> None:
        self.base = load_base(str(home / "tiny"), precision="fp32", cache_dir=home / "cache")
        self.bank = AdapterBank(self.base.model)
        self.registry = AdapterRegistry(open_storage((home / "storage").as_uri()))
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        self.until = time.monotonic() + seconds
        self.digests: dict[str, set[str]] = {}
        self.seen: Counter[str] = Counter()
        self.errors: list[str] = []
        for n in range(ADAPTERS):
            self.publish(f"a{n}", n)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until

    def publish(self, name: str, seed: int) -> None:
        """A new version, which counts as published before anybody can see it."""
        files = adapter_files(random_adapter(self.bank, seed), self.bank, "tiny")
        manifest = {"base_fingerprint": self.base.fingerprint, "precision": "fp32"}
        entries = {file: {"sha256": hashlib.sha256(content).hexdigest()} for file, content in files.items()}
        self.digests.setdefault(name, set()).add(content_digest(entries))
        self.registry.publish("tiny", name, files, manifest)

    def publisher(self) -> None:
        """New versions under live names, from a set that is reused, so that the disk does not fill."""
        rng = random.Random(1)
        while not self.over:
            time.sleep(PUBLISH_SECONDS)
            self.publish(f"a{rng.randrange(ADAPTERS)}", rng.randrange(200))
            self.seen["published"] += 1

    def ask(self, number: int) -> None:
        """One client's questions."""
        rng = random.Random(number)
        kinds = (self._whole, self._stream, self._leave, self._missing, self._wrong)
        while not self.over:
            kind = rng.choices(kinds, weights=(50, 30, 10, 5, 5))[0]
            adapter = f"a{min(int(rng.paretovariate(0.8)) - 1, ADAPTERS - 1)}" if rng.random() < 0.9 else None
            try:
                kind(adapter, rng)
                self.seen[kind.__name__[1:]] += 1
            except openai.RateLimitError:
                self.seen["told to come back"] += 1
            except Exception as error:
                self.errors.append(f"{kind.__name__[1:]} of {adapter}: {type(error).__name__}: {error}"[:300])

    def _whole(self, adapter: str | None, rng: random.Random) -> None:
        answer = self._create(adapter, rng, stream=False)
        assert answer.usage.completion_tokens > 0
        self._check(adapter, answer.system_fingerprint)

    def _stream(self, adapter: str | None, rng: random.Random) -> None:
        fingerprints = {chunk.system_fingerprint for chunk in self._create(adapter, rng, stream=True)}
        assert len(fingerprints) == 1
        self._check(adapter, fingerprints.pop())

    def _leave(self, adapter: str | None, rng: random.Random) -> None:
        stream = self._create(adapter, rng, stream=True)
        next(iter(stream))
        stream.close()

    def _missing(self, adapter: str | None, rng: random.Random) -> None:
        try:
            self._create("nothing", rng, stream=False)
        except openai.NotFoundError:
            return
        raise AssertionError("what does not exist has answered")

    def _wrong(self, adapter: str | None, rng: random.Random) -> None:
        try:
            self._create(adapter, rng, stream=False, temperature=9)
        except openai.BadRequestError:
            return
        raise AssertionError("what cannot be has been answered")

    def _create(self, adapter: str | None, rng: random.Random, **options: Any) -> Any:
        messages: Any = [{"role": "user", "content": "x" * rng.randrange(1, 120)}]
        options = {"temperature": rng.choice((0, 1)), "max_tokens": rng.randrange(1, 48), **options}
        model = "tiny" if adapter is None else f"tiny:{adapter}"
        return self.client.chat.completions.create(model=model, messages=messages, **options)

    def _check(self, adapter: str | None, fingerprint: str) -> None:
        known = {self.base.fingerprint} if adapter is None else self.digests[adapter]
        assert fingerprint in known, f"answered with {fingerprint[:16]}"


def memory(root: psutil.Process) -> float:
    """MiB that these processes have for themselves."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().uss
        except psutil.Error:
            continue
    return total / 2**20


def main() -> int:
    """Run and print; the exit code is 1 where there was an error, or memory has grown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lora-soak-") as folder:
        home = Path(folder)
        base = save_tiny_model("llama", home / "tiny", seed=6)
        settings = {"LORA_ADAPTER_MEMORY_GIB": "0.0003", "LORA_THREADS": "1"}  # room for a few of them
        with running_app(home, {"tiny": base}, settings) as app:
            soak = Soak(home, app.port, 60 * arguments.minutes)
            samples = watch(soak, psutil.Process(app.pid))
    return report(soak, samples, arguments.minutes)


def watch(soak: Soak, root: psutil.Process) -> list[float]:
    """Memory, from time to time, while all clients ask."""
    threads = [threading.Thread(target=soak.ask, args=(number,)) for number in range(CLIENTS)]
    threads.append(threading.Thread(target=soak.publisher))
    for thread in threads:
        thread.start()
    samples = []
    while not soak.over:
        time.sleep(SAMPLE_SECONDS)
        samples.append(memory(root))
    for thread in threads:
        thread.join()
    return samples


def report(soak: Soak, samples: list[float], minutes: float) -> int:
    """Print what happened as a table and a line of JSON; returns the exit code."""
    fifth = len(samples) // 5
    before, after = statistics.median(samples[fifth : 2 * fifth]), statistics.median(samples[-fifth:])
    growth = after / before - 1
    print(f"{minutes:g} minutes, {CLIENTS} clients, {ADAPTERS} adapters")
    for kind, count in soak.seen.most_common():
        print(f"{kind:<20}{count:>8}")
    print(f"{'MiB':<20}{before:>8.0f} -> {after:.0f} ({growth:+.2%}, {ALLOWED_GROWTH:.0%} allowed)")
    print(f"{'errors':<20}{len(soak.errors):>8}", *soak.errors[:10], sep="\n  ")
    figures = {"seen": soak.seen, "mib": [round(before, 1), round(after, 1)], "growth": round(growth, 5)}
    print("\n" + json.dumps({"bench": "soak", "minutes": minutes, **figures, "errors": len(soak.errors)}))
    return int(bool(soak.errors) or growth > ALLOWED_GROWTH)


if __name__ == "__main__":
    raise SystemExit(main())
