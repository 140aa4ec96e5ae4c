"""Steps of one token each over pages: their kernels in Triton's interpreter against the decoder on slots; and on a GPU
the whole generator, with graphs and prompts in chunks, against the same weights on the CPU.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lora_core.adapters.init import init_adapter
from lora_core.config import LoraConfig
from lora_core.inference import engine
from lora_core.inference.engine import Generator
from lora_core.inference.generation import GenerationRequest
from lora_core.inference.kv_cache import SlotKVCache, _layer_shapes
from lora_core.inference.paged_kv_cache import PagedKVCache
from lora_core.inference.sampling import Sampler
from lora_core.inference.sampling_params import SamplingParams
from lora_core.inference.scheduler import Run
from lora_core.inference.warmup import warm_up
from lora_core.models.attention import Attend
from lora_core.models.base import BaseModel, placed
from lora_core.models.forward import open_forward
from lora_core.models.llama.adapters import AdapterLayout, KernelArgs, on_device, staged
from lora_core.models.llama.decode import DecodeGraphs
from lora_core.models.llama.decoder import Decoder
from lora_core.models.llama.forward import LlamaForward
from lora_core.models.paged_kv import PAGE_TOKENS, PagedAttention, PagedKV, Stretch
from lora_core.models.precision import Fp8Weight, Nf4Weight
from lora_core.models.step import Step
from tests.support.models import VOCABULARY, decoder_base, random_adapter, tiny_model

CONTEXT = 64
QUANTISED_WEIGHTS = {"fp8": Fp8Weight, "nf4": Nf4Weight}
LENGTHS = [5, 40, 17, 1]


def kv_of(forward: LlamaForward, pages: int = 16, slots: int = 6) -> PagedKV:
    decoder = forward.decoder
    return PagedKV(
        layers=len(decoder.layers), heads=decoder.heads, kv_heads=decoder.kv_heads, head_size=decoder.head_size,
        pages=pages, slots=slots, context=CONTEXT, dtype=decoder.embedding.dtype, device=forward.device,
    )  # fmt: skip


def prompt_of(seed: int, length: int) -> list[int]:
    return [(31 * seed + 7 * place + place * place) % VOCABULARY for place in range(length)]


def step_of(
    cache: SlotKVCache, forward: LlamaForward, adapters: Sequence[KernelArgs | None], starts: Sequence[int],
    ids: Sequence[Sequence[int]],
) -> Tensor:  # fmt: skip
    """Logits of the last token of each."""
    runs = [Run(slot, slot, start, len(of), True) for slot, (start, of) in enumerate(zip(starts, ids, strict=True))]
    return forward.step(step_with(cache.step(runs, ids), adapters, starts, ids))


def step_with(
    attend: Attend, adapters: Sequence[KernelArgs | None], starts: Sequence[int], ids: Sequence[Sequence[int]]
) -> Step:
    joined = torch.tensor([token for of in ids for token in of])
    positions = torch.cat([torch.arange(start, start + len(of)) for start, of in zip(starts, ids, strict=True)])
    ends = torch.tensor([len(of) for of in ids]).cumsum(0).tolist()
    runs = [(adapter, len(of)) for adapter, of in zip(adapters, ids, strict=True)]
    return Step(joined, positions, runs, attend, [end - 1 for end in ends])


@torch.inference_mode()
@pytest.mark.skipif(torch.cuda.is_available(), reason="the next test has a GPU for it")
@pytest.mark.parametrize(
    ("kind", "dora", "precision"),
    [("llama", False, "fp32"), ("qwen2", True, "fp32"), ("qwen3", False, "fp32"), ("llama", False, "fp8")],
)
def test_the_kernels_of_a_step_follow_the_decoder(
    kind: str, dora: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of two ranks and none, of which two rows share one; the longest sequence read by one program and two."""
    pytest.importorskip("triton", reason="Triton has no build for this system")
    from lora_core.kernels import decode_triton
    from lora_core.kernels.low_rank_triton import table_row

    forward = open_forward(decoder_base(kind, torch.float32))
    assert isinstance(forward, LlamaForward)
    if precision == "fp8":
        quantise(forward.decoder, Fp8Weight)
    small, large = (
        forward.load(random_adapter(forward.modules, seed, r=r, targets=targets, dora=dora))
        for seed, r, targets in ((0, 4, ["q_proj", "up_proj", "down_proj"]), (1, 20, "all-linear"))
    )
    for adapter in (small, large):
        pairs = zip(adapter.groups, forward.decoder.groups, strict=True)
        adapter.table = torch.tensor([number for of, group in pairs for number in table_row(of, group)])
    monkeypatch.setattr(decode_triton, "PART_FEATURES", 32)  # several parts
    monkeypatch.setitem(decode_triton.SHRINK, "STEP", 16)
    for config in (decode_triton.ADD_OF_FEW, decode_triton.SWIGLU, decode_triton.SWIGLU_TILES):
        monkeypatch.setitem(config, "COLUMNS", 32)
    steps = [
        ([small, None, large, large], [1] * 4, 1), ([large] * 4, [1] * 4, 2), ([None] * 4, [1] * 4, 1),
        ([small, None, large, large], [1, 19, 1, 5], 1),
    ]  # fmt: skip
    for adapters, tokens, splits in steps[: 1 if precision == "fp8" else None]:
        ids = [prompt_of(slot, length + of) for slot, (length, of) in enumerate(zip(LENGTHS, tokens, strict=True))]
        cache = SlotKVCache(forward, _layer_shapes(forward), slots=4, context=CONTEXT)
        for slot in range(4):
            cache.take(ids[slot], None, CONTEXT)
        step_of(cache, forward, adapters, [0] * 4, [of[:length] for of, length in zip(ids, LENGTHS, strict=True)])
        kv = in_pages(forward, cache)
        monkeypatch.setattr(DecodeGraphs, "_run", without_graph(splits))
        graphs = DecodeGraphs(forward.decoder, forward._head_weight, kv)
        new = [of[length:] for of, length in zip(ids, LENGTHS, strict=True)]
        attend = PagedAttention(kv, [Stretch(slot + 1, LENGTHS[slot], tokens[slot]) for slot in range(4)])
        found = graphs.step(step_with(attend, adapters, LENGTHS, new), attend)[1]
        expected = step_of(cache, forward, adapters, LENGTHS, new)
        # In fp8 a number between two codes may be rounded to either.
        assert float((found - expected).norm() / expected.norm()) < (0.02 if precision == "fp8" else 1e-5)


