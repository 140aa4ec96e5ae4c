"""The files of a base are found, converted once and named by their weights; broken ones are told in a sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lora_core.models import files as base_files
from lora_core.models.base import describe_base
from lora_core.models.checks import BaseModelError
from lora_core.models.files import chat_template_hash, open_model
from tests.support.models import logits_of, tiny_model
from tests.support.tiny_models import byte_tokenizer, load_on_cpu, save_random, set_config, smollm2_gguf, weights


@pytest.fixture
def no_building(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it: from then on a conversion is an error."""

    def forbid() -> None:
        def build(*_: Any) -> None:
            raise AssertionError("it was converted again")

        monkeypatch.setattr(base_files, "write_dense", build)

    return forbid


# --- a GGUF file -----------------------------------------------------------------------------------------------------


def test_gguf_is_converted_once_and_is_the_same_model(shared_cache: Path, no_building: Callable[[], None]) -> None:
    source = smollm2_gguf()
    assert source is not None
    first = load_on_cpu(source, shared_cache)
    no_building()
    second = load_on_cpu(source, shared_cache)
    assert first.fingerprint == second.fingerprint
    assert (second.precision, second.parameters, second.nbytes) == ("fp32", 134_515_008, 134_515_008 * 4)
    assert second.tokenizer.chat_template is not None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = second.tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert isinstance(prompt, str)
    ids = torch.tensor([second.tokenizer.encode(prompt, add_special_tokens=False)])
    asked = ids.shape[1]
    for _ in range(8):
        ids = torch.cat([ids, logits_of(second, ids)[:, -1:].argmax(-1)], dim=1)
    assert "Paris" in str(second.tokenizer.decode(ids[0, asked:]))


