"""The catalogue of adaptable modules: which there are, what `target_modules` selects, and what is refused."""

from __future__ import annotations

import peft
import pytest

from lora_core.adapters.targets import AdaptableModules
from tests.support.models import tiny_model

LLAMA_TARGETS: list[str | list[str]] = [
    "all-linear",
    ["q_proj", "v_proj"],
    ["layers.0.self_attn.q_proj", "down_proj"],
    ["model.layers.1.mlp.up_proj"],
    r".*layers\.1\..*(q_proj|gate_proj)",
    r"model\.layers\.\d+\.self_attn\.(k|o)_proj",
    ["lm_head"],
    ["v_proj", "lm_head"],
    r".*(q_proj|lm_head)",
]
GPT2_TARGETS: list[str | list[str]] = [
    "all-linear",
    ["c_attn"],
    ["c_proj"],
    ["mlp.c_proj", "h.0.attn.c_attn"],
    r".*h\.1\.mlp\.c_(fc|proj)",
]


@pytest.mark.parametrize(
    ("kind", "targets"),
    [*(("llama", targets) for targets in LLAMA_TARGETS), *(("gpt2", targets) for targets in GPT2_TARGETS)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_targets_are_those_that_peft_takes(kind: str, targets: str | list[str]) -> None:
    model = tiny_model(kind)
    ours = AdaptableModules(model).select(targets)
    config = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_model(kind), config).base_model.targeted_module_names
    assert set(ours) == set(theirs)
    assert len(ours) == len(set(ours)) > 0
    order = [name for name, _ in model.named_modules()]
    assert sorted(ours, key=order.index) == ours


def test_shapes_are_in_and_out_for_linear_and_conv1d() -> None:
    assert AdaptableModules(tiny_model("llama")).shapes["model.layers.1.mlp.down_proj"] == (172, 64)
    shapes = AdaptableModules(tiny_model("gpt2")).shapes
    assert [shapes[f"transformer.h.{i}.attn.c_attn"] for i in (0, 1)] == [(64, 192)] * 2


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("gemma", ["lm_head"]),
        ("gemma", ["q_proj", "lm_head"]),
        ("gemma", r".*(q_proj|lm_head)"),
        ("llama", ["embed_tokens"]),
        ("llama", ["model.embed_tokens"]),
        ("llama", ".*"),
        ("gpt2", ["wte"]),
        ("gpt2", ["c_attn", "lm_head"]),
    ],
    ids=str,
)
def test_head_and_embedding_are_refused_with_the_reason(kind: str, targets: str | list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"(an embedding|shares its weight with the embedding).*Choose from (c_attn|down_proj)"
    ):
        AdaptableModules(tiny_model(kind)).select(targets)


@pytest.mark.parametrize(
    "targets", [["nope", "q_proj", "layers.7.q_proj"], "q_proj", ["_proj"], ["mlp"], ["Q_PROJ"]], ids=str
)
def test_entry_that_matches_nothing_is_named_with_what_exists(targets: str | list[str]) -> None:
    with pytest.raises(ValueError, match="matches no module") as caught:
        AdaptableModules(tiny_model("llama")).select(targets)
    assert "Choose from down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj, or all-linear." in str(
        caught.value
    )
    for wrong in [targets] if isinstance(targets, str) else set(targets) - {"q_proj"}:
        assert repr(wrong) in str(caught.value)


def test_invalid_expression_is_named() -> None:
    with pytest.raises(ValueError, match=r"'\(q_proj' is no regular expression"):
        AdaptableModules(tiny_model("llama")).select("(q_proj")
