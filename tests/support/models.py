"""Tiny random bases of every family, documents to train on, and small jobs: no files, no downloads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ContextDecorator, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.init import init_adapter
from lora_core.adapters.targets import AdaptableModules
from lora_core.config import LoraConfig, TrainConfig
from lora_core.data.dataset import Example
from lora_core.data.packing import Chunk
from lora_core.kernels import dispatch
from lora_core.models.attention import ATTENTION_NAME, PackedAttention
from lora_core.models.base import BaseModel, placed
from lora_core.models.hooks.bank import AdapterBank, Segment
from lora_core.models.llama.adapters import KernelArgs
from lora_core.models.llama.decoder import Checkpointing, Decoder, DecoderBatch, DecoderInput
from lora_core.training.active_job import LiveJob
from lora_core.training.engine import TrainEngine
from lora_core.training.fair_queue import FairQueue
from lora_core.training.job import EngineJob, JobDiverged
from lora_core.training.optimizer import StepOutcome

VOCABULARY = 96
CPU = torch.device("cpu")

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ODD = {"hidden_size": 50, "intermediate_size": 75, "num_attention_heads": 5, "num_key_value_heads": 5}
"""Widths that are no multiple of a vector register: rounding then depends on alignment and on the number of rows."""

_GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**_LLAMA),
    "llama-even": transformers.LlamaConfig(**_LLAMA | {"intermediate_size": 176}),  # multiples of 8, as fp8 wants
    "llama-odd": transformers.LlamaConfig(**_LLAMA | _ODD),
    "mistral": transformers.MistralConfig(**_LLAMA, sliding_window=7),
    "mistral-dense": transformers.MistralConfig(**_LLAMA, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**_LLAMA),
    "qwen3": transformers.Qwen3Config(**_LLAMA, head_dim=24),
    "gemma": transformers.GemmaConfig(**_LLAMA, head_dim=16),
    "gemma2": transformers.Gemma2Config(
        **_LLAMA, head_dim=16, sliding_window=7, attn_logit_softcapping=3.0, final_logit_softcapping=5.0
    ),
    "gemma2-untied": transformers.Gemma2Config(
        **_LLAMA, head_dim=16, sliding_window=7, final_logit_softcapping=5.0, tie_word_embeddings=False
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **_LLAMA, head_dim=16, sliding_window=7, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": transformers.GPT2Config(**_GPT2, bos_token_id=1, eos_token_id=2),
}

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt2"]
"""A kind of each whose layers are others."""


def tiny_model(
    kind: str, seed: int = 0, attention: str = ATTENTION_NAME, dtype: torch.dtype = torch.float32, **config: Any
) -> PreTrainedModel:
    """Random weights, biases and norms of heads, large enough that attention, windows and caps show in the logits;
    frozen, in eval mode. In fp64 all of it is. `config` are options that differ from the kind's.
    """
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        type(CONFIGS[kind])(**CONFIGS[kind].to_dict() | config), attn_implementation=attention
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.3)
            elif name.endswith((".q_norm.weight", ".k_norm.weight")):
                parameter += torch.randn_like(parameter) * 0.3
    model.eval().requires_grad_(False)
    return in_double(model) if dtype == torch.float64 else model.to(dtype)  # type: ignore[arg-type]


def tiny_base(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> BaseModel:
    """`tiny_model` as the engine takes it."""
    model = tiny_model(kind, seed, dtype=dtype, **config)
    tokenizer = PreTrainedTokenizerBase()
    return BaseModel(model, tokenizer, f"tiny-{kind}", "0" * 64, "bf16" if dtype == torch.bfloat16 else "fp32", CPU)


def decoder_base(kind: str, dtype: torch.dtype = torch.float64, **config: Any) -> BaseModel:
    """`tiny_base` with the written-out decoder, which a base in these precisions has on a GPU alone."""
    base = tiny_base(kind, dtype=dtype, **config)
    return replace(base, decoder=Decoder(base.model))


def quantised_base(precision: str, dtype: torch.dtype = torch.float64) -> BaseModel:
    """The decoder with weights of a precision; the rest is in `dtype`."""
    return placed(replace(tiny_base("llama-even", dtype=dtype), precision=precision), CPU)


class InDouble(TorchFunctionMode, ContextDecorator):
    """Whoever asks for fp32 here gets fp64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            return args[0].double()
        args = [torch.float64 if argument is torch.float32 else argument for argument in args]
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return function(*args, **kwargs)


