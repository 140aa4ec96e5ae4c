"""What must be exact in training: each test is a rule of DESIGN's list, and was seen to fail where the rule is
broken.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_core.config import TrainConfig
from lora_core.data.dataset import Example
from lora_core.lora import LinearWithLoRA, replace_linear_with_lora
from lora_core.models.probes import probe_losses
from lora_core.training import job as engine_job
from lora_core.training.active_job import LiveJob
from lora_core.training.engine import TrainEngine
from lora_core.training.optimizer import learning_rate
from tests.support.models import (
    RanksInThreads,
    chunks_of,
    documents,
    gradient,
    job,
    micro_batches,
    next_chunks,
    outcome_of,
    random_b,
    relative,
    tiny_base,
    tiny_model,
    train_until,
)
from tests.support.peft_reference import padded_loss, reference_training

# --- one formula, however it is cut ----------------------------------------------------------------------------------

DROPS = {"lora_dropout": 0.2}
DORA_HEAD = {"use_dora": True, "target_modules": ["lm_head", "q_proj", "down_proj"]}


@pytest.mark.parametrize(
    ("kind", "lora"),
    [("llama", DROPS), ("gpt2", DROPS), ("llama", DORA_HEAD), ("llama", {"target_modules": ["lm_head"]} | DROPS)],
)
def test_one_micro_batch_or_many_same_gradient(
    kind: str, lora: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the head too: a row's dropout is its own, wherever its chunk and its slice of logits begin."""
    wanted, base = job(batch_size=8, lora=lora), tiny_base(kind, dtype=torch.float64)
    whole = gradient(base, wanted, capacity=4096)
    monkeypatch.setattr("lora_core.models.hooks.loss.SLICE_ROWS", 7)
    for chunk_tokens, capacity in ((32, 64), (1, 4096)):
        monkeypatch.setattr(engine_job, "CHUNK_TOKENS", chunk_tokens)
        cut = gradient(base, wanted, capacity)
        assert relative(cut, whole) < 1e-12
        assert not torch.equal(cut, whole)  # it was another path
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 32)
    assert len(micro_batches([chunks_of(wanted)], 64)) >= 3


def test_ranks_send_one_gradient_a_step_and_nothing_of_the_base() -> None:
    """Beside it the figures of evaluations, three numbers each."""
    ranks, wanted = RanksInThreads("llama"), job(lora={"r": 1}, validation=documents(4, 1), eval_steps=2, epochs=2)

    def work(engine: TrainEngine) -> None:
        engine.add(wanted)
        while engine.step():
            pass

    engine, _ = ranks.run(work)
    optimizer = engine.live["job"].optimizer
    gradient = optimizer.flat.numel() + 2
    assert gradient < 1.1 * optimizer.parameters < 0.2 * engine.base.parameters
    steps, evaluations = wanted.steps, 1 + wanted.steps // 2
    assert sorted(ranks.sent) == [3] * evaluations + [gradient] * steps


def test_one_rank_or_two_same_gradient() -> None:
    wanted = job(batch_size=7, lora={"lora_dropout": 0.2})
    whole = gradient(tiny_base("llama", dtype=torch.float64), wanted, capacity=4096)
    sums: list[Tensor] = []

    def work(engine: TrainEngine) -> None:
        live = engine.add(wanted)
        random_b(live)
        for chunks in micro_batches([next_chunks([live], engine._rank, engine._ranks)], 4096):
            engine.forward_backward(engine.ready(chunks))
        assert engine._all_reduce is not None
        engine._all_reduce(live.optimizer._message)
        sums.append(live.optimizer._message.clone())

    RanksInThreads("llama", torch.float64).run(work)
    assert torch.equal(sums[0], sums[1])
    assert relative(sums[0], whole) < 1e-12


def _as_tutorial(model: torch.nn.Module, live: LiveJob) -> list[Tensor]:
    """`replace_linear_with_lora` with the weights of `live`; every A `[in, r]`, then every B
    `[r, out]`.
    """
    replace_linear_with_lora(model, live.job.lora.r, live.job.lora.lora_alpha / live.job.lora.r, list(live.adapter.a))
    all_a: list[Tensor] = []
    all_b: list[Tensor] = []
    for name in live.adapter.a:
        layer = model.get_submodule(name)
        assert isinstance(layer, LinearWithLoRA)
        layer.lora.A.data = live.adapter.a[name].detach().t().clone()
        layer.lora.B.data = live.adapter.b[name].detach().t().clone()
        all_a.append(layer.lora.A)
        all_b.append(layer.lora.B)
    return all_a + all_b


def _as_flat(parts: list[Tensor]) -> Tensor:
    """In the order of the flat vector, where A lies as `[r, in]` and B as `[r, out]`."""
    half = len(parts) // 2
    return torch.cat([part.t().flatten() for part in parts[:half]] + [part.flatten() for part in parts[half:]])


