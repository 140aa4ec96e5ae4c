"""PEFT reads what we write and we read what PEFT writes, to the same logits; and damaged files are refused, never half
loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.init import init_adapter
from lora_core.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, AdapterFormatError, adapter_files, read_adapter
from lora_core.adapters.targets import AdaptableModules
from lora_core.config import LoraConfig
from lora_core.models.base import BaseModel
from lora_core.models.hooks.bank import AdapterBank
from tests.support.models import VOCABULARY, adapter_in_double, logits_of, tiny_base, tiny_model
from tests.support.tiny_models import write_adapter

IDS = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out", "ignore:Unable to fetch", "ignore:Setting `save_embedding_layers`"
)


def trained(bank: AdaptableModules, config: LoraConfig, seed: int = 1) -> Adapter:
    fresh = init_adapter(bank, config, seed)
    stream = torch.Generator().manual_seed(seed)
    return replace(
        fresh,
        b={name: torch.randn(b.shape, generator=stream) * 0.1 for name, b in fresh.b.items()},
        magnitude={name: m + torch.rand(m.shape, generator=stream) for name, m in fresh.magnitude.items()},
    )


def our_logits(base: BaseModel, bank: AdapterBank, adapter: Adapter) -> Tensor:
    """In fp64."""
    return logits_of(base, IDS, bank, adapter_in_double(adapter))


@torch.no_grad()
def logits_of_peft(kind: str, folder: Path) -> Tensor:
    """In fp64, with transformers' own attention."""
    model = tiny_model(kind, attention="eager", dtype=torch.float64)
    logits: Tensor = peft.PeftModel.from_pretrained(model, str(folder)).double().eval()(IDS).logits
    return logits


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"r": 8, "lora_alpha": 12}),
    "llama-rslora": ("llama", {"r": 16, "lora_alpha": 8, "use_rslora": True}),
    "llama-few": ("llama", {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}),
    "llama-one-layer": ("llama", {"r": 4, "lora_alpha": 9, "target_modules": ["layers.1.self_attn.v_proj", "o_proj"]}),
    "qwen2": ("qwen2", {"r": 3, "lora_alpha": 7}),
    "llama-dora": ("llama", {"r": 8, "lora_alpha": 12, "use_dora": True}),
    "qwen2-dora-rslora": ("qwen2", {"r": 4, "lora_alpha": 7, "use_rslora": True, "use_dora": True}),
    "gpt2-dora": ("gpt2", {"r": 8, "lora_alpha": 12, "use_dora": True, "rank_pattern": {"c_fc": 3}}),
    "llama-head": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head"]}),
    "llama-head-dora": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head", "q_proj"], "use_dora": True}),
    "gpt2": ("gpt2", {"r": 8, "lora_alpha": 12}),
    "llama-patterns": ("llama", {"r": 4, "lora_alpha": 6, "rank_pattern": {r"layers\.0\..*q_proj": 2, "q_proj": 9,
     "mlp.down_proj": 3}, "alpha_pattern": {"v_proj": 1, r"model\.layers\.1\..*": 9}, "use_rslora": True}),
    "gpt2-patterns": ("gpt2", {"rank_pattern": {"attn.c_proj": 2, "c_proj": 5}, "alpha_pattern": {"c_attn": 3}}),
    "gpt2-rslora": ("gpt2", {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": ["c_attn", "mlp.c_proj"]}),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_computes_the_same_from_our_files(name: str, tmp_path: Path) -> None:
    kind, config = ADAPTERS[name]
    base = tiny_base(kind, dtype=torch.float64)
    bank = AdapterBank(base.model)
    adapter = trained(bank, LoraConfig(**config))
    folder = write_adapter(adapter, bank, tmp_path / "adapter")
    theirs = logits_of_peft(kind, folder)
    torch.testing.assert_close(our_logits(base, bank, read_adapter(folder, bank)), theirs, rtol=1e-12, atol=1e-12)
    # In the files B is times the scale, rounded to fp32.
    torch.testing.assert_close(our_logits(base, bank, adapter), theirs, rtol=1e-5, atol=1e-5)
    plain = tiny_model(kind, attention="eager", dtype=torch.float64)(IDS).logits
    assert float((theirs - plain).abs().max()) > 0.1


SOME_LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-layer": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}),
    "gpt2-layers": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": [0]}),
    "llama-layer-and-names": (
        "llama",
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
    ),
}
"""As PEFT writes them; ours are written with full names."""


@torch.no_grad()
@pytest.mark.parametrize("name", [*ADAPTERS, *SOME_LAYERS])
def test_we_compute_the_same_from_pefts_files(name: str, tmp_path: Path) -> None:
    kind, config = (ADAPTERS | SOME_LAYERS)[name]
    arguments = {
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.1,
        "init_lora_weights": "gaussian",
    }
    model = peft.get_peft_model(tiny_model(kind, attention="eager"), peft.LoraConfig(**arguments | config)).eval()
    torch.manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.normal_(0, 0.1)
        if "lora_magnitude_vector" in parameter_name:
            parameter.add_(torch.rand_like(parameter))
    model.save_pretrained(str(tmp_path))
    base = tiny_base(kind, dtype=torch.float64)
    bank = AdapterBank(base.model)
    adapter = read_adapter(tmp_path, bank)
    assert not any(weight.requires_grad for weight in (*adapter.a.values(), *adapter.b.values()))
    # Read back by PEFT, since it writes a pattern's keys in alphabetic order, and the first that matches counts.
    theirs = logits_of_peft(kind, tmp_path)
    torch.testing.assert_close(our_logits(base, bank, adapter), theirs, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_pissa_adapter_is_published_for_the_base_as_it_is(kind: str, dora: bool, tmp_path: Path) -> None:
    """Ranks of the trained and the first product side by side; untrained it changes nothing, trained it does."""
    base = tiny_base(kind, dtype=torch.float64)
    bank = AdapterBank(base.model)
    options: dict[str, Any] = {"r": 5, "rank_pattern": {"c_proj|q_proj": 3}, "init_lora_weights": "pissa"}
    adapter = init_adapter(bank, LoraConfig(**options, use_dora=dora), seed=0)
    plain = tiny_model(kind, attention="eager", dtype=torch.float64)(IDS).logits
    for step in range(2):
        folder = write_adapter(adapter, bank, tmp_path / str(step))
        config = json.loads((folder / CONFIG_FILE).read_text())
        assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (10, 10, True)
        theirs = logits_of_peft(kind, folder)
        torch.testing.assert_close(our_logits(base, bank, read_adapter(folder, bank)), theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(our_logits(base, bank, adapter), theirs, rtol=1e-5, atol=1e-5)  # A and B in fp64
        assert (float((theirs - plain).abs().max()) > 0.1) == bool(step)
        for b in adapter.b.values():
            b.mul_(1.2)
        adapter.norm.clear()


def test_config_is_what_peft_and_vllm_read(tmp_path: Path) -> None:
    bank = AdaptableModules(tiny_model("llama"))
    folder = write_adapter(
        trained(bank, LoraConfig(r=4, lora_alpha=32, use_rslora=True, lora_dropout=0.1)), bank, tmp_path
    )
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert (config["inference_mode"], config["bias"], config["peft_type"]) == (True, "none", "LORA")
    assert (config["rank_pattern"], config["alpha_pattern"], config["modules_to_save"]) == ({}, {}, None)
    assert not config["fan_in_fan_out"]
    peft.LoraConfig.from_pretrained(str(folder))
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        keys = set(tensors.keys())
    assert keys == {f"base_model.model.{name}.lora_{part}.weight" for name in bank.linears for part in "AB"}


def test_gpt2_says_fan_in_fan_out_and_keeps_pefts_shapes(tmp_path: Path) -> None:
    bank = AdaptableModules(tiny_model("gpt2"))
    folder = write_adapter(trained(bank, LoraConfig(r=4)), bank, tmp_path)
    assert json.loads((folder / CONFIG_FILE).read_text())["fan_in_fan_out"]
    tensors = load_file(folder / WEIGHTS_FILE)
    assert tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape == (4, 64)
    assert tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].shape == (192, 4)


def test_targets_of_a_few_layers_are_full_names(tmp_path: Path) -> None:
    bank = AdaptableModules(tiny_model("llama"))
    folder = write_adapter(trained(bank, LoraConfig(target_modules=["layers.1.self_attn.v_proj"])), bank, tmp_path)
    assert json.loads((folder / CONFIG_FILE).read_text())["target_modules"] == ["model.layers.1.self_attn.v_proj"]


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    bank = AdaptableModules(tiny_model("llama"))
    adapter = trained(bank, LoraConfig(r=4))
    files = adapter_files(adapter, bank, "tiny")
    backwards = replace(adapter, a=dict(reversed(adapter.a.items())), b=dict(reversed(adapter.b.items())))
    assert adapter_files(backwards, bank, "tiny") == files
    assert adapter_files(trained(bank, LoraConfig(r=4)), AdaptableModules(tiny_model("llama")), "tiny") == files
    assert adapter_files(trained(bank, LoraConfig(r=4), seed=2), bank, "tiny")[WEIGHTS_FILE] != files[WEIGHTS_FILE]
    other_scale = trained(bank, LoraConfig(r=4, lora_alpha=5))
    assert adapter_files(other_scale, bank, "tiny")[WEIGHTS_FILE] != files[WEIGHTS_FILE]
    published_again = read_adapter(write_adapter(adapter, bank, tmp_path), bank)
    assert adapter_files(published_again, bank, "tiny") == files


# --- damage ----------------------------------------------------------------------------------------------------------

Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
Tensors = dict[str, Tensor]


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG_FILE).read_text())
        for name, value in fields.items():
            if value == "absent":
                del config[name]
            else:
                config[name] = value
        (folder / CONFIG_FILE).write_text(json.dumps(config))

    return edit


