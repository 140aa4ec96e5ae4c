"""Tokens/s of training on CPU, this engine against PEFT in the same run: `python -m tests.bench.train_cpu [threads]`.

SmolLM2-135M in bf16, r 16 on all linears, a step of 4 documents of 256 tokens, every token supervised. The two take
turns, so that what else the machine does hits both; the best step of each counts. A last row trains eight adapters at
once, which PEFT cannot.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from transformers import AutoModelForCausalLM

from lora_core.base_model import BaseModel, load_base, local_folder
from lora_core.config import LoraConfig, TrainConfig
from lora_core.dataset import Example
from lora_core.trainer import EngineJob, TrainEngine
from tests.tiny_models import smollm2_gguf

DOCUMENTS, TOKENS, STEPS = 4, 256, 6


def random_documents(count: int, tokens: int, vocabulary: int) -> list[Example]:
    """Random tokens, all but the first supervised."""
    ids = torch.randint(0, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return [Example(row, [False] + [True] * (tokens - 1)) for row in ids]


def ours(base: BaseModel, jobs: int, documents: int, tokens: int) -> Callable[[], object]:
    """One step of `jobs` adapters, each on `documents` documents."""
    engine = TrainEngine(base)
    examples = random_documents(documents, tokens, base.model.config.vocab_size)
    for number in range(jobs):
        engine.add(EngineJob(f"job{number}", LoraConfig(), TrainConfig(batch_size=documents, epochs=1000), examples))
    return engine.step


def pefts(folder: Path) -> Callable[[], object]:
    """One step as PEFT's users write it."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    examples = random_documents(DOCUMENTS, TOKENS, base.config.vocab_size)
    ids = torch.tensor([example.ids for example in examples])

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    return step


def main(threads: int) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    cache = Path(os.environ.get("LORA_TEST_CACHE") or tempfile.mkdtemp())
    source = smollm2_gguf()
    base = load_base(source, precision="bf16", cache_dir=cache, device=torch.device("cpu"))
    tokens = DOCUMENTS * TOKENS
    steps = {
        "peft, 4 x 256": pefts(local_folder(source, cache)),
        "ours, 4 x 256": ours(base, 1, DOCUMENTS, TOKENS),
        "ours, 8 adapters, 8 x 128": ours(base, 8, 1, tokens // 8),
    }
    best = dict.fromkeys(steps, float("inf"))
    cpu = dict.fromkeys(steps, float("inf"))
    for _ in range(STEPS):
        for name, step in steps.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            step()
            best[name] = min(best[name], time.perf_counter() - began)
            cpu[name] = min(cpu[name], time.process_time() - began_cpu)
    print(f"SmolLM2-135M, bf16, r 16 all-linear, {threads} threads, best of {STEPS} steps\n")
    print(f"{'':<26} {'tokens/s':>9} {'s a step':>9} {'CPU s a step':>13}")
    for name in steps:
        print(f"{name:<26} {tokens / best[name]:>9.0f} {best[name]:>9.2f} {cpu[name]:>13.2f}")
    rates = {name: round(tokens / seconds, 1) for name, seconds in best.items()}
    print("\n" + json.dumps({"bench": "train_cpu", "threads": threads, "tokens_per_second": rates}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
