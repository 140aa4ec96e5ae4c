"""The generator against transformers' own greedy generation, token by token; its text, its stops and its accounts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_core.adapters.peft_format import read_adapter
from lora_core.inference.detokenizer import TextStream, TokenTexts
from lora_core.inference.engine import AHEAD, Generator
from lora_core.inference.generation import GenerationRequest, PromptTooLongError, UnknownTokenError
from lora_core.inference.sampling_params import SamplingParams
from lora_core.models.base import BaseModel, load_base
from lora_core.models.files import local_folder
from lora_core.models.forward import Forward, ForwardPath, open_forward
from lora_core.models.llama.decoder import Decoder
from lora_core.models.step import Bound
from tests.support.models import random_adapter
from tests.support.tiny_models import byte_tokenizer, save_tiny_model, smollm2_gguf, write_adapter

GREEDY = SamplingParams(temperature=0.0)
PROMPTS = ["Hello", "The capital of France is", "a" * 40, "Zürich, 12 €", "x"]


class Stock:
    """A base for us, and the same weights as transformers' own model, with and without PEFT adapters."""

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self.folder = folder
        self.base = load_base(str(folder), precision="fp32", cache_dir=cache_dir)
        self.forward = open_forward(self.base)
        self.bank = self.forward.modules
        self._models: dict[Path | None, Any] = {}

    def model(self, adapter: Path | None) -> Any:
        if adapter not in self._models:
            model: Any = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
            self._models[adapter] = (PeftModel.from_pretrained(model, str(adapter)) if adapter else model).eval()
        return self._models[adapter]

    def greedy(self, prompt: list[int], tokens: int, ends: frozenset[int], adapter: Path | None = None) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = self.model(adapter).generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
                eos_token_id=sorted(ends), pad_token_id=min(ends),
            )  # fmt: skip
        return [int(token) for token in out[0, len(prompt) :]]