def edit_weights(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})

    return edit


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[: len(content) // 2])


def without_layer(tensors: Tensors) -> None:
    for key in [key for key in tensors if "layers.1.mlp.up_proj" in key]:
        del tensors[key]


def renamed(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.0.self_attn.query.lora_A.weight"] = tensors.pop(Q_A)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda folder: (folder / CONFIG_FILE).unlink(), "not a readable PEFT adapter"),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), "not a readable PEFT adapter"),
    "pickled weights": (lambda folder: torch.save({}, folder / WEIGHTS_FILE), "not a readable PEFT adapter"),
    "truncated weights": (truncated, "not a readable PEFT adapter"),
    "broken config": (lambda folder: (folder / CONFIG_FILE).write_text("{"), "not a readable PEFT adapter"),
    "config is a list": (lambda folder: (folder / CONFIG_FILE).write_text("[]"), "adapter_config.json does not fit"),
    "no r": (edit_config(r="absent"), "r: Field required"),
    "r is zero": (edit_config(r=0), "r: Input should be greater"),
    "no alpha": (edit_config(lora_alpha="absent"), "lora_alpha: Field required"),
    "no targets": (edit_config(target_modules="absent"), "target_modules: Field required"),
    "another method": (edit_config(peft_type="LOHA"), "peft_type: Input should be 'LORA'"),
    "other r": (edit_config(r=8), r"does not fit r=8"),
    "biases": (edit_config(bias="lora_only"), "bias: Input should be 'none'"),
    "dora without m": (edit_config(use_dora=True), "q_proj has no lora_magnitude_vector"),
    "whole modules": (edit_config(modules_to_save=["lm_head"]), "modules_to_save is set"),
    "a layer too many": (edit_config(layers_to_transform=[0, 1], target_modules=["v_proj"]), "layers.1.* is a target"),
    "named in full": (edit_config(layers_to_transform=[1], target_modules=["model.layers.0.self_attn.v_proj"]),
     "layers.0.self_attn.v_proj is a target without"),
    "an expression": (edit_config(layers_to_transform=1, target_modules=".*v_proj"), "layers.0.* is a target"),
    "layers by another name": (edit_config(layers_pattern="layers"), "layers_pattern is set"),
    "excluded": (edit_config(exclude_modules=["q_proj"]), "exclude_modules is set"),
    "tokens": (edit_config(trainable_token_indices=[1]), "trainable_token_indices is set"),
    "another rank": (edit_config(rank_pattern={"q_proj": 8}), "q_proj.lora_A.weight has .* does not fit r=8, 64 -> 64"),
    "no rank": (edit_config(rank_pattern={"q_proj": 0}), "rank_pattern.q_proj: Input should be greater"),
    "no number": (edit_config(alpha_pattern={"q_proj": "x"}), "alpha_pattern.q_proj: Input should be a valid number"),
    "no expression": (edit_config(alpha_pattern={"(": 2}), "alpha_pattern: .* no regular expression"),
    "changed base": (edit_config(init_lora_weights="pissa"), "init_lora_weights is pissa"),
    "more targets": (edit_config(target_modules="all-linear"), "k_proj is a target without weights"),
    "a target of another family": (edit_config(target_modules=["c_attn", "q_proj", "k_proj"]),
     "k_proj is a target without"),
    "a layer is gone": (edit_weights(without_layer), "model.layers.1.mlp.up_proj is a target without weights"),
    "A is gone": (edit_weights(lambda tensors: tensors.pop(Q_A)), "q_proj has only one of lora_A and lora_B"),
    "B is gone": (edit_weights(lambda tensors: tensors.pop(Q_B)), "q_proj has only one of lora_A and lora_B"),
    "renamed": (edit_weights(renamed), "query.lora_A.weight belongs to no linear"),
    "head": (edit_weights(lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4,
     64)})), "lm_head has only one of"),
    "magnitudes": (edit_weights(lambda tensors: tensors.update({Q_A.replace("lora_A.weight",
     "lora_magnitude_vector"): torch.ones(64)})), "q_proj has a lora_magnitude_vector, which only use_dora"),
    "no prefix": (edit_weights(lambda tensors: tensors.update({"x" + Q_A: tensors.pop(Q_A)})), "belongs to no linear"),
    "transposed": (edit_weights(lambda tensors: tensors.update({Q_B: tensors[Q_B].t().contiguous()})),
     r"has shape \[4, 64\]"),
    "integers": (edit_weights(lambda tensors: tensors.update({Q_A: tensors[Q_A].int()})),
     "not a floating-point tensor"),
    "empty": (edit_weights(lambda tensors: tensors.clear()), "it holds no weights"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_adapter_is_refused(damage: str, tmp_path: Path) -> None:
    bank = AdaptableModules(tiny_model("llama"))
    folder = write_adapter(
        trained(bank, LoraConfig(r=4, target_modules=["q_proj", "up_proj"])), bank, tmp_path / "triage"
    )
    read_adapter(folder, bank)
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(AdapterFormatError, match=message) as caught:
        read_adapter(folder, bank)
    assert str(caught.value).startswith("triage: ")


M = Q_A.replace("lora_A.weight", "lora_magnitude_vector")
DORA_DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "not said": (edit_config(use_dora=False), "q_proj has a lora_magnitude_vector, which only use_dora"),
    "one is gone": (edit_weights(lambda tensors: tensors.pop(M)), "layers.0.self_attn.q_proj has no lora_magnitude"),
    "alone": (
        edit_weights(lambda tensors: tensors.update({M.replace("q_proj", "v_proj"): torch.ones(32)})),
        "v_proj has a lora_magnitude_vector, which only use_dora and a lora_A",
    ),
    "a matrix": (edit_weights(lambda tensors: tensors.update({M: torch.ones(64, 1)})), r"has shape \[64, 1\]"),
    "another head": (
        edit_weights(
            lambda tensors: tensors.update({"base_model.model.lm_head.base_layer.weight": torch.ones(VOCABULARY, 64)})
        ),
        "lm_head.base_layer.weight is another weight than this base model has",
    ),
    "a head that is none": (
        edit_weights(lambda tensors: tensors.update({"base_model.model.head.base_layer.weight": torch.ones(2, 2)})),
        "head.base_layer.weight belongs to no linear",
    ),
}


