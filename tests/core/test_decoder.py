"""The written-out decoder against transformers' modules with the bank's hooks: the same losses and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from lora_core.config import LoraConfig, TrainConfig
from lora_core.data.packing import pack
from lora_core.kernels import cross_entropy
from lora_core.models.attention import DocumentAttention
from lora_core.models.llama import head as decoder_head
from lora_core.models.llama.decoder import Checkpointing, Decoder, DecoderInput
from lora_core.models.llama.forward import LlamaForward
from lora_core.models.precision import DenseWeight, Fp8Weight, Nf4Weight, stacked_dense
from lora_core.training.active_job import LiveJob
from lora_core.training.engine import TrainEngine
from lora_core.training.job import EngineJob
from lora_core.training.optimizer import StepOutcome
from tests.support.models import CPU, decode_with_triton, documents, job, next_chunks, tiny_base

CONFIGS = [
    LoraConfig(r=4),
    LoraConfig(r=16, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    LoraConfig(r=3, target_modules=["k_proj", "up_proj"], rank_pattern={"up_proj": 70}, alpha_pattern={"k_proj": 5}),
]
DROPOUTS = (0.3, 0.0, 0.6)
"""Of the three, where a test has dropout."""

NO_DROPOUT = (0.0, 0.0, 0.0)
KINDS = [(NO_DROPOUT, ()), (DROPOUTS, ()), (NO_DROPOUT, (0, 2)), (DROPOUTS, (1,))]
"""Their dropouts, and those that have DoRA."""

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")],
)


class World:
    """Three adapters with a B that is not zero, a batch of theirs, and both ways through the base."""

    def __init__(
        self,
        kind: str = "llama",
        dtype: torch.dtype = torch.float64,
        dropouts: Sequence[float] = NO_DROPOUT,
        dora: Sequence[int] = (),
        documents_each: int = 5,
    ) -> None:
        self.base = tiny_base(kind, dtype=dtype)
        self.engine = TrainEngine(self.base)
        for place, (lora, dropout) in enumerate(zip(CONFIGS, dropouts, strict=True)):
            lora = lora.model_copy(update={"lora_dropout": dropout, "use_dora": place in dora})
            job = EngineJob(str(place), lora, TrainConfig(batch_size=documents_each), documents(6, place))
            optimizer = self.engine.add(job).optimizer
            with torch.no_grad():
                drawn = torch.randn(optimizer.flat.shape, generator=torch.Generator().manual_seed(place))
                lengths = [m * (1 + 0.1 * torch.randn(m.shape)) for m in optimizer.adapter.magnitude.values()]
                optimizer.flat.copy_(drawn * 0.1)  # the same numbers in every dtype
                for m, length in zip(optimizer.adapter.magnitude.values(), lengths, strict=True):
                    m.copy_(length)
            optimizer._refresh(optimizer._trained)
        self.batch = pack(next_chunks(self.jobs), CPU)

    @property
    def jobs(self) -> list[LiveJob]:
        return list(self.engine.live.values())

    def taken_gradients(self) -> list[Tensor]:
        """Gradient of each job, then the loss sum and tokens; all is zero afterwards."""
        gradients = [live.optimizer._message.clone() for live in self.jobs]
        for live in self.jobs:
            live.optimizer._message.zero_()
        return gradients

    def by_hooks(self) -> list[Tensor]:
        self.engine.forward_backward(self.engine.ready(next_chunks(self.jobs)))
        return self.taken_gradients()

    def by_decoder(self, checkpointing: Checkpointing = "none", absent: Sequence[str] = ()) -> list[Tensor]:
        """`absent` jobs' rows go through the base alone."""
        forward = LlamaForward(Decoder(self.base.model), self.engine.forward.modules, "fp64")
        bound = [forward.bind(live.adapter) for live in self.jobs]
        adapters = [None if chunk.job in absent else bound[int(chunk.job)] for chunk in self.batch.chunks]
        keys = [self.engine.live[chunk.job].dropout_keys(chunk) for chunk in self.batch.chunks]
        losses = forward.forward_backward(forward.ready(self.batch, adapters, keys), checkpointing)
        for chunk, loss in zip(self.batch.chunks, losses, strict=True):
            self.engine.live[chunk.job].optimizer.add_loss(loss, chunk.labels.numel())
        return self.taken_gradients()


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.cpu() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(("dropouts", "dora"), KINDS)
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["llama", "mistral-dense", "qwen2", "qwen3"])
def test_gradients_are_those_of_the_hooks(
    kind: str, checkpointing: Checkpointing, dropouts: tuple[float, ...], dora: tuple[int, ...]
) -> None:
    world = World(kind, dropouts=dropouts, dora=dora)
    for ours, theirs in zip(world.by_decoder(checkpointing), world.by_hooks(), strict=True):
        assert relative(ours, theirs) < 1e-12


