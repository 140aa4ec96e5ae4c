"""Jobs of which no two are alike, for what must hold whatever a job is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lora_core.adapters.targets import AdaptableModules
from lora_core.training.job import EngineJob
from tests.support.models import documents, job, random_adapter, tiny_model


def unlike_jobs(kind: str, path: str, steps: int) -> dict[str, EngineJob]:
    """No two alike in rank, targets, lengths, batches, schedule or dropout. Each has two steps an epoch, and `steps` in
    all, but for "idle".
    """
    some = ["c_attn", "mlp.c_proj"] if kind == "gpt2" else ["k_proj", "gate_proj"]
    few, part = {"r": 3, "lora_alpha": 7}, {"target_modules": some}  # a scale that is no power of two rounds

    def one(name: str, seed: int, lora: dict[str, Any], *, epochs: int = steps // 2, **train: Any) -> EngineJob:
        examples = documents(4 + seed, seed, 3, 12 + seed)
        options = {"batch_size": (len(examples) + 1) // 2, "learning_rate": 2e-3} | train
        return job(name, examples=examples, epochs=epochs, lora=lora, seed=seed, **options)

    found = [
        one("ranks", 0, {"r": 1, "rank_pattern": {some[-1]: 7}}, validation=documents(5, 50), eval_steps=4),
        one("wide", 7, {"r": 64, "lora_dropout": 0.3}, lr_scheduler="linear", weight_decay=0.2),
        one("rs", 1, {"r": 8, "use_rslora": True, "init_lora_weights": "gaussian"}, warmup_ratio=0.3),
        one("some", 6, few | part | {"alpha_pattern": {some[-1]: 20}, "layers_to_transform": [1]}, max_grad_norm=None),
        one("dora", 2, few | {"use_dora": True}, loraplus_lr_ratio=3.0),
        one("start", 3, {"r": 4}, lr_scheduler="constant"),
        one("late", 4, {"r": 32, "lora_dropout": 0.05}, max_grad_norm=0.05),
        one("early", 5, {"r": 2}, weight_decay=0.1),
        one("idle", 0, {"r": 5}, epochs=2),
        one("pairs", 8, few | {"lora_dropout": 0.2}, validation=documents(4, 52), method="dpo", batch_size=3),
        one("pairs from start", 4, {"r": 4}, validation=documents(2, 53), method="dpo", batch_size=2, beta=0.5),
        one("poison", 3, few | {"use_dora": True}, validation=documents(3, 51), eval_steps=2),
    ]
    start = random_adapter(AdaptableModules(tiny_model(kind)), 5)
    found = [replace(wanted, init_adapter=start) if "start" in wanted.name else wanted for wanted in found]
    if path == "hooks":
        found.append(one("pissa", 8, {"r": 6, "init_lora_weights": "pissa", "lora_dropout": 0.2}))
    if path == "hooks" and kind != "gpt2":
        found.append(one("head", 9, few | {"target_modules": ["lm_head", *some], "lora_dropout": 0.1}))
        found.append(one("head with dora", 2, few | {"target_modules": ["lm_head", "down_proj"], "use_dora": True}))
    return {wanted.name: wanted for wanted in found}