@pytest.fixture(scope="session", params=["llama", "qwen3", "gpt2", "gemma2"])
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    folder = save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return Stock(folder, tmp_path_factory.mktemp("tiny-cache"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseModel]:
    folder = save_tiny_model("llama", tmp_path_factory.mktemp("llama-alone"), seed=6)  # long answers
    yield load_base(str(folder), precision="fp32", cache_dir=tmp_path_factory.mktemp("llama-cache"))


@pytest.fixture
def forward(llama: BaseModel) -> Iterator[Forward]:
    forward = open_forward(llama)
    yield forward
    forward.close()


def run(generator: Generator, requests: list[GenerationRequest]) -> tuple[list[list[int]], list[str], list[str | None]]:
    """All requests at once, to their ends: tokens, texts and finish reasons."""
    ids = [generator.add(request) for request in requests]
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    texts = dict.fromkeys(ids, "")
    reasons: dict[int, str | None] = dict.fromkeys(ids)
    while generator.running or generator.waiting:
        for event in generator.step():
            assert reasons[event.request] is None, "an event after the last one"
            tokens[event.request].append(event.token)
            texts[event.request] += event.text
            reasons[event.request] = event.finish_reason
            assert event.completion_tokens == len(tokens[event.request])
    return [tokens[i] for i in ids], [texts[i] for i in ids], [reasons[i] for i in ids]


def encode(base: BaseModel, text: str) -> list[int]:
    ids = base.tokenizer(text)["input_ids"]
    assert isinstance(ids, list)
    return ids


def test_greedy_equals_transformers_and_peft_alone_and_beside_others(
    stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = [random_adapter(stock.bank, 1), random_adapter(stock.bank, 2, r=9)]
    everything = list(stock.bank.modules)  # gemma2's output head too, which is not tied
    adapters.append(random_adapter(stock.bank, 3, targets=everything, dora=True))
    folders = [write_adapter(adapter, stock.bank, tmp_path / str(i)) for i, adapter in enumerate(adapters)]
    adapters[2] = read_adapter(folders[2], stock.bank)
    assert adapters[2].norm.keys() == adapters[2].a.keys()  # computed while loading
    assert stock.forward.name == ("hooks" if stock.base.decoder is None else "llama")
    served = [stock.forward.load(adapter) for adapter in adapters]
    generator = Generator(stock.base, stock.forward, slots=4, max_len=128)
    plan = [(text, which) for text in PROMPTS for which in (None, 0, 1, 2)]
    requests, expected = [], []
    for text, which in plan:
        prompt = encode(stock.base, text)
        requests.append(
            GenerationRequest(
                prompt=prompt, adapter=None if which is None else served[which], sampling=GREEDY, max_tokens=14
            )
        )
        folder = None if which is None else folders[which]
        expected.append(stock.greedy(prompt, 14, generator.end_tokens, folder))
    together = run(generator, requests)[0]  # 20 requests, 3 adapters, 4 slots: joining and leaving all the time
    assert together == expected
    assert len({tuple(tokens) for tokens in together}) == len(plan), "answers must differ, or equality proves nothing"
    assert run(generator, requests[4:8])[0] == expected[4:8]  # few of them, in slots that others have used
    monkeypatch.setitem(AHEAD, "cpu", True)
    assert run(generator, requests)[0] == expected


def test_greedy_equals_transformers_on_a_real_model(shared_cache: Path, tmp_path: Path) -> None:
    source = smollm2_gguf()
    assert source is not None
    stock = Stock(local_folder(source, shared_cache), shared_cache)
    adapter = random_adapter(stock.bank, 3, r=8, size=0.05)
    folder = write_adapter(adapter, stock.bank, tmp_path / "adapter")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    chat = stock.base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert isinstance(chat, list)
    prompts = [chat, encode(stock.base, "Once upon a time")]
    generator = Generator(stock.base, stock.forward, slots=4, max_len=512)
    plan = [(prompt, which) for prompt in prompts for which in (None, stock.forward.load(adapter))]
    tokens, texts, reasons = run(
        generator, [GenerationRequest(prompt=p, adapter=w, sampling=GREEDY, max_tokens=16) for p, w in plan]
    )
    for answer, (prompt, which) in zip(tokens, plan, strict=True):
        assert answer == stock.greedy(prompt, 16, generator.end_tokens, folder if which else None)
    assert texts[0] == "The capital of France is Paris." and reasons[0] == "stop"
    assert tokens[0] != tokens[1] and tokens[2] != tokens[3]


def test_samples_follow_the_seed_not_the_neighbours(llama: BaseModel, forward: Forward) -> None:
    generator = Generator(llama, forward, slots=8, max_len=64)

    def request(seed: int | None, prompt: str = "Hello", adapter: Bound | None = None) -> GenerationRequest:
        sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=seed)
        return GenerationRequest(prompt=encode(llama, prompt), adapter=adapter, sampling=sampling, max_tokens=12)

    alone = run(generator, [request(7)])[0][0]
    adapter = forward.load(random_adapter(forward.modules, 1))
    beside = [request(1), request(None, "x", adapter), request(7), request(2, "other")]
    tokens = run(generator, beside)[0]
    assert tokens[2] == alone and tokens[0] != alone
    assert run(generator, [request(None)])[0] != run(generator, [request(None)])[0]


def test_what_a_sequence_leaves_in_its_slot_reaches_nobody(llama: BaseModel, forward: Forward) -> None:
    generator = Generator(llama, forward, slots=2, max_len=64)
    poison = random_adapter(forward.modules, 1)
    poison.a = {name: torch.full_like(a, float("nan")) for name, a in poison.a.items()}
    long = GenerationRequest(prompt=encode(llama, "y" * 30), sampling=GREEDY, max_tokens=8)
    short = GenerationRequest(prompt=encode(llama, "Hi"), sampling=GREEDY, max_tokens=8)
    expected = [run(generator, [request])[0][0] for request in (long, short)]
    nan = GenerationRequest(prompt=encode(llama, "z" * 40), adapter=forward.load(poison), sampling=GREEDY, max_tokens=8)
    assert run(generator, [nan, short])[0][1] == expected[1]  # beside it
    run(generator, [nan, nan])
    assert run(generator, [long, short])[0] == expected  # after it, where reading goes beyond the end of "Hi"


def test_ends_and_limits(llama: BaseModel, forward: Forward) -> None:
    generator = Generator(llama, forward, slots=2, max_len=32)
    assert generator.end_tokens == {256, 258}  # generation config, and the chat template's <|im_end|>
    prompt = encode(llama, "Hello")
    tokens, _, reasons = run(generator, [GenerationRequest(prompt=prompt, sampling=GREEDY, max_tokens=5)])
    assert len(tokens[0]) == 5 and reasons == ["length"]
    tokens, _, reasons = run(generator, [GenerationRequest(prompt=prompt, sampling=GREEDY)])
    assert len(tokens[0]) == 32 - len(prompt) and reasons == ["length"]  # the context is full to its last place
    generator.end_tokens = frozenset(tokens[0][3:4])
    cut, texts, reasons = run(generator, [GenerationRequest(prompt=prompt, sampling=GREEDY)])
    first = tokens[0].index(tokens[0][3])
    assert cut[0] == tokens[0][: first + 1] and reasons == ["stop"]
    assert texts[0] == llama.tokenizer.decode(tokens[0][:first])  # without the end token
    with pytest.raises(PromptTooLongError, match="32 tokens, and the context of 32"):
        generator.add(GenerationRequest(prompt=[5] * 32))
    generator.add(GenerationRequest(prompt=[5] * 31, max_tokens=1))
    assert [event.finish_reason for event in generator.step()] == ["length"]
    for broken in (GenerationRequest(prompt=[]), GenerationRequest(prompt=[5], max_tokens=-1)):
        with pytest.raises(ValueError, match="max_tokens of at least 0"):
            generator.add(broken)


def test_a_bias_of_an_unknown_token_is_refused_and_a_known_one_decides(llama: BaseModel, forward: Forward) -> None:
    generator = Generator(llama, forward, slots=1, max_len=64)
    prompt, favoured = encode(llama, "Hello"), SamplingParams(temperature=0.0, logit_bias={65: 100.0})
    tokens = run(generator, [GenerationRequest(prompt=prompt, sampling=favoured, max_tokens=3)])[0][0]
    assert tokens == [65, 65, 65]
    repeated = SamplingParams(temperature=0.0, logit_bias={65: 100.0}, frequency_penalty=1000.0)
    tokens = run(generator, [GenerationRequest(prompt=prompt, sampling=repeated, max_tokens=3)])[0][0]
    assert tokens[0] == 65 and len(set(tokens)) == 3, "the answer so far is known to the penalty"
    with pytest.raises(UnknownTokenError, match="logit_bias has the token id 9999"):
        unknown = SamplingParams(logit_bias={9999: 1.0})
        generator.add(GenerationRequest(prompt=prompt, sampling=unknown))


def test_abort_frees_the_slot(llama: BaseModel, forward: Forward) -> None:
    generator = Generator(llama, forward, slots=1, max_len=64)
    request = GenerationRequest(prompt=encode(llama, "Hello"), sampling=GREEDY, max_tokens=30)
    first, second, third = (generator.add(request) for _ in range(3))
    assert [event.request for event in generator.step()] == [first]
    generator.abort(first)
    generator.abort(second)  # it was still waiting
    generator.abort(first)  # twice is once
    assert (generator.running, generator.waiting) == (0, 1)
    assert [event.request for event in generator.step()] == [third]


def test_an_end_that_is_known_ahead_is_told_unless_it_is_given_up(
    llama: BaseModel, forward: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AHEAD, "cpu", True)
    generator, prompt = Generator(llama, forward, slots=4, max_len=64), encode(llama, "Hello")
    generator.add(GenerationRequest(prompt=prompt, sampling=GREEDY, max_tokens=30))
    generator.step()
    read, given_up = (generator.add(GenerationRequest(prompt=prompt, max_tokens=0)) for _ in range(2))
    generator.step()
    assert generator.running == 3
    generator.abort(given_up)
    assert generator.running == 2
    assert [event.finish_reason for event in generator.step() if event.request == read] == ["length"]
    assert given_up not in {event.request for _ in range(3) for event in generator.step()}


def test_stop_strings_in_the_generator(llama: BaseModel, forward: Forward) -> None:
    generator = Generator(llama, forward, slots=2, max_len=64)
    prompt = encode(llama, "Hello")
    full = run(generator, [GenerationRequest(prompt=prompt, sampling=GREEDY, max_tokens=40)])[1][0]
    stop = full[10:13]  # three characters, several tokens
    tokens, texts, reasons = run(
        generator, [GenerationRequest(prompt=prompt, sampling=GREEDY, max_tokens=40, stop=("never", stop))]
    )
    assert texts[0] == full[: full.index(stop)] and reasons == ["stop"] and len(tokens[0]) < 40


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece's ways: spaces belong to the next word, the first is dropped, unknown characters become bytes."""
    words = ["▁the", "▁cat", "s", "▁", "a", "▁sat"]
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOKENIZERS = {"bytes": byte_tokenizer(), "sentencepiece": metaspace_tokenizer()}


def stream(tokenizer: PreTrainedTokenizerFast, tokens: list[int], stop: list[str]) -> tuple[str, bool]:
    text, pieces = TextStream(tokenizer, stop), []
    for token in tokens:
        pieces.append(text.push(token))
        if text.stopped:
            return "".join(pieces), True
    return "".join([*pieces, text.finish()]), text.stopped


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(TOKENIZERS)), st.text(max_size=12), st.lists(st.integers(0, 263), max_size=6), st.booleans()
)
def test_pieces_join_to_the_decoded_text(kind: str, text: str, noise: list[int], noise_first: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    if kind == "sentencepiece":  # of a run of bytes that is no valid text every byte is decoded anew, those shown too
        noise = [token % 6 + 258 for token in noise]
    noise = [token for token in noise if token < len(tokenizer)]
    known = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = [*noise, *known] if noise_first else [*known, *noise]
    assert stream(tokenizer, tokens, [])[0] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_no_piece_ends_inside_a_character() -> None:
    tokenizer = TOKENIZERS["bytes"]
    text = TextStream(tokenizer, [])
    pieces = [text.push(token) for token in tokenizer("a€👍🏽é")["input_ids"]]
    assert [piece for piece in pieces if piece] == ["a", "€", "👍", "🏽", "é"]
    assert text.push(tokenizer("€")["input_ids"][0]) == "" and text.finish() == "\ufffd"


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_tokens_by_themselves_join_to_the_bytes_of_the_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    texts, ids = TokenTexts(tokenizer), tokenizer("the cat sat €👍é\ufffd")["input_ids"]
    assert b"".join(texts(token)[1] for token in ids).decode().strip() == tokenizer.decode(ids)
    assert "\ufffd" in {texts(token)[0] for token in ids}  # a part of a character
    assert texts(tokenizer.eos_token_id) == (tokenizer.eos_token, tokenizer.eos_token.encode())
    assert texts(263 if kind == "bytes" else 259)[0] == ("" if kind == "bytes" else " cat")


def cut_by_hand(text: str, stop: list[str]) -> tuple[str, bool]:
    """Character by character: over as soon as the text ends with a stop string, of several with the longest."""
    for end in range(1, len(text) + 1):
        if found := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(st.text("abé", max_size=14), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_they_are_first_complete(text: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS["bytes"]
    assert stream(tokenizer, tokenizer(text)["input_ids"], stop) == cut_by_hand(text, stop)


PARTS = sorted({" the cats sat a"[i : i + n] for i in range(15) for n in range(1, 5)})


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(258, 263), max_size=6), st.lists(st.sampled_from(PARTS), max_size=3))
@example([259], ["cat", "a"])  # the one that begins first is complete last
def test_stop_strings_inside_and_across_longer_tokens(tokens: list[int], stop: list[str]) -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    assert stream(tokenizer, tokens, stop) == cut_by_hand(tokenizer.decode(tokens), stop)


def test_a_started_stop_string_is_held_back_and_given_at_the_end() -> None:
    tokenizer = TOKENIZERS["bytes"]
    text = TextStream(tokenizer, ["###END"])
    pieces = [text.push(token) for token in tokenizer("ok ##")["input_ids"]]
    assert "".join(pieces) == "ok " and text.finish() == "##" and not text.stopped


@pytest.mark.parametrize("dora", [False, True])
def test_both_paths_answer_alike(llama: BaseModel, dora: bool) -> None:
    answers = []
    for path in ("llama", "hooks"):
        forward = open_forward(llama, path)
        adapter = forward.load(random_adapter(forward.modules, 5, dora=dora))
        request = GenerationRequest(prompt=encode(llama, "Hello"), adapter=adapter, sampling=GREEDY, max_tokens=24)
        answers.append(run(Generator(llama, forward, slots=2, max_len=64), [request, replace(request, adapter=None)]))
        forward.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("path", ["llama", "hooks"])
def test_a_served_adapter_is_in_the_dtype_of_the_base(llama: BaseModel, path: ForwardPath) -> None:
    in_bf16 = replace(llama, model=copy.deepcopy(llama.model).bfloat16())
    in_bf16.decoder = Decoder(in_bf16.model)
    forward = open_forward(in_bf16, path)
    bound = forward.load(adapter := random_adapter(forward.modules, 5))
    served = bound if path == "hooks" else bound.adapter
    a, b = served.weights(next(iter(adapter.a)), torch.bfloat16)
    assert a.dtype == b.dtype == torch.bfloat16