def quantise(decoder: Decoder, kind: type[Fp8Weight | Nf4Weight]) -> None:
    """Have the weights of all layers in fp8 or nf4, on a CPU, too."""
    for index, layer in enumerate(decoder.layers):
        weights = tuple(kind(torch.cat(weight.dense())) for weight in layer.weights)
        decoder.layers[index] = replace(layer, weights=weights)


def without_graph(splits: int) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda graphs, shape: graphs._layers(shape._replace(splits=splits))


def in_pages(forward: LlamaForward, cache: SlotKVCache) -> PagedKV:
    """What is in the slots, each in the slot after it, in pages in no order; what nobody wrote is NaN."""
    kv = kv_of(forward)
    pages = random.Random(0).sample(range(16), 16)
    for memory in (*kv.keys, *kv.values):
        memory.fill_(torch.nan)
    for slot, length in enumerate(LENGTHS):
        own = [pages.pop() for _ in range(CONTEXT // PAGE_TOKENS)]
        kv.assign(slot + 1, own)
        for position in range(length):
            at = own[position // PAGE_TOKENS], slice(None), position % PAGE_TOKENS
            for paged, slots in zip((*kv.keys, *kv.values), (*cache.keys, *cache.values), strict=True):
                paged[at] = slots[slot, :, position]
    return kv


class NoText(PreTrainedTokenizerBase):
    """Stands for a tokenizer where answers are ids."""

    def decode(self, *_: object, **__: object) -> str:
        return ""


def forced(base: BaseModel, adapters: int, monkeypatch: pytest.MonkeyPatch, **settings: int | None) -> Tensor:
    """`[requests, tokens, vocabulary]`: log-probabilities of each next token where all are given ones, of requests for
    the base and for as many adapters, some of whose prompts begin alike.
    """
    forward = open_forward(base, "llama")
    loaded = [
        forward.load(random_adapter(forward.modules, seed, r=4 + 12 * seed, size=0.1)) for seed in range(adapters)
    ]
    generator = Generator(base, forward, max_len=200, **settings)  # type: ignore[arg-type]
    assert isinstance(generator._cache, PagedKVCache) == (base.device.type == "cuda")
    seen: dict[int, list[Tensor]] = {}
    answering: list[int] = []

    def sample(logits: Tensor, samplers: Sequence[Sampler]) -> tuple[Tensor, None]:
        numbers = [next(n for n, live in generator._live.items() if live.sampler is sampler) for sampler in samplers]
        for number, row in zip(numbers, logits, strict=True):
            seen.setdefault(number, []).append(row.float().log_softmax(-1).cpu())
        answering.append(len(numbers))
        tokens = [(7 * number + 3 * len(seen[number])) % 90 + 3 for number in numbers]
        return torch.tensor(tokens, device=logits.device), None

    monkeypatch.setattr(engine, "sample", sample)
    for seed in range(11):
        adapter = [None, *loaded][seed % (adapters + 1)]
        prompt = prompt_of(seed // 4, 20 + 10 * (seed // 4))
        generator.add(
            GenerationRequest(prompt=prompt, adapter=adapter, digest=str(seed % (adapters + 1)), max_tokens=24)
        )
    while generator.running or generator.waiting:
        generator.step()
    if isinstance(generator._cache, PagedKVCache):
        assert generator._cache.free_pages == len(generator._cache._kv.keys[0])
    forward.close()
    return torch.stack([torch.stack(seen[number]) for number in sorted(seen)])


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_in_one_piece_is_the_one_that_it_was(dora: bool) -> None:
    """What is copied to a GPU as one has the bits of what it was made of, and memory of its own."""
    forward = open_forward(decoder_base("llama", torch.float32))
    adapter = random_adapter(forward.modules, 1, r=6, dora=dora)
    piece = staged(adapter, torch.float32, pinned=False)
    assert piece.memory.numel() == sum(map(torch.Tensor.numel, (*adapter.a.values(), *adapter.b.values())))
    for loaded in (forward.load(piece), forward.load(adapter)):
        found = loaded.args.adapter
        assert found.cast is not None and all(b.t().is_contiguous() for _, b in found.cast.values())
        for name, (a, b) in found.cast.items():
            assert torch.equal(a, adapter.a[name]) and torch.equal(b, adapter.b[name])
        assert found.magnitude.keys() == adapter.magnitude.keys() and loaded.modules == adapter.a.keys()
    before = adapter.a[next(iter(adapter.a))].clone()
    piece.memory.zero_()
    assert torch.equal(adapter.a[next(iter(adapter.a))], before)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has no build for this system")
def test_the_table_of_an_adapter_is_that_of_another_moved() -> None:
    """All of a kind have one layout; what they have in common with none of another kind is their own."""
    from lora_core.kernels.low_rank_triton import FIELDS, SCALES, table_row

    forward = open_forward(decoder_base("llama", torch.float32))
    groups, cpu = forward.decoder.groups, torch.device("cpu")
    some = LoraConfig(r=6, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"v_proj": 3})
    for lora in (some, LoraConfig(r=16)):
        one, other = (
            staged(init_adapter(forward.modules, lora, seed=seed), torch.float32, pinned=False) for seed in (1, 2)
        )
        assert one.kind == other.kind
        layout, args = AdapterLayout(one, groups, cpu), KernelArgs(on_device(other, other.memory, cpu), groups, cpu)
        rows = [table_row(adapter, group) for adapter, group in zip(args.groups, groups, strict=True)]
        expected, found = np.array(rows), layout.table_at(other.memory).reshape(-1, FIELDS)
        scales = [column.copy() for column in (expected[:, SCALES], found[:, SCALES])]
        assert ((scales[0] == 0) == (scales[1] == 0)).all()
        expected[:, SCALES] = found[:, SCALES] = 0
        assert (expected == found).all() and layout.by_kind == args.by_kind
        served = layout.args_at(other.memory)
        for ours, theirs in zip(served.groups, args.groups, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert torch.equal(ours.a, theirs.a) and torch.equal(ours.scales, theirs.scales)
        kept = weakref.ref(one.memory)
        del one, args, rows, served
        gc.collect()
        assert kept() is None and layout.modules  # all of the first one has gone
    kinds = {
        staged(init_adapter(forward.modules, lora, seed=0), torch.float32, pinned=False).kind
        for lora in (some, LoraConfig(r=8), LoraConfig(r=16), LoraConfig(r=16, lora_alpha=7))
    }
    assert len(kinds) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_an_upload_waits_for_no_kernel() -> None:
    model = tiny_model("llama", 3, dtype=torch.bfloat16, intermediate_size=176)
    base = placed(BaseModel(model, NoText(), "tiny", "0" * 64, "bf16", model.device), torch.device("cuda"))
    forward = open_forward(base, "llama")
    piece = forward.stage(random_adapter(forward.modules, 1))
    forward.load(piece)  # memory and stream are made
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # a second
    busy.record()
    bound = forward.load(piece)
    assert not busy.query()
    busy.synchronize()
    for name, (a, b) in bound.args.adapter.cast.items():
        assert torch.equal(a.cpu(), piece.a[name]) and torch.equal(b.cpu(), piece.b[name])
    torch.cuda._sleep(1_000_000_000)
    read = {name: a.clone() for name, a in bound.args.adapter.a.items()}  # queued, when its memory is let go
    del bound, a, b
    later = [forward.load(forward.stage(random_adapter(forward.modules, seed))) for seed in range(2, 6)]
    assert len(later) == 4 and all(torch.equal(a.cpu(), piece.a[name]) for name, a in read.items())


def test_a_warm_generator_is_as_it_was() -> None:
    """On a CPU its steps are plain ones; the next test has the graphs."""
    base = dataclasses.replace(decoder_base("llama", torch.float32), tokenizer=NoText())
    for path in ("llama", "hooks"):
        forward = open_forward(base, path)  # type: ignore[arg-type]
        answers = []
        for warm in (False, True):
            generator = Generator(base, forward, slots=2, max_len=64)
            if warm:
                warm_up(generator)
            assert generator.running == generator.waiting == 0
            number = generator.add(
                GenerationRequest(prompt=prompt_of(1, 20), sampling=SamplingParams(seed=3), max_tokens=9)
            )
            events = [event for events in iter(generator.step, []) for event in events]
            answers.append([event.token for event in events if event.request == number])
        assert answers[0] == answers[1] and len(answers[0]) == 9
        forward.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_warm_generator_captures_no_graph_for_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", 3, dtype=torch.bfloat16, intermediate_size=176)
    base = placed(BaseModel(model, NoText(), "tiny", "0" * 64, "bf16", model.device), torch.device("cuda"))
    forward = open_forward(base, "llama")
    generator = Generator(base, forward, slots=256)
    warm_up(generator)
    monkeypatch.setattr(DecodeGraphs, "_capture", None)
    adapters = [forward.load(random_adapter(forward.modules, seed, r=16)) for seed in range(8)]
    for sequences, of in ((1, [None]), (8, adapters), (8, adapters[:1] * 8), (64, adapters * 8)):
        for index in range(sequences):
            request = GenerationRequest(prompt=[index], adapter=of[index % len(of)], max_tokens=4)
            generator.add(request)
        while generator.running or generator.waiting:
            generator.step()
    for number in range(300):  # prompts of any length, beside any number of answers
        generator.add(
            GenerationRequest(
                prompt=[(number + place) % 90 for place in range(1 + 37 * number % 250)], max_tokens=1 + 7 * number % 90
            )
        )
        for _ in range(number % 3):
            generator.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("kind", "precision", "most"),
    [("llama", "bf16", 0.03), ("qwen3", "bf16", 0.03), ("llama", "nf4", 0.03), ("llama", "fp8", 0.16)],
)
def test_pages_and_graphs_compute_what_the_cpu_does(
    kind: str, precision: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is beside a request, however its prompt is cut and whether or not it shares its beginning. `most` is
    twice what rounding to bf16 alone makes on a CPU of the worst token, by the norms of its log-probabilities; in fp8
    it is that much, as many numbers are rounded to another code.
    """
    bases = []
    for device, computed in (("cpu", "fp32"), ("cuda", precision)):
        model = tiny_model(kind, 3, dtype=torch.bfloat16, intermediate_size=176)
        model = model.float() if device == "cpu" else model
        base = BaseModel(model, NoText(), "tiny", "0" * 64, computed, model.device)  # type: ignore[arg-type]
        bases.append(placed(base, torch.device(device)))
    if precision in QUANTISED_WEIGHTS:
        assert bases[0].decoder is not None
        quantise(bases[0].decoder, QUANTISED_WEIGHTS[precision])
    expected = forced(bases[0], 3, monkeypatch)
    for settings in ({}, {"slots": 2}, {"prefill_tokens": 16, "mixed_tokens": 16}):
        found = forced(bases[1], 3, monkeypatch, **settings)  # type: ignore[arg-type]
        worst = float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
        assert worst < most, (settings, worst)
