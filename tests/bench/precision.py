"""What a base's precision costs in loss: `python -m tests.bench.precision --help`.

SmolLM2-135M, as it is, reads all tokens of the example files (`jobs/examples/`): in that there is no chance. Then it
learns the tickets of `triage.jsonl`, r 16 on all linears, on a base in each precision, and the held-out tickets are
evaluated. All have the same starts and orders of rows, one for each seed: after so few steps chance alone moves a run
by some percent. On a CPU the fp8 products are those of the GPU's matrix units, rounding for rounding of their operands,
summed in fp32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from lora_core.config import LoraConfig, TrainConfig
from lora_core.data.dataset import Example, build_examples, read_rows
from lora_core.data.encoding import TrainOn
from lora_core.models.base import BaseModel, load_base, placed
from lora_core.models.forward import open_forward
from lora_core.models.probes import probe_losses
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob
from tests.support.tiny_models import smollm2_gguf

PRECISIONS = ("fp32", "bf16", "fp8", "nf4")
FILES = ("triage", "triage_heldout", "tone")
CPU = torch.device("cpu")


def base_in(precision: str, cache: Path) -> BaseModel:
    """The base; fp8 too, which `load_base` refuses on a CPU because it is slow there."""
    dense = load_base(smollm2_gguf(), precision="fp32" if precision == "fp32" else "bf16", cache_dir=cache, device=CPU)
    return placed(replace(dense, precision=precision, decoder=None), CPU) if precision in ("fp8", "nf4") else dense


def text_loss(base: BaseModel) -> float:
    """Mean loss of every token of the example files under the base alone."""
    forward = open_forward(base)
    examples = [example for name in FILES for example in _examples(base, name, "all")]
    total = sum(sum(probe_losses(forward, None, [example])) for example in examples)
    forward.close()
    return total / sum(sum(example.labels_mask) for example in examples)


def losses(base: BaseModel, steps: int, seed: int) -> tuple[float, float, float]:
    """Held-out loss before training, training loss of the last quarter of the steps, held-out loss after them."""
    rows, held_out = (_examples(base, name) for name in ("triage", "triage_heldout"))
    train = TrainConfig(
        batch_size=8, epochs=100, learning_rate=1e-3, lr_scheduler="constant", eval_steps=steps, seed=seed
    )
    engine = TrainEngine(base)
    live = engine.add(EngineJob("job", LoraConfig(), train, rows, held_out))
    seen: list[float] = []
    while live.progress.step < steps:
        for outcome in engine.step().values():
            assert not isinstance(outcome, Exception)
            seen.append(outcome.loss)
    engine.forward.close()
    before, after = live.progress.before, live.progress.evaluation
    assert before is not None and after is not None and after.step == steps
    return before.loss, statistics.mean(seen[-max(1, steps // 4) :]), after.loss


def _examples(base: BaseModel, name: str, train_on: TrainOn = "completion") -> list[Example]:
    rows = read_rows(f"jobs/examples/{name}.jsonl")
    return build_examples(rows, base.tokenizer, max_seq_len=512, train_on=train_on, overlong="drop").examples


def main(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    of_text: dict[str, float] = {}
    print(f"SmolLM2-135M, {arguments.steps} steps of 8 tickets, r 16 all-linear, mean of {arguments.seeds} seeds\n")
    print(
        f"{'':<6} {'text':>8} {'against bf16':>13} {'held out before':>16} {'training':>10} {'held out after':>15}"
        f" {'against bf16':>20} {'s':>6}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for precision in arguments.only:
            began, base = time.perf_counter(), base_in(precision, Path(folder))
            of_text[precision] = text = text_loss(base)
            of_bf16 = f"{text / of_text['bf16'] - 1:+.2%}" if "bf16" in of_text else "-"
            found[precision] = [losses(base, arguments.steps, seed) for seed in range(arguments.seeds)]
            before, training, after = (statistics.mean(column) for column in zip(*found[precision], strict=True))
            against = _against(found[precision], found.get("bf16", []))
            seconds = time.perf_counter() - began
            print(
                f"{precision:<6} {text:>8.4f} {of_bf16:>13} {before:>16.4f} {training:>10.4f} {after:>15.4f}"
                f" {against:>20} {seconds:>6.0f}",
                flush=True,
            )
    print("\n" + json.dumps({"bench": "precision", "steps": arguments.steps, "text": of_text, "losses": found}))


def _against(ours: list[tuple[float, float, float]], bf16: list[tuple[float, float, float]]) -> str:
    """How much larger the held-out loss after training is than that of the same seed in bf16: mean and its standard
    error.
    """
    ratios = [one[2] / other[2] - 1 for one, other in zip(ours, bf16, strict=False)]
    if not ratios:
        return "-"
    error = f" +- {statistics.stdev(ratios) / len(ratios) ** 0.5:.2%}" if len(ratios) > 1 else ""
    return f"{statistics.mean(ratios):.2%}{error}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.precision")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PRECISIONS), metavar="bf16,fp8")
    main(parser.parse_args())
