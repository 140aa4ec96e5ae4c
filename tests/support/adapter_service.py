"""An adapter server without Ray around it, over one tiny base, and what publishes for it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from cluster.registry import AdapterRegistry, AdapterVersion
from cluster.settings import Settings
from cluster.storage.directory import open_storage
from deploy.serving.protocol import GenerateRequest
from deploy.serving.server import AdapterServer
from lora_core.adapters.peft_format import adapter_files
from lora_core.data.dataset import Example
from lora_core.inference.engine import Generator
from lora_core.inference.generation import GenerationRequest
from lora_core.inference.sampling_params import SamplingParams
from lora_core.models.base import BaseModel, load_base
from lora_core.models.files import chat_template_hash
from lora_core.models.forward import open_forward
from lora_core.models.probes import probe_losses
from tests.support.models import random_adapter
from tests.support.tiny_models import save_tiny_model

QUESTION = GenerateRequest(
    prompt=({"role": "user", "content": "Hi"},),
    adapter=None,
    digest=None,
    max_tokens=12,
    sampling=SamplingParams(temperature=0.0),
    stop=(),
)
ENDLESS = dataclasses.replace(QUESTION, max_tokens=None, sampling=SamplingParams(temperature=2.0, seed=0))


def about(version: AdapterVersion) -> GenerateRequest:
    return dataclasses.replace(QUESTION, adapter=version.name, digest=version.digest)


class Service:
    """A server of one tiny base, with the registry that it reads and the base as training had it, in fp32."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(
            home=home, base_models={"tiny": str(save_tiny_model("llama", home / "tiny", 6))}, threads=1
        )
        self.trained: BaseModel = load_base(str(home / "tiny"), precision="fp32", cache_dir=home / "cache")
        self.forward = open_forward(self.trained)
        self.bank = self.forward.modules
        self.server = AdapterServer("tiny", self.settings)
        self.server._loop._generator.end_tokens = frozenset()  # so that answers end where a test says
        self.registry = AdapterRegistry(open_storage(self.settings.storage_url))
        self.served: AdapterRegistry = self.server._adapters._registry

    def publish(self, name: str, seed: int, **manifest: Any) -> AdapterVersion:
        """A random adapter, as a training session would publish it."""
        adapter = random_adapter(self.bank, seed)
        examples = [Example(list(range(40, 60 + i)), [False] * 10 + [True] * (10 + i)) for i in range(2)]
        losses = probe_losses(self.forward, self.forward.load(adapter), examples)
        own = {
            "base_fingerprint": self.trained.fingerprint,
            "tokenizer": chat_template_hash(self.trained.tokenizer),
            "precision": "fp32",
            "probes": [
                {"ids": example.ids, "labels_mask": example.labels_mask, "loss": loss}
                for example, loss in zip(examples, losses, strict=True)
            ],
        }
        return self.registry.publish("tiny", name, adapter_files(adapter, self.bank, "tiny"), {**own, **manifest})

    def alone(self, version: AdapterVersion) -> str:
        """The answer of a loaded adapter by a generator that has seen nothing else."""
        cache, asked = self.server._adapters, about(version)
        generator = Generator(self.server._base, cache._forward)
        generator.end_tokens = frozenset()
        request = GenerationRequest(
            prompt=self.server._prompt(asked),
            adapter=cache._device.get(version.digest),
            sampling=asked.sampling,
            max_tokens=asked.max_tokens,
        )
        generator.add(request)
        return "".join(event.text for events in iter(generator.step, []) for event in events)

    @property
    def idle(self) -> bool:
        generator = self.server._loop._generator
        return generator.running == generator.waiting == 0


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)
