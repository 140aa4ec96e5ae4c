"""The CUDA paths, against the CPU in fp32: small, and skipped where there is no GPU."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lora_core.adapters.dropout import dropout_mask
from lora_core.config import LoraConfig, TrainConfig
from lora_core.data.dataset import Example
from lora_core.kernels.transfer import arrival
from lora_core.models.base import BaseModel, load_base
from lora_core.models.probes import probe_losses
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob, JobDiverged
from tests.support.models import outcome_of, random_adapter
from tests.support.tiny_models import save_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

EXAMPLES = [
    Example([(7 * i + 3 * t) % 250 for t in range(12 + i % 5)], [False] * 6 + [True] * (6 + i % 5)) for i in range(16)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")


def base_on(folder: Path, device: str, precision: str = "fp32") -> BaseModel:
    return load_base(
        str(folder),
        precision=precision,
        cache_dir=folder.parent / "cache",
        device=torch.device(device),  # type: ignore[arg-type]
    )


LORA = LoraConfig(r=4, lora_dropout=0.1)


def losses(base: BaseModel, *, lora: LoraConfig = LORA, names: tuple[str, ...] = ("one",)) -> dict[str, list[float]]:
    """Loss at every step of jobs trained together."""
    engine = TrainEngine(base)
    for seed, name in enumerate(names):
        engine.add(EngineJob(name, lora, TrainConfig(epochs=5, batch_size=4, seed=seed), EXAMPLES))
    history: dict[str, list[float]] = {name: [] for name in names}
    while not all(live.done for live in engine.live.values()):
        for name, outcome in engine.step().items():
            assert not isinstance(outcome, Exception)
            history[name].append(outcome.loss)
    engine.forward.close()
    return history


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_on_the_gpu_follows_the_cpu(folder: Path, dropout: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    lora = LoraConfig(r=4, lora_dropout=dropout)
    cpu, gpu = losses(base_on(folder, "cpu"), lora=lora), losses(base_on(folder, "cuda"), lora=lora)
    assert gpu["one"] == pytest.approx(cpu["one"], rel=1e-4)


def test_dora_and_an_adapted_head_on_the_gpu_follow_the_cpu(tmp_path: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = save_tiny_model("gemma2", tmp_path / "model" / "gemma2")
    lora = LoraConfig(r=4, use_dora=True, target_modules=["lm_head", "q_proj", "down_proj"])
    places = (("cpu",), ("cuda",), ("cuda", "bf16"))
    cpu, gpu, rounded = (losses(base_on(folder, *place), lora=lora) for place in places)
    assert gpu["one"] == pytest.approx(cpu["one"], rel=1e-4)
    assert rounded["one"] == pytest.approx(cpu["one"], rel=0.05)


def test_preferences_on_the_gpu_follow_the_cpu(folder: Path) -> None:
    """Learnt from the base, and from an adapter that lies there once more to score with, beside a supervised job."""
    torch.backends.cuda.matmul.allow_tf32 = False

    def figures(device: str, precision: str = "fp32") -> list[float]:
        engine = TrainEngine(base_on(folder, device, precision))
        train = TrainConfig(method="dpo", beta=0.5, epochs=5, batch_size=2, learning_rate=1e-3)
        start = random_adapter(engine.forward.modules, 5)
        engine.add(EngineJob("supervised", LORA, TrainConfig(epochs=5, batch_size=4), EXAMPLES))
        jobs = [EngineJob("base", LORA, train, EXAMPLES, EXAMPLES[:4])]
        jobs.append(EngineJob("start", LoraConfig(r=4), train, EXAMPLES, init_adapter=start))
        live = [engine.add(job) for job in jobs]
        while engine.step():
            pass
        engine.forward.close()
        outcomes = [one.progress.outcome for one in live if one.progress.outcome is not None]
        evaluation = live[0].progress.evaluation
        assert evaluation is not None and len(outcomes) == 2
        return [evaluation.loss, *(figure or 0.0 for outcome in outcomes for figure in (outcome.loss, outcome.margin))]

    cpu, gpu, rounded = figures("cpu"), figures("cuda"), figures("cuda", "bf16")
    assert min(cpu[1], cpu[3]) < 0.6 and gpu == pytest.approx(cpu, rel=1e-3, abs=1e-4)
    assert rounded == pytest.approx(cpu, rel=0.1, abs=0.05)


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_dora_on_a_quantised_base_divides_by_the_norms_of_what_is_left_of_it(folder: Path, precision: str) -> None:
    base = base_on(folder, "cuda", precision)
    engine = TrainEngine(base)
    train = TrainConfig(epochs=5, batch_size=4, learning_rate=1e-2)
    live = engine.add(EngineJob("one", LoraConfig(r=4, use_dora=True), train, EXAMPLES))
    seen = [outcome_of(engine.step()["one"]).loss for _ in range(10)]
    assert seen[-1] < 0.9 * seen[0]
    probe_losses(engine.forward, live.bound, EXAMPLES[:1])  # takes the norms of the weights as they are
    assert base.decoder is not None
    for group in base.decoder.groups:
        for name, weight in zip(group.names, base.decoder.weights_of(group), strict=True):
            a, b = live.adapter.folded(name)
            expected = (weight.float() + b @ a).norm(dim=1)
            torch.testing.assert_close(live.adapter.norm[name], expected, rtol=3e-3, atol=0)
            assert not torch.allclose(expected, weight.float().norm(dim=1), rtol=1e-2)


def compiled() -> int:
    """How many kernels of ours this process has compiled, or read from Triton's cache, so far."""
    jit = pytest.importorskip("triton.runtime.jit").JITFunction
    modules = [module for name, module in sys.modules.items() if name.startswith("lora_core.kernels.")]
    kernels = {one for module in modules for one in vars(module).values() if isinstance(one, jit)}
    return sum(len(of_device[0]) for kernel in kernels for of_device in kernel.device_caches.values())


