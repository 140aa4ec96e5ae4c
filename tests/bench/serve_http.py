"""Answering through Ray Serve against the engine called directly: `python -m tests.bench.serve_http`.

Random weights in the shape of a Llama, with random adapters of r 16 on all linears in a registry on a local S3 server
(a directory where there is none). Prompts of `--tokens` random tokens that nobody has sent before are answered greedily
with `--answer` tokens, by the engine in this process and then by the Serve application over HTTP. Parts:

    streams   `--clients` at once, with `--adapters` adapters: tokens/s, and the time between two pieces of a stream
    first     one after another: the time to the first token
    cold      the first token of adapters that nobody has asked for before, beside that of a resident one

`steady` is the time in which all are being answered: from the last one's first token to the first one's last.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cluster.registry import AdapterRegistry
from cluster.storage.directory import open_storage
from lora_core.adapters.peft_format import adapter_files
from lora_core.inference.engine import Generator
from lora_core.inference.generation import GeneratedToken, GenerationRequest
from lora_core.inference.sampling_params import SamplingParams
from lora_core.models.base import BaseModel, load_base
from lora_core.models.forward import open_forward
from tests.bench.checkpoint import smollm2_shaped
from tests.bench.http_client import Answer, Connection
from tests.bench.options import some_of
from tests.bench.peers import SHAPES, random_llama
from tests.bench.report import free_memory, quantile
from tests.support.models import random_adapter
from tests.support.s3_server import running_s3_server
from tests.support.serve_app import running_app

PARTS = ("streams", "first", "cold")
GREEDY = SamplingParams(temperature=0)
SMOLLM2 = "smollm2-135m"


class Prompts:
    """Random ids, the same ones for both sides."""

    def __init__(self, vocabulary: int, tokens: int) -> None:
        self._vocabulary, self._tokens = vocabulary, tokens
        self._stream = torch.Generator().manual_seed(0)

    def fresh(self, count: int) -> list[list[int]]:
        shape = (count, self._tokens)
        found: list[list[int]] = torch.randint(self._vocabulary, shape, generator=self._stream).tolist()
        return found


class Engine:
    """The base with some adapters in this process."""

    def __init__(self, base: BaseModel, adapters: int) -> None:
        self.base, self.forward = base, open_forward(base)
        self.generator = Generator(base, self.forward)
        assert not self.generator.end_tokens
        self._adapters = [random_adapter(self.forward.modules, seed, r=16, size=0.01) for seed in range(adapters)]
        self._loaded = [self.forward.load(adapter) for adapter in self._adapters]

    def publish(self, registry: AdapterRegistry, cold: int) -> None:
        """The same adapters, and some that are not loaded here."""
        more = (random_adapter(self.forward.modules, len(self._adapters) + n, r=16, size=0.01) for n in range(cold))
        manifest = {"base_fingerprint": self.base.fingerprint, "precision": self.base.precision}
        for prefix, adapters in (("a", self._adapters), ("cold", more)):
            for number, adapter in enumerate(adapters):
                files = adapter_files(adapter, self.forward.modules, "base")
                registry.publish("base", f"{prefix}{number}", files, manifest)

    def answers(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
        """To all at once, by the adapters in turn."""
        answers: dict[int, Answer] = {}
        for index, prompt in enumerate(prompts):
            adapter = self._loaded[index % len(self._loaded)]
            answer = Answer()
            request = GenerationRequest(prompt=prompt, adapter=adapter, sampling=GREEDY, max_tokens=tokens)
            answers[self.generator.add(request)] = answer
        while self.generator.running or self.generator.waiting:
            events, now = self.generator.step(), time.perf_counter()
            for event in events:
                assert isinstance(event, GeneratedToken)
                answers[event.request].pieces.append((now, 1))
        return list(answers.values())


class Service:
    """The application, asked over as many connections as there are clients."""

    def __init__(self, connections: Sequence[Connection], adapters: int) -> None:
        self._connections, self._adapters = connections, adapters

    async def answers(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Answer]:
        """As the engine's."""
        asked = [
            connection.answer(f"base:a{index % self._adapters}", prompt, tokens)
            for index, (connection, prompt) in enumerate(zip(self._connections, prompts, strict=False))
        ]
        return await asyncio.gather(*asked)

    async def first(self, model: str, prompt: Sequence[int]) -> float:
        """Seconds to the first token."""
        return (await self._connections[0].answer(f"base:{model}", prompt, 1)).first


