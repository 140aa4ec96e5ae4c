"""Bases that cannot work are refused by their files alone, at submission as on a rank, in the same words; and a base is
its own weights, whatever lies beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_core.models.base import describe_base
from lora_core.models.checks import BaseModelError, weight_files
from lora_core.models.files import local_folder
from tests.support.models import tiny_model
from tests.support.tiny_models import byte_tokenizer, load_on_cpu, save_random, set_config, weights

Change = Callable[[Path], object]


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def in_two_shards(folder: Path, missing: bool = False) -> None:
    tensors = list(load_file(folder / "model.safetensors").items())
    without_weights(folder)
    shards = {"model-00001-of-00002.safetensors": tensors[::2], "model-00002-of-00002.safetensors": tensors[1::2]}
    for name, held in shards.items():
        save_file(dict(held), folder / name, {"format": "pt"})
    index = {name: file for file, held in shards.items() for name, _ in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if missing:
        (folder / "model-00002-of-00002.safetensors").unlink()


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def as_adapter(folder: Path) -> None:
    without_weights(folder)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


BNB = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
UNUSABLE: dict[str, tuple[Change, str]] = {
    "bitsandbytes": (set_config(quantization_config=BNB), r"quantised \(bitsandbytes\), which is not read here; use"),
    "gptq": (set_config(quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq\)"),
    "awq": (set_config(quantization_config={"quant_method": "awq"}), r"quantised \(awq\)"),
    "fp8": (set_config(quantization_config={"quant_method": "fp8"}), r"quantised \(fp8\)"),
    "one of tomorrow": (set_config(quantization_config={"quant_method": "zip"}), r"quantised \(zip\)"),
    "without a name": (set_config(quantization_config={"bits": 3}), r"quantised \(of an unnamed kind\)"),
    "in its text part": (
        set_config(model_type="gemma3", text_config={"quantization_config": BNB}), r"quantised \(bitsandbytes\)",
    ),
    "a text part of another family": (set_config(text_config={}), r"its config.json cannot be used \("),
    "in a file of its own": (lambda f: (f / "quantize_config.json").write_text("{}"), r"quantised \(gptq\)"),
    "dynamic": (set_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic RoPE"),
    "dynamic, as it was": (set_config(rope_scaling={"type": "dynamic", "factor": 2.0}), "dynamic RoPE"),
    "no weights": (without_weights, r"holds no \*\.safetensors with the model's weights; save"),
    "weights of an adapter": (
        lambda f: [without_weights(f), (f / "adapter_model.safetensors").touch(), (f / "adapter_config.json").touch()],
        "only those of an adapter",
    ),
    "a shard is missing": (lambda f: in_two_shards(f, True), r"model-00002-of-00002.*of which .*index.json speaks, is"),
    "half a download": (cut, r"model\.safetensors is no whole safetensors file"),
    "git lfs": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "git lfs pull"),
    "an adapter alone": (as_adapter, r"is a PEFT adapter; give its base \(org/base\) as base_model"),
    "a GGUF in a folder": (
        lambda f: [(f / "config.json").unlink(), (f / "m.gguf").touch()], "a GGUF file; give the path of that file",
    ),
    "a list for a config": (lambda f: (f / "config.json").write_text("[]"), "config.json holds no options"),
    "an encoder": (set_config(model_type="t5"), r"family \(t5\) is none of causal language models"),
    "a masked model": (set_config(model_type="bert", architectures=["BertLMHeadModel"]), r"family \(bert\) is none of"),
    "a classifier": (set_config(architectures=["LlamaForSequenceClassification"]), "saved as LlamaForSequenceClass"),
    "headless, and untied": (set_config(architectures=["LlamaModel"], tie_word_embeddings=False), "as LlamaModel, and"),
    "state": (set_config(model_type="mamba"), r"family \(mamba\) computes attention in a way"),
    "unknown": (set_config(model_type="no-such-family"), r"family \(no-such-family\) is not known; use a Llama"),
    "no family": (set_config(model_type=None), r"family \(None\) is not known"),
    "other code": (set_config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}), r"\(auto_map\), which"),
    "a field of another type": (set_config(num_attention_heads="six"), r"its config.json cannot be used \("),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_cannot_be_a_base_is_refused_by_its_files(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sentence before a job is queued and where it would be loaded; no weights are read for it."""
    folder = save_random(tmp_path / "model")
    change, message = UNUSABLE[kind]
    change(folder)
    monkeypatch.setattr("lora_core.models.base.open_model", lambda *_: pytest.fail("it reads weights"))
    sentences = set()
    for use in (lambda: describe_base(str(folder), tmp_path), lambda: load_on_cpu(folder, tmp_path / "cache")):
        with pytest.raises(BaseModelError, match=message) as caught:
            use()
        sentences.add(str(caught.value))
    (sentence,) = sentences
    assert sentence.startswith("base model ")
    assert "\n" not in sentence