def test_what_is_left_to_the_hooks_says_why() -> None:
    window = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}
    for config in (MistralConfig(sliding_window=7), Qwen2Config(**window), Qwen3Config(**window)):
        assert Decoder.misfit(config) == "its attention has a sliding window"
        config.sliding_window = None
        assert Decoder.misfit(config) is None
    for option, value, reason in (
        ("attention_bias", True, "its linears have biases"),
        ("mlp_bias", True, "its linears have biases"),
        ("hidden_act", "gelu", "its activation is gelu"),
        ("hidden_size", 36, "its sizes, 36 and 11008, are no multiples of 8"),
        ("model_type", "gemma", "its family is gemma"),
    ):
        config = LlamaConfig(hidden_size=64)
        setattr(config, option, value)
        assert Decoder.misfit(config) == reason


def test_gradients_add_up_over_batches() -> None:
    world = World()
    once = world.by_hooks()
    for _ in range(2):
        world.engine.forward_backward(world.engine.ready(next_chunks(world.jobs)))
    doubled = world.taken_gradients()
    for single, double in zip(once, doubled, strict=True):
        assert relative(double, 2 * single) < 1e-12


def test_rows_of_no_adapter_go_through_the_base_alone() -> None:
    world = World()
    whole, without = world.by_decoder(), world.by_decoder(absent=["1"])
    assert not without[1][:-2].any()
    assert without[1][-2] != whole[1][-2]
    for place in (0, 2):
        assert relative(without[place], whole[place]) < 1e-12


def test_the_engine_drops_in_training_alone() -> None:
    """Steps and evaluations of jobs with and without dropout, by both ways through the base."""

    def losses(with_decoder: bool) -> list[float]:
        base = tiny_base("llama", dtype=torch.float64)
        base.decoder = Decoder(base.model) if with_decoder else None
        engine, found = TrainEngine(base), []
        for place, dropout in enumerate(DROPOUTS):
            held_out = documents(3, 9)
            engine.add(job(str(place), lora={"lora_dropout": dropout}, validation=held_out, seed=place, epochs=1))
        assert (engine.forward.name == "llama") == with_decoder
        while outcomes := engine.step():
            for name, outcome in sorted(outcomes.items()):
                evaluation = engine.live[name].progress.evaluation
                assert isinstance(outcome, StepOutcome) and evaluation is not None
                found += [outcome.loss, evaluation.loss]
        return found

    by_hooks, by_decoder = losses(with_decoder=False), losses(with_decoder=True)
    assert by_decoder == pytest.approx(by_hooks, rel=1e-9)


@pytest.mark.parametrize(("precision", "weight"), [("fp8", Fp8Weight), ("nf4", Nf4Weight)])
def test_a_job_with_dropout_trains_on_a_quantised_base(precision: str, weight: type[Fp8Weight | Nf4Weight]) -> None:
    base = tiny_base("llama", dtype=torch.bfloat16)
    base.precision, base.decoder = precision, Decoder(base.model, lambda parts: weight(torch.cat(list(parts))))
    engine = TrainEngine(base)
    live = engine.add(job(lora={"lora_dropout": 0.3}, epochs=12))
    assert engine.forward.name == "llama"
    losses = []
    while outcomes := engine.step():
        losses += [outcome.loss for outcome in outcomes.values() if isinstance(outcome, StepOutcome)]
    assert len(losses) == live.job.steps and sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_evaluation_is_the_loss_without_gradients() -> None:
    world = World()
    decoder = Decoder(world.base.model)
    kernel_args = [decoder.kernel_args(live.adapter) for live in world.jobs]
    segments, labels = [(int(chunk.job), chunk.padded_tokens) for chunk in world.batch.chunks], world.batch.labels
    attention = DocumentAttention(world.batch.lengths, [len(world.batch.ids[0])], decoder.scaling, CPU)
    batch = decoder.batch(DecoderInput(world.batch.ids[0], world.batch.positions[0], segments), kernel_args, attention)
    logits = decoder.hidden(batch) @ decoder.head.t()
    labels[0] = labels[0][0], logits[labels[0][0]].argmax(-1)  # some that are hit
    losses, correct = decoder.evaluate(batch, labels)
    assert not any(live.optimizer._grad.any() for live in world.jobs)
    assert torch.allclose(losses, decoder.forward_backward(batch, labels), rtol=1e-12)
    expected = [int((logits[at].argmax(-1) == wanted).sum()) for at, wanted in labels]
    assert correct.tolist() == expected and sum(expected) > 0


