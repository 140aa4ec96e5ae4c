"""What a base's precision costs in loss: `python -m tests.bench.precision [steps]`.

SmolLM2-135M learns the example tickets (`jobs/examples/triage.jsonl`), r 16 on all linears, from the same start on the
same rows, on a base in each precision; then the held-out tickets are evaluated. On a CPU the fp8 products are those of
the GPU's matrix units, rounding for rounding of their operands, summed in fp32.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from lora_core.base_model import BaseModel, load_base, placed
from lora_core.config import LoraConfig, TrainConfig
from lora_core.dataset import Example, build_examples, read_rows
from lora_core.engine_job import EngineJob
from lora_core.trainer import TrainEngine
from tests.tiny_models import smollm2_gguf

PRECISIONS = ("fp32", "bf16", "fp8", "nf4")
CPU = torch.device("cpu")


def base_in(precision: str, cache: Path) -> BaseModel:
    """The base; fp8 too, which `load_base` refuses on a CPU because it is slow there."""
    dense = load_base(smollm2_gguf(), precision="fp32" if precision == "fp32" else "bf16", cache_dir=cache, device=CPU)
    return placed(replace(dense, precision=precision, decoder=None), CPU) if precision in ("fp8", "nf4") else dense


def losses(base: BaseModel, steps: int) -> tuple[float, float, float]:
    """Held-out loss before training, training loss of the last quarter of the steps, held-out loss after them."""
    rows, held_out = (_examples(base, name) for name in ("triage", "triage_heldout"))
    train = TrainConfig(batch_size=8, epochs=100, learning_rate=1e-3, lr_scheduler="constant", eval_steps=steps)
    engine = TrainEngine(base)
    live = engine.add(EngineJob("job", LoraConfig(), train, rows, held_out))
    seen: list[float] = []
    while live.progress.step < steps:
        for outcome in engine.step().values():
            assert not isinstance(outcome, Exception)
            seen.append(outcome.loss)
    engine.bank.close()
    before, after = live.progress.before, live.progress.evaluation
    assert before is not None and after is not None and after.step == steps
    last = seen[-max(1, steps // 4) :]
    return before.loss, sum(last) / len(last), after.loss


def _examples(base: BaseModel, name: str) -> list[Example]:
    rows = read_rows(f"jobs/examples/{name}.jsonl")
    return build_examples(rows, base.tokenizer, max_seq_len=512, train_on="completion", overlong="drop").examples


def main(steps: int) -> None:
    """Measure and print."""
    found = {}
    print(f"SmolLM2-135M, {steps} steps of 8 tickets, r 16 all-linear\n")
    print(f"{'':<6} {'held out before':>16} {'training':>10} {'held out after':>15} {'against bf16':>13} {'s':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            began = time.perf_counter()
            found[precision] = losses(base_in(precision, Path(folder)), steps)
            before, training, after = found[precision]
            against = after / found["bf16"][2] - 1 if "bf16" in found else float("nan")
            seconds = time.perf_counter() - began
            print(f"{precision:<6} {before:>16.4f} {training:>10.4f} {after:>15.4f} {against:>13.2%} {seconds:>6.0f}")
    print("\n" + json.dumps({"bench": "precision", "steps": steps, "losses": found}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