def in_double(model: PreTrainedModel) -> PreTrainedModel:
    """The model in fp64, in which two formulas show whether they are one, on any processor: transformers takes norms
    and the softmax of its own attention in fp32 whatever it gets, which would hide it.
    """
    rounded = ("RMSNorm", "Attention") if model.config._attn_implementation == "eager" else "RMSNorm"
    for module in model.modules():
        if type(module).__name__.endswith(rounded):
            module.forward = InDouble()(module.forward)
    return model.double()


def documents(count: int, seed: int, shortest: int = 4, longest: int = 30) -> list[Example]:
    """Random documents, each supervised from a random token on, so that counts of supervised tokens are uneven."""
    stream = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=stream))

    examples = []
    for _ in range(count):
        length = draw(shortest, longest)
        prompt = draw(1, length - 1)
        ids = torch.randint(3, VOCABULARY, (length,), generator=stream).tolist()
        examples.append(Example(ids, [False] * prompt + [True] * (length - prompt)))
    return examples


def micro_batches(chunks_of_jobs: Sequence[Sequence[Chunk]], capacity: int) -> list[list[Chunk]]:
    """All chunks of some jobs, as a rank would train on them."""
    queue = FairQueue()
    for chunks in chunks_of_jobs:
        for job in {chunk.job for chunk in chunks}:
            queue.put(job, chunks, training=True)
    return list(iter(lambda: queue.take(capacity)[0], []))


def job(
    name: str = "job",
    *,
    examples: Sequence[Example] | None = None,
    validation: Sequence[Example] = (),
    lora: dict[str, Any] | None = None,
    **train: Any,
) -> EngineJob:
    """A small job; `train` are TrainConfig's fields."""
    defaults = {"epochs": 100, "batch_size": 4, "learning_rate": 5e-3, "max_seq_len": 32, "warmup_ratio": 0.0}
    return EngineJob(
        name,
        LoraConfig(**{"r": 4, "lora_alpha": 8} | (lora or {})),
        TrainConfig(**defaults | train),
        documents(10, seed=0) if examples is None else examples,
        validation,
    )


def chunks_of(wanted: EngineJob, rank: int = 0, ranks: int = 1) -> list[Chunk]:
    """A rank's share of the first step."""
    return next_chunks([TrainEngine(tiny_base("llama")).add(wanted)], rank, ranks)


def next_chunks(lives: Iterable[LiveJob], rank: int = 0, ranks: int = 1) -> list[Chunk]:
    """A rank's share of what comes next for each."""
    at = [(live, next_step) for live in lives if (next_step := live.next_step) is not None]
    return [chunk for live, next_step in at for chunk in live.chunks(next_step, rank, ranks)]


def state(live: LiveJob) -> Tensor:
    """A, B and both moments of a job in one vector."""
    return torch.cat([live.optimizer.flat, *live.optimizer.moments])


def random_b(live: LiveJob, seed: int = 7) -> None:
    """Give B numbers, without which A has no gradient."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for b in live.adapter.b.values():
            b.copy_(torch.randn(b.shape, generator=stream) * 0.1)


def gradient(base: BaseModel, wanted: EngineJob, capacity: int) -> Tensor:
    """The step's summed gradient, loss and token count from one given state."""
    engine = TrainEngine(base, capacity=capacity)
    live = engine.add(wanted)
    random_b(live)
    for chunks in micro_batches([next_chunks([live])], capacity):
        engine.forward_backward(engine.ready(chunks))
    return live.optimizer._message.clone()


def train_until(engine: TrainEngine, name: str, step: int) -> list[StepOutcome]:
    """The job's outcomes until it has done `step` steps; neighbours do as many as they do."""
    outcomes: list[StepOutcome] = []
    while engine.live[name].progress.step < step:
        result = engine.step().get(name)
        if result is not None:
            outcomes.append(outcome_of(result))
    return outcomes


def train_to_the_end(engine: TrainEngine, name: str) -> list[StepOutcome]:
    """The job's outcomes until it is done."""
    outcomes: list[StepOutcome] = []
    while not engine.live[name].done:
        result = engine.micro_batch().get(name)
        if result is not None:
            outcomes.append(outcome_of(result))
    return outcomes


