"""Every option that a user can set changes what comes out. A new field has no entry here, and fails."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lora_core
from jobs.spec import JobSpec
from lora_core import LoraConfig, TrainConfig, TrainJob
from lora_core.models.base import load_base
from lora_core.training.engine import TrainEngine
from lora_core.training.optimizer import Evaluation
from tests.support.tiny_models import save_tiny_model

CPU = torch.device("cpu")

LORA_OPTIONS: dict[str, Any] = {
    "r": 5,
    "lora_alpha": 9.0,
    "target_modules": ["q_proj"],
    "lora_dropout": 0.2,
    "use_rslora": True,
    "rank_pattern": {"down_proj": 2},
    "alpha_pattern": {"down_proj": 16.0},
    "layers_to_transform": [1],
    "init_lora_weights": "gaussian",
    "use_dora": True,
}
# Field -> (its value, what else is set with it and without it).
TRAIN_OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "epochs": (3, {}),
    "batch_size": (3, {}),
    "learning_rate": (1e-3, {}),
    "lr_scheduler": ("constant", {}),
    "warmup_ratio": (0.5, {}),
    "weight_decay": (0.1, {}),
    "loraplus_lr_ratio": (4.0, {}),
    "max_grad_norm": (None, {"max_grad_norm": 0.01}),
    "max_seq_len": (14, {}),
    "seed": (3, {}),
    "train_on": ("all", {}),
    "overlong": ("drop", {"max_seq_len": 14}),
    "eval_steps": (1, {}),
    "load_best_model_at_end": (True, {"epochs": 6, "learning_rate": 0.05, "lr_scheduler": "constant", "eval_steps": 1}),
    "early_stopping_patience": (
        1,
        {"epochs": 6, "learning_rate": 0.05, "lr_scheduler": "constant", "load_best_model_at_end": False},
    ),
}
# Of a job spec: what is of a job beside its `lora` and `train`, which are above.
JOB_OPTIONS = {"base_model", "dataset", "validation", "init_adapter", "precision"}
NOT_OF_THE_ENGINE = {
    "adapter": "a name; published versions have it (test_service.py)",
    "num_workers": "ranks, which are to change nothing (test_trainer.py)",
    "priority": "who goes first (test_policy.py)",
}
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8.0}
TRAIN: dict[str, Any] = {
    "epochs": 2, "batch_size": 4, "learning_rate": 5e-3, "warmup_ratio": 0.0, "max_seq_len": 64,
}  # fmt: skip


class Came(NamedTuple):
    """All that training leaves, and where."""

    weights: dict[str, Tensor]
    steps: int
    losses: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    folder: Path

    def differs(self, other: Came) -> bool:
        """In numbers, or in how many there are of them."""
        return (
            (self.steps, self.losses, self.evaluations) != (other.steps, other.losses, other.evaluations)
            or self.weights.keys() != other.weights.keys()
            or any(not torch.equal(weight, other.weights[name]) for name, weight in self.weights.items())
        )


@dataclass(frozen=True)
class Place:
    """Where a case trains, and what it trains on if it does not say."""

    folder: Path

    def rows(self, name: str, numbers: range) -> Path:
        path = self.folder / f"{name}.jsonl"
        lines = [
            json.dumps({"prompt": f"{n} + {n} = ", "completion": "it is " * (n % 3) + str(2 * n)}) for n in numbers
        ]
        path.write_text("\n".join(lines))
        return path

    def train(
        self,
        lora: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        *,
        seed_of_base: int = 0,
        precision: Any = "fp32",
        numbers: range = range(8, 18),
        **job: Any,
    ) -> Came:
        """Through the library; every outcome is seen on its way."""
        source = self.folder / f"base-{seed_of_base}"
        if not source.is_dir():
            save_tiny_model("llama", source, seed_of_base)
        base = load_base(str(source), precision=precision, cache_dir=self.folder / "cache", device=CPU)
        wanted = TrainJob(
            "job",
            self.rows("rows", numbers),
            LoraConfig(**LORA | (lora or {})),
            TrainConfig(**TRAIN | (train or {})),
            **{"validation": self.rows("held_out", range(30, 34))} | job,
        )
        losses, evaluations = [], []
        with pytest.MonkeyPatch.context() as patch:
            micro_batch = TrainEngine.micro_batch

            def watched(engine: TrainEngine) -> Any:
                outcomes = micro_batch(engine)
                for outcome in outcomes.values():
                    assert not isinstance(outcome, Exception), outcome
                    losses.append(outcome.loss)
                    evaluations.extend([] if outcome.evaluation is None else [outcome.evaluation])
                return outcomes

            patch.setattr(TrainEngine, "micro_batch", watched)
            result = lora_core.train(base, [wanted], mkdtemp(dir=self.folder))["job"]
        assert result.folder is not None and result.error is None
        weights = load_file(result.folder / "adapter_model.safetensors")
        return Came(weights, result.steps, tuple(losses), tuple(evaluations), result.folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("options"))


@pytest.fixture(scope="module")
def default(place: Place) -> Came:
    """Without options, twice the same."""
    came = place.train()
    assert not came.differs(place.train())
    return came


def test_every_field_has_an_entry_and_every_entry_a_field() -> None:
    assert set(LORA_OPTIONS) == set(LoraConfig.model_fields)
    assert set(TRAIN_OPTIONS) == set(TrainConfig.model_fields)
    assert JOB_OPTIONS | NOT_OF_THE_ENGINE.keys() | {"lora", "train"} == set(JobSpec.model_fields)
    assert {field.name for field in fields(TrainJob)} == {
        "name",
        "dataset",
        "validation",
        "init_adapter",
        "lora",
        "train",
    }


@pytest.mark.parametrize("option", LORA_OPTIONS)
def test_every_option_of_an_adapter_changes_what_comes_out(option: str, place: Place, default: Came) -> None:
    came = place.train(lora={option: LORA_OPTIONS[option]})
    assert came.differs(default)
    assert came.losses[-1] != default.losses[-1]


@pytest.mark.parametrize("option", TRAIN_OPTIONS)
def test_every_option_of_training_changes_what_comes_out(option: str, place: Place, default: Came) -> None:
    value, more = TRAIN_OPTIONS[option]
    without = place.train(train=more) if more else default
    assert place.train(train=more | {option: value}).differs(without)


def test_no_two_schedules_and_no_two_starts_are_alike(place: Place, default: Came) -> None:
    """An option of a few words changes the result with each of them."""
    schedules = [place.train(train={"lr_scheduler": name}) for name in ("constant", "linear")]
    starts = [place.train(lora={"init_lora_weights": name}) for name in ("gaussian", "pissa")]
    for came in (schedules, starts):
        assert len({one.losses for one in (default, *came)}) == 3


@pytest.mark.parametrize("option", sorted(JOB_OPTIONS))
def test_every_option_of_a_job_changes_what_comes_out(option: str, place: Place, default: Came) -> None:
    changed: dict[str, dict[str, Any]] = {
        "base_model": {"seed_of_base": 1},
        "dataset": {"numbers": range(9, 19)},
        "validation": {"validation": 0.3},
        "init_adapter": {"init_adapter": default.folder},
        "precision": {"precision": "bf16"},
    }
    assert place.train(**changed[option]).differs(default)