def test_every_cut_is_the_same_formula_after_200_steps_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one layer: one micro-batch by the hooks, alone; and many on two ranks by the decoder, beside others, packed or
    padded: 1e-9. In fp32 Adam makes 1e-3 of rounding.
    """
    lora = {"target_modules": ["q_proj", "up_proj"]}
    wanted = job(lora=lora, batch_size=3, learning_rate=2e-3, weight_decay=0.1, warmup_ratio=0.1, max_seq_len=2)
    double, one_layer = torch.float64, {"num_hidden_layers": 1}

    def train(engine: TrainEngine, neighbours: int = 0) -> Tensor:
        live = engine.add(wanted)
        for number in range(neighbours):
            engine.add(job(f"n{number}", examples=documents(6, seed=number), batch_size=2))
        train_until(engine, "job", 200)
        assert live.optimizer.flat.dtype == double
        return live.optimizer.flat.clone()

    whole = train(TrainEngine(tiny_base("llama", dtype=double, **one_layer)))
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 1)
    cut: list[Tensor] = []
    ranks = RanksInThreads("llama", double, capacity=40, with_decoder=True, config=one_layer)
    ranks.run(lambda engine: cut.append(train(engine, neighbours=2)))

    model = tiny_model("llama", attention="eager", dtype=double, **one_layer)
    live = TrainEngine(tiny_base("llama", dtype=double, **one_layer)).add(wanted)
    start = live.optimizer.flat.clone()
    weights = _as_tutorial(model, live)
    reference_training(model, weights, wanted, 200)
    plain = _as_flat([weight.detach() for weight in weights])

    assert relative(whole, start) > 0.1
    for other in (*cut, plain):
        assert relative(other, whole) < 1e-9


def test_loss_is_the_sum_over_the_step_by_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1, 25, 3 and 8 supervised tokens in micro-batches of their own: a mean of means would be far off."""
    lengths = [(4, 1), (30, 25), (9, 3), (12, 8)]
    examples = [
        Example(list(range(3, 3 + n)), [False] * (n - supervised) + [True] * supervised) for n, supervised in lengths
    ]
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 1)
    engine = TrainEngine(tiny_base("llama", dtype=torch.float64), capacity=1)
    engine.add(job(examples=examples, batch_size=4, max_seq_len=2))
    outcome = outcome_of(engine.step()["job"])
    expected = float(padded_loss(tiny_model("llama", attention="eager", dtype=torch.float64), examples))
    assert outcome.loss == pytest.approx(expected, rel=1e-12)
    assert outcome.tokens == 37


# --- the vector and its sums -----------------------------------------------------------------------------------------


