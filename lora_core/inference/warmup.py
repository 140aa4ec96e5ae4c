"""What a first request would wait for, done before there is one: on a GPU kernels are compiled when they are launched
first, and a step's graph is captured when its shape comes first; a CPU's products are checked at the first step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from lora_core.adapters.init import init_adapter
from lora_core.config import LoraConfig
from lora_core.inference.engine import Generator
from lora_core.inference.generation import GenerationRequest
from lora_core.inference.sampling_params import SamplingParams
from lora_core.models.step import Bound

log = logging.getLogger("lora.engine")

RANK = 16

SEQUENCES = {"cpu": (), "cuda": (1, 2, 4, 8, 16, 24, 32, 48, 64)}
"""That are answered at once: the numbers that steps are rounded up to."""

PROMPT_TOKENS = {"cpu": (8,), "cuda": (8, 16, 32, 64, 128, 256, 512, 600)}
"""Of prompts that are read by themselves: on a GPU those that graphs take, and more."""


def warm_up(generator: Generator) -> None:
    """Answer prompts that nobody has sent: by the base, one adapter of `RANK`, and as many as there are prompts."""
    began, forward = time.monotonic(), generator.forward
    kind = forward.device.type
    adapter = forward.load(init_adapter(forward.modules, LoraConfig(r=RANK), seed=0))
    for tokens in PROMPT_TOKENS[kind]:
        for alone in (None, adapter):
            _answer(generator, min(tokens, generator.context - 2), [alone])
    for sequences in SEQUENCES[kind]:
        others = [forward.bind(adapter.adapter) for _ in range(sequences - 1)]  # the same weights
        for adapters in ([None] * sequences, [adapter] * sequences, [adapter, *others]):
            _answer(generator, 1, adapters)
    log.info("event=warmed_up device=%s seconds=%.1f", kind, time.monotonic() - began)


def _answer(generator: Generator, prompt_tokens: int, adapters: Sequence[Bound | None]) -> None:
    """With two tokens, by chance: greedily is a part of that."""
    sampling = SamplingParams(seed=0)
    for adapter in adapters:
        prompt = [prompt_tokens % 256] + [0] * (prompt_tokens - 1)  # which does not begin as one before it
        generator.add(GenerationRequest(prompt=prompt, adapter=adapter, sampling=sampling, max_tokens=2))
    while generator.running or generator.waiting:
        generator.step()