@pytest.mark.parametrize("damage", DORA_DAMAGES)
def test_damaged_dora_adapter_is_refused(damage: str, tmp_path: Path) -> None:
    bank = AdaptableModules(tiny_model("llama"))
    targets = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], use_dora=True)
    folder = write_adapter(trained(bank, targets), bank, tmp_path / "triage")
    read_adapter(folder, bank)
    change, message = DORA_DAMAGES[damage]
    change(folder)
    with pytest.raises(AdapterFormatError, match=message):
        read_adapter(folder, bank)


def test_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    bank = AdaptableModules(tiny_model("llama"))
    folder = write_adapter(trained(bank, LoraConfig(r=4)), bank, tmp_path)
    with pytest.raises(AdapterFormatError, match="does not fit r=4, 50 -> 75"):
        read_adapter(folder, AdaptableModules(tiny_model("llama-odd")))
    with pytest.raises(AdapterFormatError, match="belongs to no linear"):
        read_adapter(folder, AdaptableModules(tiny_model("gpt2")))


def test_all_damage_is_told_at_once(tmp_path: Path) -> None:
    bank = AdaptableModules(tiny_model("llama"))
    folder = write_adapter(trained(bank, LoraConfig(r=4)), bank, tmp_path)
    edit_config(lora_bias=True, rank_pattern={"k_proj": 2})(folder)
    edit_weights(renamed)(folder)
    with pytest.raises(AdapterFormatError) as caught:
        read_adapter(folder, bank)
    for part in ("lora_bias is set", "does not fit r=2", "query", "q_proj has only one"):
        assert part in str(caught.value)