def save_gguf(file: Path, seed: int) -> Path:
    """A random Llama as llama.cpp keeps it."""
    model, tokenizer = tiny_model("llama", seed), byte_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "ab"])
    writer.add_token_merges(["a b"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        kept = names.get_name(name, try_suffixes=(".weight",))
        assert kept is not None
        writer.add_tensor(kept, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_gguf_file_that_is_named_is_read_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not one of that name in the working directory, nor an adapter that lies beside it."""
    for seed, name in enumerate(("asked", "here")):
        (tmp_path / name).mkdir()
        save_gguf(tmp_path / name / "model.gguf", seed)
    source, reads, read = tmp_path / "asked" / "model.gguf", list[str](), gguf.GGUFReader
    alone = weights(load_on_cpu(source, tmp_path / "alone").model)
    adapter = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "org/base"}
    (source.parent / "adapter_config.json").write_text(json.dumps(adapter))

    def counting(path: str) -> gguf.GGUFReader:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(gguf, "GGUFReader", counting)
    monkeypatch.chdir(tmp_path / "here")
    found = weights(load_on_cpu(source, tmp_path / "cache").model)
    assert all(torch.equal(weight, alone[name]) for name, weight in found.items())
    assert [Path(path) for path in reads] == [source]
    assert gguf.GGUFReader is counting
    other = weights(load_on_cpu("model.gguf", tmp_path / "cache").model)
    assert not torch.equal(other["model.embed_tokens.weight"], alone["model.embed_tokens.weight"])


# --- a directory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "saved", "precision"),
    [
        ("llama", torch.float32, "bf16"),
        ("llama", torch.bfloat16, "fp32"),
        ("gemma", torch.float16, "bf16"),
        ("gpt2", torch.float32, "bf16"),
    ],
)
def test_conversion_rounds_the_sources_weights_once(
    kind: str, saved: torch.dtype, precision: str, tmp_path: Path, no_building: Callable[[], None]
) -> None:
    folder = save_random(tmp_path / "model", kind, dtype=saved)
    base = load_on_cpu(folder, tmp_path / "cache", precision)
    dtype = base_files.DTYPES[precision]
    original = weights(tiny_model(kind).to(saved))  # type: ignore[arg-type]
    assert base.model.dtype == dtype
    assert all(torch.equal(weight, original[name].to(dtype)) for name, weight in weights(base.model).items())
    no_building()
    assert load_on_cpu(folder, tmp_path / "cache", precision).fingerprint == base.fingerprint


def test_directory_in_the_precision_computed_in_is_used_as_it_is(
    tmp_path: Path, no_building: Callable[[], None]
) -> None:
    no_building()
    base = load_on_cpu(save_random(tmp_path / "model", dtype=torch.bfloat16), tmp_path / "cache", "bf16")
    assert (base.precision, base.model.dtype) == ("bf16", torch.bfloat16)


def test_fingerprint_is_of_the_source_weights_alone(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = save_random(tmp_path / "model")
    fingerprint = load_on_cpu(folder, cache).fingerprint
    assert len(fingerprint) == 64
    assert load_on_cpu(folder, cache, "bf16").fingerprint == fingerprint
    assert load_on_cpu(folder, tmp_path / "other cache").fingerprint == fingerprint
    converted = next((cache / "bases").glob("*-bf16"))
    byte_tokenizer().save_pretrained(converted)
    assert load_on_cpu(converted, cache, "bf16").fingerprint == fingerprint
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copied / "README.md").write_text("other words")
    assert load_on_cpu(copied, cache).fingerprint == fingerprint
    assert load_on_cpu(save_random(tmp_path / "other seed", seed=1), cache).fingerprint != fingerprint
    tensors = load_file(copied / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    assert load_on_cpu(copied, cache).fingerprint != fingerprint


def test_changed_config_or_template_of_the_same_weights_is_seen(tmp_path: Path) -> None:
    """A conversion is cached by weights and config, and the tokenizer comes from the source."""
    folder = save_random(tmp_path / "model")
    before = load_on_cpu(folder, tmp_path / "cache", "bf16")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.125}))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    after = load_on_cpu(folder, tmp_path / "cache", "bf16")
    assert after.fingerprint == before.fingerprint
    assert after.model.config.rms_norm_eps == 0.125
    assert chat_template_hash(after.tokenizer) != chat_template_hash(before.tokenizer)


def test_template_hash_is_of_vocabulary_and_template() -> None:
    assert chat_template_hash(byte_tokenizer()) == chat_template_hash(byte_tokenizer())
    more_words = byte_tokenizer()
    more_words.add_tokens(["ticket"])
    assert chat_template_hash(more_words) != chat_template_hash(byte_tokenizer())


LOADER = """
import sys, time
from pathlib import Path
import torch
from lora_core.models import base, files
write = files.write_dense
def slow_write(model, folder):
    with open(sys.argv[3], "a") as log:
        log.write("built\\n")
    time.sleep(1.5)
    write(model, folder)
files.write_dense = slow_write
print("ready", flush=True)
sys.stdin.readline()
loaded = base.load_base(sys.argv[1], precision="bf16", cache_dir=Path(sys.argv[2]), device=torch.device("cpu"))
print(loaded.fingerprint, float(sum(p.double().sum() for p in loaded.model.parameters())), flush=True)
"""


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    folder, log = save_random(tmp_path / "model"), tmp_path / "builds"
    command = [sys.executable, "-c", LOADER, str(folder), str(tmp_path / "cache"), str(log)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        outputs = []
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            outputs.append(process.communicate(timeout=60)[0])
            assert process.returncode == 0
    finally:
        for process in processes:
            process.kill()
    assert outputs[0] == outputs[1] != ""
    assert log.read_text() == "built\n"
    assert not [path for path in (tmp_path / "cache" / "bases").iterdir() if path.name.endswith(".partial")]


def test_what_a_killed_builder_left_is_no_base(tmp_path: Path) -> None:
    folder, bases = save_random(tmp_path / "model"), tmp_path / "cache" / "bases"
    expected = load_on_cpu(folder, tmp_path / "cache", "bf16")
    (target,) = bases.glob("*-bf16")
    shutil.rmtree(target)
    left = bases / f".{target.name}.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    again = load_on_cpu(folder, tmp_path / "cache", "bf16")
    assert all(torch.equal(weight, weights(again.model)[name]) for name, weight in weights(expected.model).items())
    assert not left.exists()


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_random(tmp_path / "model")

    def full_disk(model: PreTrainedModel, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(base_files, "write_dense", full_disk)
        with pytest.raises(OSError, match="No space left"):
            load_on_cpu(folder, tmp_path / "cache", "bf16")
    assert [path.suffix for path in (tmp_path / "cache" / "bases").iterdir()] == [".lock"]
    load_on_cpu(folder, tmp_path / "cache", "bf16")


# --- errors ----------------------------------------------------------------------------------------------------------


def drop_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def reshape_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"holds no \*.safetensors"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "another family's weights": (set_config(model_type="gpt2", architectures=None), r"weights are missing"),
    "a weight is missing": (drop_weight, r"1 weights are missing.*layers.1.mlp.up_proj"),
    "a weight has another shape": (reshape_weight, r"1 weights .* have another shape .*layers.1.mlp.up_proj"),
    "no tokenizer": (without_tokenizer, "cannot be opened"),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_broken_directory_is_told_in_one_sentence(problem: str, tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model")
    change, message = BROKEN[problem]
    change(folder)
    for precision in ("fp32", "bf16"):
        with pytest.raises(BaseModelError, match=message) as caught:
            load_on_cpu(folder, tmp_path / "cache", precision)
        assert str(caught.value).startswith("base model ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/place", "there is no such file or directory"),
        ("./nowhere", "there is no such file or directory"),
        ("missing.gguf", "there is no such file or directory"),
        ("nobody/no-such-model", "no alias of LORA_BASE_MODELS, no local path, and the hub did not give it"),
        ("what even is this", "check the name, the network or HF_TOKEN"),
    ],
)
def test_source_that_is_not_there_is_told_in_one_sentence(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for use in (lambda: load_on_cpu(source, tmp_path), lambda: describe_base(source, tmp_path)):
        with pytest.raises(BaseModelError, match=message) as caught:
            use()
        assert str(caught.value).startswith(f"base model {source}: ")
        assert "\n" not in str(caught.value)


def test_broken_gguf_is_told_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(BaseModelError, match="cannot be opened") as caught:
        load_on_cpu(file, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_threads_that_load_at_once_leave_transformers_as_it_was(tmp_path: Path) -> None:
    """While it loads a model it replaces a method of all models: two at once would leave it replaced."""
    before, folder = PreTrainedModel.tie_weights, save_random(tmp_path / "base")
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: open_model(folder, torch.float32), range(24)))
        assert PreTrainedModel.tie_weights is before
    finally:
        PreTrainedModel.tie_weights = before  # type: ignore[method-assign]