def test_flat_vector_holds_all_a_then_all_b_each_from_a_multiple_of_8() -> None:
    """Widths of 50 and 75 leave gaps, which stay zero through training."""
    live = (engine := TrainEngine(tiny_base("llama-odd"))).add(job(lora={"r": 3}, weight_decay=0.1))
    engine.step()
    flat, end = live.optimizer.flat, 0
    for weight in (*live.adapter.a.values(), *live.adapter.b.values()):
        start = (weight.data_ptr() - flat.data_ptr()) // flat.element_size()
        assert start == -(-end // 8) * 8
        assert not flat[end:start].any()
        end = start + weight.numel()
    assert flat.numel() == -(-end // 8) * 8
    assert live.optimizer.parameters == int((flat != 0).sum())
    assert list(live.adapter.a) == list(live.adapter.b) == list(engine.forward.modules.linears)


def test_chunks_add_up_in_the_same_order_whatever_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five chunks of one job in one micro-batch, in two, or in one each: the same bits."""
    monkeypatch.setattr(engine_job, "CHUNK_TOKENS", 32)
    wanted = job(batch_size=10, lora={"r": 16})
    sums = [gradient(tiny_base("llama-odd"), wanted, capacity) for capacity in (4096, 80, 1)]
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


# --- schedules, epochs, progress -------------------------------------------------------------------------------------


def test_schedules_by_hand() -> None:
    def rates(scheduler: Any, warmup: float) -> list[float]:
        config = TrainConfig(learning_rate=1.0, lr_scheduler=scheduler, warmup_ratio=warmup)
        return [learning_rate(config, step, 8) for step in range(8)]

    assert rates("constant", 0.0) == [1.0] * 8
    assert rates("constant", 0.5) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates("linear", 0.0) == [1 - step / 8 for step in range(8)]
    assert rates("linear", 0.25) == pytest.approx([0.5, 1.0, *(1 - step / 6 for step in range(6))])
    assert rates("cosine", 0.0) == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])
    assert rates("linear", 1.0) == [(step + 1) / 8 for step in range(8)]


def test_epochs_visit_every_example_once_in_a_fresh_order() -> None:
    wanted = job(epochs=3, batch_size=4)
    assert (wanted.steps_per_epoch, wanted.steps) == (3, 9)
    epochs = [[index for step in range(3) for index in wanted.examples_of(epoch * 3 + step)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [len(wanted.examples_of(step)) for step in range(3)] == [4, 4, 2]
    shares = [[place for chunk in chunks_of(wanted, rank, 2) for place, _ in chunk.examples] for rank in (0, 1)]
    assert shares == [[0, 2], [1, 3]]


def test_progress_counts_and_done_jobs_rest() -> None:
    engine = TrainEngine(tiny_base("llama"))
    live = engine.add(job(epochs=2, batch_size=4))
    outcomes = []
    while not live.done:
        outcomes.append(outcome_of(engine.step()["job"]))
    examples = live.job.examples
    assert live.progress.step == 6
    assert live.progress.tokens == 2 * sum(len(example.ids) for example in examples)
    assert live.progress.supervised_tokens == 2 * sum(sum(example.labels_mask) for example in examples)
    assert (live.progress.first_loss, live.progress.loss) == (outcomes[0].loss, outcomes[-1].loss)
    assert engine.step() == {}


def test_gradient_norm_is_reported_before_clipping_and_clipped_once() -> None:
    def first_step(limit: float) -> tuple[float, Tensor]:
        engine = TrainEngine(tiny_base("llama", dtype=torch.float64))
        live = engine.add(job(max_grad_norm=limit))
        norm = outcome_of(engine.step()["job"]).grad_norm
        return norm, live.optimizer.moments[0] / (1 - 0.9)

    free_norm, free = first_step(1e9)
    norm, clipped = first_step(free_norm / 4)
    assert norm == free_norm == pytest.approx(float(free.norm()), rel=1e-12)
    assert relative(clipped, free / 4) < 1e-12


# --- precision -------------------------------------------------------------------------------------------------------


def test_bf16_base_keeps_fp32_masters_and_computes_with_fresh_copies() -> None:
    engine = TrainEngine(tiny_base("llama", dtype=torch.bfloat16))
    live = engine.add(job(learning_rate=1e-5, lora={"lora_dropout": 0.1}))

    def in_step() -> bool:
        return all(
            torch.equal(cast, master.detach().bfloat16())
            for name in live.adapter.a
            for cast, master in zip(
                live.adapter.weights(name, torch.bfloat16), (live.adapter.a[name], live.adapter.b[name]), strict=True
            )
        )

    start = live.optimizer.flat.clone()
    for _ in range(2):
        engine.step()
        assert in_step()
    moved = live.optimizer.flat != start
    assert live.optimizer.flat.dtype == torch.float32
    assert float(moved.float().mean()) > 0.99  # in bf16 A, half of the entries would not move at this rate
    resumed = TrainEngine(tiny_base("llama", dtype=torch.bfloat16)).add(live.job, live.snapshot().dump())
    live = resumed
    assert in_step()


@pytest.mark.parametrize(
    ("lora", "rate"), [({}, 5e-3), (DORA_HEAD | {"lora_alpha": 4}, 2e-3), ({"init_lora_weights": "pissa"}, 2e-3)]
)
def test_bf16_training_follows_fp32(lora: dict[str, Any], rate: float) -> None:
    def losses(dtype: torch.dtype) -> list[float]:
        engine = TrainEngine(tiny_base("llama", dtype=dtype))
        engine.add(job(lora=lora, epochs=10, learning_rate=rate))
        return [outcome_of(engine.step()["job"]).loss for _ in range(20)]

    exact, rounded = losses(torch.float32), losses(torch.bfloat16)
    assert rounded == pytest.approx(exact, rel=0.02)
    assert min(exact) < 0.99 * exact[0]


def test_probes_are_the_losses_that_training_saw() -> None:
    base = tiny_base("llama", dtype=torch.float64)
    engine = TrainEngine(base)
    live = engine.add(job(lora={"lora_dropout": 0.5}))
    engine.step()
    probes = probe_losses(engine.forward, live.bound, live.job.examples[:3])
    for probe, example in zip(probes, live.job.examples[:3], strict=True):
        engine_of_one = TrainEngine(tiny_base("llama", dtype=torch.float64))
        single = engine_of_one.add(job("one", examples=[example]))
        with torch.no_grad():
            single.optimizer.flat.copy_(live.optimizer.flat)
        outcome = outcome_of(engine_of_one.step()["one"])
        assert probe == pytest.approx(outcome.loss * outcome.tokens, rel=1e-12)
    assert probes != probe_losses(engine.forward, None, live.job.examples[:3])


def test_job_without_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="no examples"):
        TrainEngine(tiny_base("llama")).add(job(examples=[]))
