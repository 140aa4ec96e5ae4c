"""Thousands of adapters against one: `python -m tests.bench.adapter_zipf`.

Random weights in the shape of a Llama and `--adapters` of r 16 on all linears, all of them in host memory (beside a GPU
in pinned memory), of which `--slots` have room where the base computes. As many clients, each in a loop, ask for
`--answer` tokens after a prompt of `--tokens` random ones, through the adapter cache and the decode loop of a replica:
all of one adapter, and then each time of one that is drawn by Zipf's law with exponent 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import tempfile
import time
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch

from cluster.registry import AdapterRegistry
from cluster.settings import Settings
from cluster.storage.directory import open_storage
from deploy.serving.adapter_cache import AdapterCache
from deploy.serving.decode_loop import DecodeLoop
from deploy.serving.memory_tier import MemoryTier
from deploy.serving.metrics import ServingMetrics
from lora_core.inference.engine import Generator
from lora_core.inference.generation import GenerationRequest
from lora_core.inference.sampling_params import SamplingParams
from lora_core.inference.warmup import warm_up
from lora_core.models.base import BaseModel, placed
from lora_core.models.forward import open_forward
from tests.bench.options import bench_parser, head_of
from tests.bench.peers import random_llama
from tests.bench.report import quantile
from tests.bench.serve_http import word_tokenizer
from tests.support.models import random_adapter

GREEDY = SamplingParams(temperature=0)
KINDS = 8  # of weights that differ: those of others have the same numbers in memory of their own


@dataclass
class Window:
    """What is measured between two times."""

    start: float
    end: float
    tokens: int = 0
    firsts: list[float] = field(default_factory=list)

    def took(self, began: float, tokens: int, first: bool) -> None:
        now = time.perf_counter()
        if self.start < now <= self.end:
            self.tokens += tokens
        if first and self.start < began <= self.end:
            self.firsts.append(now - began)

    def row(self, loads: int) -> dict[str, float]:
        firsts = sorted(1e3 * seconds for seconds in self.firsts)
        return {
            "tokens_per_second": round(self.tokens / (self.end - self.start), 1),
            "first_p50_ms": round(quantile(firsts, 0.5), 1),
            "first_p99_ms": round(quantile(firsts, 0.99), 1),
            "requests": len(firsts),
            "loads": loads,
        }


class Replica:
    """A base, its adapters in host memory, and room for a few of them."""

    def __init__(self, arguments: argparse.Namespace, home: Path) -> None:
        self.arguments, device = arguments, torch.device(arguments.device)
        model = random_llama(arguments.shape, device, "lora")
        tokenizer = word_tokenizer(model.config.vocab_size)
        model.generation_config.eos_token_id = None
        self.base = placed(BaseModel(model, tokenizer, "random", "0" * 64, "bf16", device), device)
        forward = open_forward(self.base)
        kinds = [random_adapter(forward.modules, seed, r=16, size=0.01) for seed in range(KINDS)]
        nbytes = sum(weight.numel() for weight in kinds[0].trained) * model.dtype.itemsize
        # Half of one more, as this is rounded.
        settings = Settings(home=home, adapter_memory_gib=(arguments.slots + 0.5) * nbytes / 2**30)
        metrics = ServingMetrics("base")
        generator = Generator(self.base, forward)
        self.loop = DecodeLoop(generator, threads=torch.get_num_threads(), observe=lambda running, waiting: None)
        self.loop.submit(lambda: warm_up(generator)).result()
        registry = AdapterRegistry(open_storage((home / "storage").as_uri()))
        self.cache = AdapterCache(registry, "base", self.base, forward, self.loop, metrics, settings)
        self.cache._host = MemoryTier("host", 2 * arguments.adapters * nbytes, metrics)
        for number in range(arguments.adapters):
            self.cache._host.offer(str(number), forward.stage(kinds[number % KINDS]), nbytes)
        self.loads = 0
        load = forward.load

        def counting(adapter: object) -> object:
            self.loads += 1
            return load(adapter)  # type: ignore[arg-type]

        forward.load = counting  # type: ignore[method-assign, assignment]

    def measure(self, adapters: int, seconds: float) -> dict[str, float]:
        """With so many adapters; as long again before, in which all of them come where they belong."""
        return asyncio.run(self._clients(adapters, seconds))

    async def _clients(self, adapters: int, seconds: float) -> dict[str, float]:
        self.loads, now = 0, time.perf_counter()
        window = Window(now + seconds, now + 2 * seconds)
        weights = list(accumulate(1 / rank for rank in range(1, adapters + 1)))
        await asyncio.gather(*(self._client(seed, weights, window) for seed in range(self.arguments.slots)))
        return window.row(self.loads)

    async def _client(self, seed: int, weights: list[float], window: Window) -> None:
        rng, vocabulary = random.Random(seed), self.base.model.config.vocab_size
        while time.perf_counter() < window.end:
            (digest,) = rng.choices([str(number) for number in range(len(weights))], cum_weights=weights)
            prompt = [rng.randrange(vocabulary) for _ in range(self.arguments.tokens)]
            began, first = time.perf_counter(), True
            async with self.cache.use("default", "name", digest) as adapter:
                asked = GenerationRequest(
                    prompt=prompt, adapter=adapter, digest=digest, sampling=GREEDY, max_tokens=self.arguments.answer
                )
                async with self.loop.answering([asked]) as batches:
                    async for batch in batches:
                        window.took(began, len(batch), first)
                        first = False


def main() -> None:
    """Measure and print."""
    parser = bench_parser(__doc__, tokens=512, of="of a prompt")
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=64, help="adapters that have room, and clients")
    arguments = parser.parse_args()
    seconds = 5.0 if arguments.quick else 30.0
    logging.disable(logging.INFO)  # every load is an event
    with tempfile.TemporaryDirectory() as home:
        replica = Replica(arguments, Path(home))
        options = {name: getattr(arguments, name) for name in ("answer", "adapters", "slots")}
        head = head_of("adapter_zipf", arguments, replica.base.device) | options
        print(head, flush=True)
        rows = {}
        for name, adapters in (("one adapter", 1), ("Zipf", arguments.adapters)):
            rows[name] = replica.measure(adapters, seconds)
            print({name: rows[name]}, flush=True)
    one, zipf = rows.values()
    share = round(zipf["tokens_per_second"] / one["tokens_per_second"], 3)
    ratio = round(zipf["first_p99_ms"] / one["first_p99_ms"], 2)
    print("\n" + json.dumps(head | {"rows": rows, "of_one_adapter": share, "first_p99_over_one": ratio}))


if __name__ == "__main__":
    main()