def test_everything_that_is_wrong_with_a_base_comes_at_once(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model")
    both(without_weights, set_config(quantization_config=BNB, architectures=["LlamaForTokenClassification"]))(folder)
    with pytest.raises(BaseModelError, match=r"quantised.*; it holds no .*; it was saved as LlamaForTokenClass"):
        describe_base(str(folder), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        set_config(quantization_config={"quant_method": "gguf"}),
        set_config(architectures=["LlamaModel"], tie_word_embeddings=True),
        set_config(architectures=None),
        set_config(auto_map={"AutoConfig": "mine.Config"}),
        set_config(rope_scaling={"type": "linear", "factor": 2.0}),
        in_two_shards,
    ],
)
def test_what_can_be_a_base_is_none_the_worse_for_unusual_files(change: Change, tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model")
    change(folder)
    describe_base(str(folder), tmp_path)
    found = weights(load_on_cpu(folder, tmp_path / "cache").model)
    assert all(torch.equal(weight, found[name]) for name, weight in tiny_model("llama").named_parameters())


def test_files_that_are_not_here_are_judged_by_their_names(tmp_path: Path) -> None:
    """As of a bucket, of which only the small files are fetched at submission."""
    folder = save_random(tmp_path / "model")
    in_two_shards(folder)
    listed = {path.name for path in folder.iterdir()}
    for file in weight_files(folder):
        file.unlink()
    assert local_folder(str(folder), tmp_path, weights=False, listed=listed) == folder.resolve()
    held = [name for name in listed if name.startswith("model")]
    for missing, message in (
        ({"model-00002-of-00002.safetensors"}, "is not there; fetch or copy"),
        (set(held), r"holds no \*\.safetensors"),
    ):
        with pytest.raises(BaseModelError, match=message):
            describe_base(str(folder), tmp_path, listed - missing)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_an_adapter_beside_a_base_changes_nothing(precision: str, kind: str, tmp_path: Path) -> None:
    """A merged model saved into the folder of its adapter: with peft installed, transformers would put it in again."""
    alone, together = save_random(tmp_path / "alone"), tmp_path / "together"
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(alone), peft.LoraConfig(r=4, init_lora_weights=False)
    )
    model.save_pretrained(str(together))
    save_random(together)
    if kind == "shards":
        in_two_shards(alone)
        in_two_shards(together)
    (together / "consolidated.safetensors").write_bytes(b"of another form")
    bases = [load_on_cpu(folder, tmp_path / "cache" / folder.name, precision) for folder in (alone, together)]
    assert bases[0].fingerprint == bases[1].fingerprint
    expected, found = (weights(base.model) for base in bases)
    assert expected.keys() == found.keys()
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


def test_a_changed_copy_of_a_conversion_is_not_what_it_was_made_from(tmp_path: Path) -> None:
    folder, cache = save_random(tmp_path / "model"), tmp_path / "cache"
    fingerprint = load_on_cpu(folder, cache, "bf16").fingerprint
    (converted,) = (cache / "bases").glob("*-bf16")
    copied = converted.rename(tmp_path / "copy")
    byte_tokenizer().save_pretrained(copied)
    assert load_on_cpu(copied, cache, "bf16").fingerprint != fingerprint