def test_the_head_goes_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    whole = world.by_decoder()
    vocabulary = world.base.model.config.vocab_size
    monkeypatch.setattr(decoder_head, "CPU_HEAD_ROWS", 7)
    monkeypatch.setattr(cross_entropy, "CACHED_ELEMENTS", 3 * vocabulary)
    for sliced, expected in zip(world.by_decoder(), whole, strict=True):
        assert relative(sliced, expected) < 1e-12


def test_a_hopeless_label_has_a_finite_loss() -> None:
    """Its probability is zero in fp32."""
    losses = cross_entropy.cross_entropy_(torch.tensor([[0.0, 300.0, 1.0]]), torch.tensor([0]))
    assert losses.item() == 300.0


def test_of_equal_logits_the_first_is_the_hit() -> None:
    """As a model writes it; in bf16 two are often equal."""
    head = torch.eye(4)[[0, 1, 2, 2]]  # tokens 2 and 3 always tie
    labels = [(torch.tensor([0]), torch.tensor([2])), (torch.tensor([0, 1]), torch.tensor([3, 0]))]
    _, correct, _ = decoder_head.head_losses(head, torch.eye(4)[[2, 0]], labels, with_gradient=False)
    assert correct.tolist() == [1.0, 1.0]


def test_stacked_weights_are_the_models_own() -> None:
    """On a GPU each group is one matrix, and the model's parameters are views of it: nothing is there twice."""
    world = World()
    before = world.by_decoder()
    decoder = Decoder(world.base.model, stacked_dense)
    weight = decoder.layers[0].weights[0]
    assert isinstance(weight, DenseWeight) and len(weight.parts) == 1
    layer = world.base.model.base_model.layers[0].self_attn
    assert layer.k_proj.weight.data_ptr() == weight.parts[0][layer.q_proj.out_features :].data_ptr()
    for ours, theirs in zip(world.by_decoder(), before, strict=True):
        assert relative(ours, theirs) < 1e-12
    assert relative(world.by_hooks()[0], before[0]) < 1e-12


@pytest.mark.skipif(torch.cuda.is_available(), reason="the next test has a GPU for it")
@pytest.mark.parametrize(
    ("kind", "dropouts", "dora", "checkpointing"),
    [
        ("llama", NO_DROPOUT, (0, 2), "full"),
        ("qwen2", DROPOUTS, (1,), "none"),
        ("qwen3", DROPOUTS, (1,), "selective"),
    ],
)
def test_triton_follows_torch_in_its_interpreter(
    kind: str,
    dropouts: tuple[float, ...],
    dora: tuple[int, ...],
    checkpointing: Checkpointing,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole pass in the kernels in fp32, against fp64 in torch: what one hands to the next."""
    pytest.importorskip("triton", reason="Triton has no build for this system")
    exact = World(kind, dropouts=dropouts, dora=dora, documents_each=2).by_decoder()
    world = World(kind, torch.float32, dropouts, dora, documents_each=2)
    assert world.batch.ids.numel() > 64, "several tiles"
    decode_with_triton(monkeypatch)
    for ours, theirs in zip(world.by_decoder(checkpointing), exact, strict=True):
        assert relative(ours, theirs) < 1e-4  # torch's own pass in fp32 is up to 8e-6 off


@pytest.mark.parametrize(("dropouts", "dora"), KINDS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("device", [GPU])
def test_triton_follows_torch(device: str, kind: str, dropouts: tuple[float, ...], dora: tuple[int, ...]) -> None:
    """The whole pass in the kernels in fp32, against fp64 on the CPU."""
    exact = World(kind, dropouts=dropouts, dora=dora).by_decoder()
    world = World(kind, dtype=torch.float32, dropouts=dropouts, dora=dora)
    world.base.model.to(device)  # type: ignore[arg-type]
    world.base.device = torch.device(device)
    for place, live in enumerate(world.jobs):
        moved = TrainEngine(world.base).add(live.job)
        with torch.no_grad():
            moved.optimizer.flat.copy_(live.optimizer.flat)
        moved.optimizer._refresh(moved.optimizer._trained)
        world.engine.live[str(place)] = moved
    world.batch = pack(next_chunks(world.jobs), world.base.device)
    for checkpointing in ("none", "selective", "full"):
        for ours, theirs in zip(world.by_decoder(checkpointing), exact, strict=True):  # type: ignore[arg-type]
            assert relative(ours, theirs) < 1e-4