def test_a_newcomer_of_a_new_kind_compiles_nothing_once_it_is_in(folder: Path) -> None:
    """Its kernels were compiled by the thread that prepared it, beside the steps of the others."""
    engine, train = TrainEngine(base_on(folder, "cuda", "bf16")), TrainConfig(epochs=3, batch_size=4)
    for name, lora in (("plain", LoraConfig(r=4)), ("drops", LoraConfig(r=8, lora_dropout=0.1))):
        engine.add(EngineJob(name, lora, train, EXAMPLES))
    engine.step()
    before = compiled()
    newcomer = EngineJob("new", LoraConfig(r=40, use_dora=True), train, EXAMPLES, EXAMPLES[:4])
    with ThreadPoolExecutor(1) as reader:
        prepared = reader.submit(engine.prepare, newcomer)
        while not prepared.done():
            engine.micro_batch()
    assert compiled() > before
    engine.admit(prepared.result())
    before = compiled()
    while engine.step():
        pass
    assert engine.live["new"].done and compiled() == before


def test_a_neighbour_changes_a_gpu_run_by_rounding_only(folder: Path) -> None:
    base = base_on(folder, "cuda")
    assert losses(base, names=("one", "two"))["one"] == pytest.approx(losses(base)["one"], rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-4), ("bf16", 5e-3)])
def test_a_job_gone_bad_is_stopped_and_the_others_are_as_if_it_never_was(
    folder: Path, precision: str, rounding: float, dropout: float
) -> None:
    """In the decoder's kernels and through the hooks: after five steps all weights of one of three jobs are NaN, and it
    is left in. Sums over tokens may be taken in another order, and no more.
    """

    def train(names: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], list[int]]:
        engine = TrainEngine(base_on(folder, "cuda", precision))
        for seed, name in enumerate(names):
            lora = LoraConfig(r=8 << seed, lora_dropout=dropout)
            engine.add(EngineJob(name, lora, TrainConfig(epochs=5, batch_size=4, seed=seed), EXAMPLES))
        failures = []
        while not all(live.done for name, live in engine.live.items() if name != "bad"):
            bad = engine.live.get("bad")
            if bad is not None and bad.progress.step == 5:
                bad.optimizer.flat.fill_(torch.nan)
                bad.optimizer._refresh(bad.optimizer._trained)
            for name, outcome in engine.micro_batch().items():
                if isinstance(outcome, JobDiverged):
                    assert name == "bad"
                    failures.append(outcome.step)
        engine.forward.close()
        return {name: live.optimizer.flat for name, live in engine.live.items() if name != "bad"}, failures

    beside, failures = train(("one", "two", "bad"))
    alone, none = train(("one", "two"))
    assert (set(failures), none) == ({6}, [])
    for name, weights in beside.items():
        error = float((weights - alone[name]).norm() / alone[name].norm())
        assert error < rounding, name


def test_bf16_learns_what_fp32_learns(folder: Path) -> None:
    exact, rounded = losses(base_on(folder, "cuda")), losses(base_on(folder, "cuda", "bf16"))
    assert rounded["one"] == pytest.approx(exact["one"], rel=0.05)


def test_dropout_drops_the_same_on_both(folder: Path) -> None:
    keys = torch.arange(33) * 7919
    assert torch.equal(dropout_mask(48, 0.3, keys, 42), dropout_mask(48, 0.3, keys.cuda(), 42).cpu())


def test_what_comes_to_the_host_beside_the_next_step_is_of_before_it(folder: Path) -> None:
    engine = TrainEngine(base_on(folder, "cuda", "bf16"))
    live = engine.add(EngineJob("one", LORA, TrainConfig(epochs=5, batch_size=4), EXAMPLES))
    for _ in range(3):
        engine.step()
        before = live.optimizer.flat.clone(), live.optimizer.moments[1].clone()
        snapshot, adapter = live.snapshot(), live.optimizer.on_host()
        arrived = arrival(live.optimizer.flat.device)
        engine.step()
        snapshot.arrived()
        arrived()
        assert torch.equal(snapshot.tensors["flat"], before[0].cpu())
        assert torch.equal(snapshot.tensors["exp_avg_sq"], before[1].cpu())
        first = next(iter(adapter.a.values()))
        assert not first.is_cuda and torch.equal(first.flatten(), before[0][: first.numel()].cpu())
        assert not torch.equal(live.optimizer.flat, before[0])


def test_a_checkpoint_crosses_devices(folder: Path) -> None:
    """Written on a GPU, continued on a CPU: the same run but for rounding."""
    job = EngineJob("one", LoraConfig(r=4), TrainConfig(epochs=5, batch_size=4), EXAMPLES)
    on_gpu, on_cpu = TrainEngine(base_on(folder, "cuda")), TrainEngine(base_on(folder, "cpu"))
    live = on_gpu.add(job)
    for _ in range(7):
        on_gpu.step()
    moved = on_cpu.add(job, live.snapshot().dump())
    for _ in range(3):
        on_gpu.step()
        on_cpu.step()
    assert moved.progress.step == live.progress.step == 10
    assert moved.progress.loss == pytest.approx(live.progress.loss, rel=1e-4)
