"""Which path through a base its jobs take, and what each path refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_core.adapters.init import LoraConfigError
from lora_core.adapters.targets import AdaptableModules
from lora_core.config import LoraConfig, TrainConfig
from lora_core.library import TrainJob, train
from lora_core.models.base import BaseModel
from lora_core.models.forward import ForwardPath, forward_path, open_forward
from lora_core.models.llama.decoder import Decoder
from lora_core.training.engine import TrainEngine
from tests.support.models import job, tiny_base, tiny_model
from tests.support.tiny_models import load_on_cpu, save_tiny_model

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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("base")
    return load_on_cpu(save_tiny_model("llama", folder / "model"), folder / "cache")


def test_jobs_of_both_paths_are_each_as_if_alone(base: BaseModel, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} and", "completion": f" {n + 1}"}) + "\n" for n in range(9)))
    short = TrainConfig(epochs=2, batch_size=3)
    jobs = [TrainJob(name, rows, LoraConfig(r=4, **lora), short) for name, lora in (("plain", {}), ("pissa", PISSA))]
    together = train(base, jobs, tmp_path / "together")
    assert {name: result.path for name, result in together.items()} == {"plain": "llama", "pissa": "hooks"}
    for one in jobs:
        alone = train(base, [one], tmp_path / "alone")[one.name]
        folders = [result.folder for result in (alone, together[one.name])]
        assert alone.steps == 6 and None not in folders
        weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders if folder is not None]
        assert weights[0] == weights[1]
