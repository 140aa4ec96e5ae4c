"""DoRA in the written-out decoder over many steps: its norms are those of the weights as they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lora_core.models.base import BaseModel
from lora_core.training.engine import TrainEngine
from tests.support.models import decode_with_triton, decoder_base, documents, job, relative, tiny_base

SOME = {"use_dora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]}


IN_TRITON = pytest.param(
    True, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="tests/core/test_decoder.py has the GPU's DoRA")
)


@pytest.mark.parametrize("in_triton", [False, IN_TRITON])
def test_many_steps_in_the_decoder_are_those_of_the_hooks(in_triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms follow every step, an evaluation before the first, a step that failed, and the return to the best."""
    # In Triton's interpreter rows take seconds.
    dtype, steps, rows, held_out = (torch.float32, 2, 2, 1) if in_triton else (torch.float64, 8, 8, 4)
    if in_triton:
        pytest.importorskip("triton", reason="Triton has no build for this system")

    def train(base: BaseModel) -> dict[str, Tensor]:
        engine = TrainEngine(base)
        best = {"validation": documents(held_out, 9), "eval_steps": 2, "load_best_model_at_end": True}
        jobs = [
            job("best", examples=documents(rows, 1), lora=SOME, epochs=steps, batch_size=rows, **best),
            job("failed", examples=documents(rows, 2), lora={"use_dora": True, "r": 3}, batch_size=rows),
            job("plain", examples=documents(rows, 3), batch_size=rows),
        ]
        live = [engine.add(wanted) for wanted in (jobs[:2] if in_triton else jobs)]
        poisoned = False
        while not live[0].done:
            if live[0].progress.step == 1 and not poisoned:
                live[1].optimizer._grad[3], poisoned = math.nan, True
            engine.micro_batch()
        found = {one.job.name: one.optimizer.flat.detach().clone() for one in live}
        evaluations = [live[0].progress.before, live[0].progress.evaluation]
        return found | {"losses": torch.tensor([one.loss for one in evaluations if one is not None])}

    by_hooks = train(tiny_base("llama", dtype=dtype))
    if in_triton:
        decode_with_triton(monkeypatch)
    by_decoder = train(decoder_base("llama", dtype=dtype))
    for name, numbers in by_hooks.items():
        assert relative(by_decoder[name], numbers) < (1e-4 if in_triton else 1e-11), name


def test_the_decoder_measures_norms_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the jobs alone that have stepped."""
    base = decoder_base("llama")
    assert base.decoder is not None
    engine = TrainEngine(base, capacity=64)
    quick = engine.add(job("quick", examples=documents(8, 1), lora={"use_dora": True}, batch_size=2))
    slow = engine.add(job("slow", examples=documents(8, 2), lora=SOME, batch_size=8))
    taken: list[int] = []
    of = base.decoder.row_norms.of

    def counted(module: str, a: Tensor, b: Tensor) -> Tensor:
        taken.append(a.data_ptr())
        return of(module, a, b)

    monkeypatch.setattr(base.decoder.row_norms, "of", counted)
    while slow.progress.step < 2:
        engine.micro_batch()
    assert quick.progress.step > slow.progress.step
    for live in (quick, slow):
        count = sum(taken.count(weight.data_ptr()) for weight in live.adapter.a.values())
        times, left = divmod(count, len(live.adapter.a))
        assert left == 0 and times in (live.progress.step, live.progress.step + 1)  # of the next step, too, or not yet
