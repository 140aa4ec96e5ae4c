"""A base is frozen, mapped and counted once; what cannot be computed faithfully is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from lora_core.adapter_bank import AdapterBank
from lora_core.base_checks import BaseModelError
from lora_core.base_files import chat_template_hash
from lora_core.base_model import Precision, describe_base, load_base, placed, resolve_precision
from tests.models import CONFIGS, CPU, tiny_base, tiny_model
from tests.tiny_models import byte_tokenizer, load_on_cpu, save_random, weights


def test_base_is_frozen_and_counts_tied_weights_once(tmp_path: Path) -> None:
    for kind, tied in (("gpt2", True), ("llama", False)):
        base = load_on_cpu(save_random(tmp_path / kind, kind), tmp_path / "cache")
        names = weights(base.model)
        assert not any(weight.requires_grad for weight in names.values())
        assert not base.model.training
        assert ("lm_head.weight" not in names) == tied
        assert base.parameters == sum(weight.numel() for weight in names.values())
        assert base.nbytes == 4 * base.parameters


def test_weights_are_mapped_from_the_file(tmp_path: Path) -> None:
    """So that the processes of a node share one copy; `tests/bench/shared_base.py` measures it."""
    base = load_on_cpu(save_random(tmp_path / "model"), tmp_path / "cache", "bf16")
    file = next((tmp_path / "cache" / "bases").glob("*-bf16/model.safetensors")).resolve()
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            spans.append(range(start, end))
    assert all(any(weight.data_ptr() in span for span in spans) for weight in weights(base.model).values())


def test_description_needs_no_weights(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", "gpt2")
    listed = [path.name for path in folder.iterdir()]
    (folder / "model.safetensors").unlink()
    model, tokenizer = describe_base(str(folder), tmp_path / "cache", listed)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert AdapterBank(model).shapes("all-linear") == AdapterBank(tiny_model("gpt2")).shapes("all-linear")
    assert chat_template_hash(tokenizer) == chat_template_hash(byte_tokenizer())


def test_precision_is_the_one_asked_for_or_the_hardwares(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [resolve_precision(precision, CPU) for precision in ("fp32", "bf16")] == ["fp32", "bf16"]  # type: ignore[arg-type]
    for capabilities, expected in (
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx2": True}, "fp32"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert resolve_precision("auto", CPU) == expected


@pytest.mark.parametrize(("precision", "units", "warned"), [("bf16", False, 1), ("bf16", True, 0), ("auto", False, 0)])
def test_bf16_on_a_cpu_that_has_none_is_warned_of(
    precision: Precision, units: bool, warned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units})
    load_base(str(save_random(tmp_path / "model", "gpt2")), precision=precision, cache_dir=tmp_path, device=CPU)
    told = [record.getMessage() for record in caplog.records if record.name == "lora.engine"]
    assert len(told) == warned and all("use auto" in message for message in told)


def test_a_base_that_is_too_large_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    base = tiny_base("llama")
    monkeypatch.setattr(type(base.model), "to", full)
    with pytest.raises(BaseModelError, match="in fp32 it does not fit into the memory of cpu: use a lower precision"):
        placed(base, CPU)


_SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT_SIZES = {name: size for name, size in _SIZES.items() if name != "num_key_value_heads"}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": 32,
    "factor": 2.0,
}
UNFAITHFUL: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "logits divided": (lambda: transformers.GraniteConfig(**_SIZES, logits_scaling=8.0), "logits differ by"),
    "logits multiplied": (lambda: transformers.CohereConfig(**_SIZES), "logits differ by"),
    "state across documents": (
        lambda: transformers.Lfm2Config(**_SIZES, layer_types=["conv", "full_attention"]),
        "logits differ by",
    ),
    "not causal": (lambda: transformers.BertConfig(**_BERT_SIZES), "none of causal language models"),
    "attention of its own": (
        lambda: transformers.BloomConfig(vocab_size=264, hidden_size=64, n_layer=2, n_head=4),
        "computes attention in a way",
    ),
    "attention without our argument": (lambda: transformers.StableLmConfig(**_SIZES), "attention in a way"),
    "positions by the longest": (
        lambda: transformers.Phi3Config(**_SIZES, max_position_embeddings=64, rope_parameters=_LONGROPE),
        "longrope RoPE",
    ),
}


@pytest.mark.parametrize("family", UNFAITHFUL)
def test_family_that_would_be_computed_wrongly_is_refused(family: str, tmp_path: Path) -> None:
    make, message = UNFAITHFUL[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(BaseModelError, match=message):
        load_on_cpu(tmp_path / "model", tmp_path / "cache")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_family_that_is_computed_rightly_is_taken(kind: str, precision: str, tmp_path: Path) -> None:
    base = load_on_cpu(save_random(tmp_path / "model", kind), tmp_path / "cache", precision)
    assert base.model.config.model_type == CONFIGS[kind].model_type
