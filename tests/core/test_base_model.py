"""A base is frozen, mapped and counted once; what cannot be computed faithfully is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

from lora_core.adapters.targets import AdaptableModules
from lora_core.models import fastest_precision
from lora_core.models.base import Precision, describe_base, load_base, placed, resolve_precision
from lora_core.models.checks import BaseModelError
from lora_core.models.fastest_precision import Shape, row_seconds
from lora_core.models.files import chat_template_hash
from tests.support.models import CONFIGS, CPU, FAMILIES, threads, tiny_base, tiny_model
from tests.support.tiny_models import byte_tokenizer, load_on_cpu, save_random, weights


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
    assert AdaptableModules(model).shapes == AdaptableModules(tiny_model("gpt2")).shapes
    assert chat_template_hash(tokenizer) == chat_template_hash(byte_tokenizer())


def rates(fp32: float, bf16: float, asked: list[tuple[Shape, torch.dtype]]) -> Callable[[Shape, torch.dtype], float]:
    """A CPU that multiplies at these GFLOP/s, and notes what it was asked."""

    def row_seconds(shape: Shape, dtype: torch.dtype) -> float:
        asked.append((shape, dtype))
        return 4 * shape[0] * shape[1] / (fp32 if dtype == torch.float32 else bf16) / 1e9

    return row_seconds


@pytest.mark.parametrize(("fp32", "bf16", "faster"), [(325, 180, "fp32"), (201, 871, "bf16"), (60, 1, "fp32")])
def test_auto_is_what_multiplies_faster_and_is_remembered(
    fp32: float, bf16: float, faster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    asked: list[tuple[Shape, torch.dtype]] = []
    monkeypatch.setattr(fastest_precision, "row_seconds", rates(fp32, bf16, asked))
    folder = str(save_random(tmp_path / "model", "gpt2"))
    with threads(1), caplog.at_level("INFO", "lora.engine"):
        choice = resolve_precision("auto", folder, cache_dir=tmp_path, device=CPU)
        assert choice.precision == faster
        assert f"{fp32} GFLOP/s in fp32 and {bf16} in bf16 with 1 thread" in choice.why
        assert {shape for shape, _ in asked} == (
            {(64, 192)} if bf16 == 1 else {(64, 192), (64, 64), (64, 256), (256, 64)}
        )
        asked.clear()
        base = load_base(folder, precision="auto", cache_dir=tmp_path, device=CPU)
        assert not asked and (base.precision, base.why) == (faster, choice.why)
        assert choice.why in caplog.text
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        resolve_precision("auto", folder, cache_dir=tmp_path, device=CPU)
        assert asked, "other instructions are measured anew"
        asked.clear()
    with threads(2):
        resolve_precision("auto", folder, cache_dir=tmp_path, device=CPU)
        assert asked, "and so are other threads"


@pytest.mark.parametrize(("precision", "bf16", "warned"), [("bf16", 20, 1), ("bf16", 500, 0), ("auto", 20, 0)])
def test_bf16_that_is_the_slower_one_is_warned_of(
    precision: Precision, bf16: float, warned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(fastest_precision, "row_seconds", rates(100, bf16, []))
    base = load_base(str(save_random(tmp_path / "model", "gpt2")), precision=precision, cache_dir=tmp_path, device=CPU)
    assert precision == "auto" or (base.precision, base.why) == ("bf16", "as asked for")
    warnings = [
        record.getMessage()
        for record in caplog.records
        if record.name == "lora.engine" and record.levelname == "WARNING"
    ]
    assert len(warnings) == warned and all("use auto, which is fp32 here" in message for message in warnings)


def test_a_row_takes_longer_through_a_larger_linear() -> None:
    """The real clock, where sizes differ a hundredfold."""
    assert row_seconds((32, 32), torch.float32) < row_seconds((1024, 1024), torch.float32)


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
    "state across documents": (lambda: transformers.Lfm2Config(**_SIZES, layer_types=["conv", "full_attention"]),
     "logits differ by"),
    "not causal": (lambda: transformers.BertConfig(**_BERT_SIZES), "none of causal language models"),
    "attention of its own": (lambda: transformers.BloomConfig(vocab_size=264, hidden_size=64, n_layer=2, n_head=4),
     "computes attention in a way"),
    "attention without our argument": (lambda: transformers.StableLmConfig(**_SIZES), "attention in a way"),
    "positions by the longest": (lambda: transformers.Phi3Config(**_SIZES, max_position_embeddings=64,
     rope_parameters=_LONGROPE), "longrope RoPE"),
}  # fmt: skip


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
@pytest.mark.parametrize("kind", FAMILIES)
def test_family_that_is_computed_rightly_is_taken(kind: str, precision: str, tmp_path: Path) -> None:
    base = load_on_cpu(save_random(tmp_path / "model", kind), tmp_path / "cache", precision)
    assert base.model.config.model_type == CONFIGS[kind].model_type