def save_base(shape: str, device: torch.device, folder: Path) -> None:
    """A model whose answers do not end by themselves."""
    model = smollm2_shaped("bf16").model if shape == SMOLLM2 else random_llama(shape, device)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    word_tokenizer(model.config.vocab_size).save_pretrained(folder)


def word_tokenizer(tokens: int) -> PreTrainedTokenizerFast:
    """Each token is a word by itself; none is special."""
    words = Tokenizer(models.BPE(vocab={f"Ġ{index:x}": index for index in range(tokens)}, merges=[]))
    words.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def streams_row(rounds: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """Medians over rounds of rates, and gaps of all rounds."""
    rates = [_rates(answers) for answers in rounds]
    row = {name: statistics.median(of[name] for of in rates) for name in rates[0]}
    for name, steady in (("gap", False), ("steady_gap", True)):
        gaps = sorted(1e3 * gap for answers in rounds for gap in _gaps(answers, steady))
        row |= {f"{name}_p50_ms": quantile(gaps, 0.5), f"{name}_p99_ms": quantile(gaps, 0.99)}
    return {name: round(value, 2) for name, value in row.items()}


def _rates(answers: Sequence[Answer]) -> dict[str, float]:
    pieces = [piece for answer in answers for piece in answer.pieces]
    seconds = max(at for at, _ in pieces) - min(answer.began for answer in answers)
    start, end = _steady(answers)
    steady = sum(tokens for at, tokens in pieces if start < at <= end)
    return {
        "tokens_per_second": sum(tokens for _, tokens in pieces) / seconds,
        "steady_tokens_per_second": steady / (end - start) if end > start else float("nan"),
        "tokens_a_piece": sum(tokens for _, tokens in pieces) / len(pieces),
    }


def _steady(answers: Sequence[Answer]) -> tuple[float, float]:
    return max(answer.pieces[0][0] for answer in answers), min(answer.pieces[-1][0] for answer in answers)


def _gaps(answers: Sequence[Answer], steady: bool) -> list[float]:
    start, end = _steady(answers) if steady else (0.0, float("inf"))
    times = [[at for at, _ in answer.pieces if start <= at <= end] for answer in answers]
    return [after - before for of in times for before, after in itertools.pairwise(of)]


def first_row(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(1e3 * one for one in seconds)
    return {"p50_ms": round(quantile(ordered, 0.5), 2), "p99_ms": round(quantile(ordered, 0.99), 2)}


class Measurement:
    """What both sides are asked, in the same order."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.rows = arguments, dict[str, dict[str, float]]()
        self._rounds, self._singles = (1, 10) if arguments.quick else (3, 50)

    def add(self, name: str, row: dict[str, float]) -> None:
        self.rows[name] = row
        print({name: row}, flush=True)

    def engine(self, engine: Engine, prompts: Prompts) -> None:
        """The first round of each part warms up."""
        arguments = self.arguments
        if "streams" in arguments.only:
            rounds = [
                engine.answers(prompts.fresh(arguments.clients), arguments.answer) for _ in range(1 + self._rounds)
            ]
            self.add("streams, engine", streams_row(rounds[1:]))
        if "first" in arguments.only:
            singles = [engine.answers([prompt], 1)[0].first for prompt in prompts.fresh(2 + self._singles)]
            self.add("first, engine", first_row(singles[2:]))

    async def service(self, port: int, prompts: Prompts) -> None:
        arguments = self.arguments
        connections = [await Connection.open(port) for _ in range(arguments.clients)]
        service = Service(connections, arguments.adapters)
        if "streams" in arguments.only:
            rounds = [
                await service.answers(prompts.fresh(arguments.clients), arguments.answer)
                for _ in range(1 + self._rounds)
            ]
            self.add("streams, HTTP", streams_row(rounds[1:]))
        if "first" in arguments.only:
            singles = [await service.first("a0", prompt) for prompt in prompts.fresh(2 + self._singles)]
            self.add("first, HTTP", first_row(singles[2:]))
        if "cold" in arguments.only:
            pairs = prompts.fresh(2 * self.cold)
            seconds = [
                (await service.first("a0", resident), await service.first(f"cold{number}", cold))
                for number, (resident, cold) in enumerate(zip(pairs[::2], pairs[1::2], strict=True))
            ]
            self.add("cold, a resident adapter", first_row([resident for resident, _ in seconds[1:]]))
            self.add("cold, a cold one", first_row([cold for _, cold in seconds[1:]]))
        for connection in connections:
            connection.close()

    @property
    def cold(self) -> int:
        """Adapters that nobody has asked for, of which the first warms up."""
        return (4 if self.arguments.quick else 12) if "cold" in self.arguments.only else 0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, SMOLLM2], default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where the application computes, too")
    parser.add_argument("--tokens", type=int, default=512, help="of a prompt")
    parser.add_argument("--answer", type=int, default=256, help="tokens of an answer")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--only", type=some_of(PARTS), default=PARTS)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    measurement = Measurement(arguments)
    with tempfile.TemporaryDirectory(prefix="lora-bench-") as folder, storage(Path(folder)) as (url, environment):
        home = Path(folder)
        head, vocabulary = measure_engine(measurement, home, url)
        settings = {"LORA_STORAGE_URL": url, "LORA_MAX_ONGOING_REQUESTS": str(max(64, arguments.clients))}
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if arguments.device == "cpu" else {}
        with running_app(home, {"base": home / "base"}, settings | environment | hidden) as app:
            asyncio.run(measurement.service(app.port, Prompts(vocabulary, arguments.tokens)))
    print("\n" + json.dumps(head | {"rows": measurement.rows}))


@contextlib.contextmanager
def storage(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a storage in `folder`, and the variables that it needs, which this process has, too."""
    url, environment = (folder / "storage").as_uri(), dict[str, str]()
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(FileNotFoundError):  # no SeaweedFS
            server = stack.enter_context(running_s3_server(folder / "s3"))
            url, environment = f"s3://{server.bucket}/bench", server.environment
        os.environ |= environment
        yield url, environment


def measure_engine(measurement: Measurement, home: Path, url: str) -> tuple[dict[str, Any], int]:
    """Make the base in `home` and publish its adapters at `url`; returns what there is to say of it, and its tokens."""
    arguments, device = measurement.arguments, torch.device(measurement.arguments.device)
    save_base(arguments.shape, device, home / "base")
    free_memory()
    base = load_base(str(home / "base"), cache_dir=home / "cache", device=device)
    head, vocabulary = head_of(arguments, base, url.partition(":")[0]), base.model.config.vocab_size
    print(head, flush=True)
    engine = Engine(base, arguments.adapters)
    engine.publish(AdapterRegistry(open_storage(url)), measurement.cold)
    measurement.engine(engine, Prompts(vocabulary, arguments.tokens))
    engine.forward.close()
    del engine, base
    free_memory()
    return head, vocabulary


def head_of(arguments: argparse.Namespace, base: BaseModel, storage: str) -> dict[str, Any]:
    """What the line of JSON begins with."""
    name = torch.cuda.get_device_name() if base.device.type == "cuda" else "cpu"
    options = ("shape", "tokens", "answer", "clients", "adapters")
    asked = {option: getattr(arguments, option) for option in options}
    conditions = {"precision": base.precision, "device": name, "torch": torch.__version__, "storage": storage}
    return {"bench": "serve_http", **asked, **conditions}


if __name__ == "__main__":
    main()
