"""Which path through a base its jobs take, and what each path refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lora_core.adapters.init import LoraConfigError
from lora_core.adapters.targets import AdaptableModules
from lora_core.config import LoraConfig
from lora_core.models.forward import ForwardPath, forward_path, open_forward
from lora_core.models.llama.decoder import Decoder
from lora_core.training.engine import TrainEngine
from tests.support.models import job, tiny_base, tiny_model

PISSA = {"init_lora_weights": "pissa"}
HEAD = {"target_modules": ["q_proj", "lm_head"]}


@pytest.mark.parametrize(
    ("kind", "lora", "path"),
    [
        ("mistral-dense", {}, "llama"),
        ("mistral-dense", {"use_dora": True}, "llama"),
        ("mistral-dense", PISSA, "hooks"),
        ("mistral-dense", HEAD, "hooks"),
        ("mistral", {}, "hooks"),
        ("gpt2", {}, "hooks"),
    ],
)
def test_the_model_and_the_adapter_say_which_path(kind: str, lora: dict[str, Any], path: ForwardPath) -> None:
    model = tiny_model(kind, intermediate_size=128) if "mistral" in kind else tiny_model(kind)
    modules = AdaptableModules(model.to("meta"))
    assert forward_path(model.config, modules, LoraConfig(**lora), "bf16") == path


@pytest.mark.parametrize(("lora", "option"), [(PISSA, "init_lora_weights"), (HEAD, "target_modules: lm_head")])
def test_what_the_llama_path_cannot_compute_is_refused(lora: dict[str, Any], option: str) -> None:
    """On a quantised base, which has no other, and by an engine whose jobs all take it."""
    base = tiny_base("llama")
    with pytest.raises(LoraConfigError, match=f"^{option} is not possible on a base in nf4: leave it out, or use bf16"):
        forward_path(base.model.config, AdaptableModules(base.model), LoraConfig(**lora), "nf4")
    engine = TrainEngine(replace(base, decoder=Decoder(base.model)))
    with pytest.raises(LoraConfigError, match=f"^{option} needs the path of hooks: train it apart from"):
        engine.add(job(lora=lora))


def test_a_path_that_a_base_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no llama path for it; use hooks"):
        open_forward(tiny_base("gpt2"), "llama")
    with pytest.raises(ValueError, match="in nf4 there is the llama path alone; use bf16"):
        open_forward(replace(tiny_base("llama"), precision="nf4"), "hooks")
