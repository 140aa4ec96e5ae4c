"""What a first request would wait for, done before there is one: on a GPU kernels are compiled when they are launched
first, and a step's graph is captured when its shape comes first; a CPU's products are checked at the first step.
"""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Iterator

from lora_core.adapters.init import init_adapter
from lora_core.config import LoraConfig
from lora_core.inference.engine import Generator
from lora_core.inference.generation import GenerationRequest
from lora_core.inference.sampling_params import SamplingParams
from lora_core.models.llama.decode import MIXED_ROWS
from lora_core.models.step import Bound

log = logging.getLogger("lora.engine")

RANK = 16

SEQUENCES = {"cpu": (), "cuda": (1, 2, 4, 8, 16, 24, 32, 48, 64)}
"""That are answered at once: the numbers that steps are rounded up to."""

ANSWERED = {"cpu": (0,), "cuda": (0, 7, 60, 200)}
"""Requests that are being answered while prompts are read."""

STEP_TOKENS = {"cpu": (8,), "cuda": (*MIXED_ROWS, 600)}
"""Of steps that read prompts: on a GPU those that graphs take, and more."""

MOST_BESIDE = 256
"""Tokens of a prompt that are read in a step that also answers."""

ANSWER_TOKENS = 64
"""Of each of those: as many steps as reading all prompts takes, and no memory that a small GPU has not."""


def warm_up(generator: Generator) -> None:
    """Answer prompts that nobody has sent: by the base, by one adapter of `RANK`, and each by another."""
    began, forward = time.monotonic(), generator.forward
    kind = forward.device.type
    adapter = forward.load(init_adapter(forward.modules, LoraConfig(r=RANK), seed=0))
    numbers = itertools.count()
    for sequences in SEQUENCES[kind]:
        for adapters in _adapters(adapter, sequences):
            for of in adapters:
                generator.add(_request(of, numbers, prompt_tokens=1, max_tokens=2))
            _finish(generator)
    for sequences in ANSWERED[kind]:
        for adapters in _adapters(adapter, max(1, sequences)):
            answered = [generator.add(_request(of, numbers, 1, ANSWER_TOKENS)) for of in adapters[:sequences]]
            for tokens in STEP_TOKENS[kind]:
                prompt = min(tokens - sequences, generator.context - 2)
                if 1 < prompt <= (MOST_BESIDE if answered else tokens):
                    _read(generator, _request(adapters[0], numbers, prompt, max_tokens=1))
            for request in answered:
                generator.abort(request)
            _finish(generator)
    log.info("event=warmed_up device=%s seconds=%.1f", kind, time.monotonic() - began)


def _adapters(adapter: Bound, sequences: int) -> Iterator[list[Bound | None]]:
    """None for all of so many, one for all, and one with the same weights for each."""
    yield [None] * sequences
    yield [adapter] * sequences
    if sequences > 1:
        yield [copy.copy(adapter) for _ in range(sequences)]


def _request(adapter: Bound | None, numbers: Iterator[int], prompt_tokens: int, max_tokens: int) -> GenerationRequest:
    """Answered by chance: greedily is a part of that. Its prompt begins as none before it."""
    prompt = [*divmod(next(numbers), 64), *[0] * prompt_tokens][:prompt_tokens]
    return GenerationRequest(prompt=prompt, adapter=adapter, sampling=SamplingParams(seed=0), max_tokens=max_tokens)


def _read(generator: Generator, request: GenerationRequest) -> None:
    """Until its answer begins, beside those of others."""
    number = generator.add(request)
    while all(event.request != number for event in generator.step()):
        pass


def _finish(generator: Generator) -> None:
    while generator.running or generator.waiting:
        generator.step()