def outcome_of(result: StepOutcome | JobDiverged) -> StepOutcome:
    assert isinstance(result, StepOutcome), result
    return result


@dataclass
class RanksInThreads:
    """Two data-parallel ranks as threads, each on its own copy of the base; `all_reduce` adds in rank order. `sent` is
    how many numbers rank 0 gave it each time.
    """

    kind: str
    dtype: torch.dtype = torch.float32
    capacity: int = 2048
    checkpointing: Checkpointing = "none"
    with_decoder: bool = False
    ranks: int = 2
    config: dict[str, Any] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)
    _parts: list[Tensor | None] = field(default_factory=lambda: [None, None])
    _barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=60))

    def run(self, work: Callable[[TrainEngine], None]) -> list[TrainEngine]:
        engines = [
            TrainEngine(
                (decoder_base if self.with_decoder else tiny_base)(self.kind, dtype=self.dtype, **self.config),
                capacity=self.capacity,
                checkpointing=self.checkpointing,
                rank=rank,
                ranks=self.ranks,
                all_reduce=self._all_reduce(rank),
            )
            for rank in range(self.ranks)
        ]
        errors: list[BaseException] = []

        def rank_main(engine: TrainEngine) -> None:
            try:
                work(engine)
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        workers = [threading.Thread(target=rank_main, args=(engine,)) for engine in engines]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]
        return engines

    def _all_reduce(self, rank: int) -> Callable[[Tensor], None]:
        def reduce(tensor: Tensor) -> None:
            if rank == 0:
                self.sent.append(tensor.numel())
            self._parts[rank] = tensor.clone()
            self._barrier.wait()
            parts = [part for part in self._parts if part is not None]
            tensor.copy_(torch.stack(parts).sum(0))
            self._barrier.wait()

        return reduce


@torch.no_grad()
def logits_of(base: BaseModel, ids: Tensor, bank: AdapterBank | None = None, adapter: Adapter | None = None) -> Tensor:
    """Of one document `[1, tokens]`, through an adapter if there is one."""
    tokens = ids.shape[1]
    with nullcontext() if bank is None else bank.routed([Segment(adapter, tokens)]):
        return base.head(base.hidden(ids, torch.arange(tokens)[None], PackedAttention([tokens])))


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's threads inside an operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_adapter(
    adaptable: AdaptableModules,
    seed: int,
    r: int = 4,
    size: float = 0.3,
    targets: str | list[str] = "all-linear",
    dropout: float = 0.0,
    dora: bool = False,
    trained: bool = False,
) -> Adapter:
    """An adapter with a B that is not zero, strong enough to change answers; with DoRA m is not the norm either."""
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, lora_dropout=dropout, use_dora=dora)
    fresh = init_adapter(adaptable, config, seed)
    stream = torch.Generator().manual_seed(seed)
    b = {name: torch.randn(b.shape, generator=stream) * size for name, b in fresh.b.items()}
    magnitude = {name: m + torch.rand(m.shape, generator=stream) * size for name, m in fresh.magnitude.items()}
    adapter = replace(fresh, b=b, magnitude=magnitude)
    for weight in adapter.trained:
        weight.requires_grad_(trained)
    return adapter


def adapter_in_double(adapter: Adapter) -> Adapter:
    a, b, m = (
        {name: weight.double() for name, weight in weights.items()}
        for weights in (adapter.a, adapter.b, adapter.magnitude)
    )
    residual = None if adapter.residual is None else adapter_in_double(adapter.residual)
    return replace(adapter, a=a, b=b, magnitude=m, residual=residual)


def decode_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, on tables of addresses as kernels read them there."""
    from lora_core.kernels.low_rank_triton import table_row

    def start(
        batch: DecoderBatch, decoder: Decoder, inputs: DecoderInput, adapters: Sequence[KernelArgs], *more: Any
    ) -> None:
        _start(batch, decoder, inputs, adapters, *more)
        numbers = [
            [number for at, group in zip(adapted, decoder.groups, strict=True) for number in table_row(at, group)]
            for adapted in (*(adapter.groups for adapter in adapters), [None] * len(decoder.groups))
        ]
        batch._table = torch.tensor(numbers, dtype=torch.int64)

    _start = DecoderBatch.__init__
    monkeypatch.setattr(DecoderBatch, "__init__", start)
    monkeypatch.setattr(dispatch, "runs_in_triton", lambda x: True)
