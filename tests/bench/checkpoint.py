"""What a checkpoint costs the training it is taken from: `python -m tests.bench.checkpoint [threads]`.

An adapter of SmolLM2-135M's shapes, r 16 on all linears, beside a step of 4 documents of 256 tokens on random weights,
in bf16 where the CPU multiplies in it. A step waits for the copy of the job's state (A, B, both moments); writing and
hashing happen in a thread beside the next steps. The share is that of a checkpoint after every step; the service takes
one a minute. On a GPU: the part `ends` of `train_gpu`.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from lora_core.config import LoraConfig, TrainConfig
from lora_core.models.attention import ATTENTION_NAME
from lora_core.models.base import BaseModel
from lora_core.models.fastest_precision import fastest_precision
from lora_core.models.files import DTYPES
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob
from tests.bench.engines import random_documents

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
DOCUMENTS, TOKENS, STEPS = 4, 256, 5


def smollm2_shaped(precision: str) -> BaseModel:
    """Random weights: how long a step takes does not depend on what they are."""
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**SHAPE), attn_implementation=ATTENTION_NAME, dtype=DTYPES[precision]
    )
    model = model.eval().requires_grad_(False)
    return BaseModel(model, PreTrainedTokenizerBase(), "smollm2-shaped", "0" * 64, precision, torch.device("cpu"))


def main(threads: int) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    shape = (SHAPE["hidden_size"], SHAPE["intermediate_size"])
    with tempfile.TemporaryDirectory() as memory:
        precision = fastest_precision([shape], "smollm2-shaped", Path(memory)).precision
    engine = TrainEngine(smollm2_shaped(precision))
    examples = random_documents([TOKENS] * DOCUMENTS, SHAPE["vocab_size"])
    live = engine.add(EngineJob("job", LoraConfig(), TrainConfig(batch_size=DOCUMENTS, epochs=1000), examples))
    seconds: dict[str, list[float]] = {"step": [], "copy (the step waits)": [], "write": [], "hash": []}

    def clocked(name: str, began: float) -> None:
        seconds[name].append(time.perf_counter() - began)

    for _ in range(STEPS):
        began = time.perf_counter()
        engine.step()
        clocked("step", began)
        began = time.perf_counter()
        snapshot = live.snapshot()
        clocked("copy (the step waits)", began)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            snapshot.write(path := Path(folder) / "state")
            clocked("write", began)
            began = time.perf_counter()
            with path.open("rb") as written:
                hashlib.file_digest(written, "sha256")
            clocked("hash", began)
            megabytes = path.stat().st_size / 1e6
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    share = medians["copy (the step waits)"] / medians["step"]
    words = {"bench": "checkpoint", "precision": precision, "threads": threads}
    print(f"SmolLM2-135M's shapes, r 16 all-linear, {megabytes:.0f} MB, {STEPS} steps, {words}\n")
    for name, median in medians.items():
        print(f"{name:<24} {median * 1e3:>9.1f} ms  {median / medians['step']:>7.2%} of a step")
    milliseconds = {name.split()[0]: round(median * 1e3, 1) for name, median in medians.items()}
    print("\n" + json.dumps(words | {"ms": milliseconds, "share": round(share, 5)}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
