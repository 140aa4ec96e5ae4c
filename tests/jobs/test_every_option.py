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
from lora_core.library import TrainResult
from lora_core.models.base import load_base
from lora_core.training.engine import TrainEngine
from lora_core.training.optimizer import Evaluation, StepOutcome
from tests.support.models import outcome_of
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
    "method": ("dpo", {}),
    "beta": (0.5, {"method": "dpo"}),
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
    "time_limit": "for how long (test_time_limits.py)",
    "sweep": "which options (test_sweep.py)",
    "depends_on": "when it starts (test_dependencies.py)",
    "metadata": "how a job is found again (test_job_commands.py)",
}
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8.0}
TRAIN: dict[str, Any] = {
    "epochs": 2, "batch_size": 4, "learning_rate": 5e-3, "warmup_ratio": 0.0, "max_seq_len": 64,
}  # fmt: skip


class Trained(NamedTuple):
    """All that training leaves, and where."""

    weights: dict[str, Tensor]
    steps: int
    losses: tuple[float, ...]
    evaluations: tuple[Evaluation, ...]
    folder: Path

    def differs(self, other: Trained) -> bool:
        """In numbers, or in how many there are of them."""
        return (
            (self.steps, self.losses, self.evaluations) != (other.steps, other.losses, other.evaluations)
            or self.weights.keys() != other.weights.keys()
            or any(not torch.equal(weight, other.weights[name]) for name, weight in self.weights.items())
        )


@dataclass(frozen=True)
class Place:
    """Where jobs train, and what they train on if they do not say."""

    folder: Path

    def rows(self, name: str, numbers: range) -> Path:
        path = self.folder / f"{name}.jsonl"
        rows = [{"prompt": f"{n} + {n} = ", "completion": "it is " * (n % 3) + str(2 * n)} for n in numbers]
        pairs = [{"chosen": row["completion"], "rejected": str(n)} for n, row in zip(numbers, rows, strict=True)]
        path.write_text("\n".join(json.dumps(row | pair) for row, pair in zip(rows, pairs, strict=True)))
        return path

    def job(
        self,
        name: str,
        lora: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        numbers: range = range(8, 18),
        **more: Any,
    ) -> TrainJob:
        given = {"validation": self.rows("held_out", range(30, 34))} | more
        configs = LoraConfig(**LORA | (lora or {})), TrainConfig(**TRAIN | (train or {}))
        return TrainJob(name, self.rows(f"{numbers}", numbers), *configs, **given)

    def train(self, *jobs: TrainJob, seed_of_base: int = 0, precision: Any = "fp32") -> dict[str, Trained]:
        """Through the library, together; every outcome is seen on its way."""
        source = self.folder / f"base-{seed_of_base}"
        if not source.is_dir():
            save_tiny_model("llama", source, seed_of_base, num_hidden_layers=2)
        base = load_base(str(source), precision=precision, cache_dir=self.folder / "cache", device=CPU)
        outcomes: dict[str, list[StepOutcome]] = {job.name: [] for job in jobs}
        with pytest.MonkeyPatch.context() as patch:
            micro_batch = TrainEngine.micro_batch

            def watched(engine: TrainEngine) -> Any:
                stepped = micro_batch(engine)
                for name, outcome in stepped.items():
                    outcomes[name].append(outcome_of(outcome))
                return stepped

            patch.setattr(TrainEngine, "micro_batch", watched)
            results = lora_core.train(base, jobs, mkdtemp(dir=self.folder))
        return {name: self._trained(results[name], outcomes[name]) for name in results}

    def _trained(self, result: TrainResult, outcomes: list[StepOutcome]) -> Trained:
        assert result.folder is not None and result.error is None
        evaluations = tuple(outcome.evaluation for outcome in outcomes if outcome.evaluation is not None)
        weights = load_file(result.folder / "adapter_model.safetensors")
        return Trained(weights, result.steps, tuple(outcome.loss for outcome in outcomes), evaluations, result.folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("options"))


@pytest.fixture(scope="module")
def trained(place: Place) -> dict[str, Trained]:
    """A job for each option, "default" and "again" without any: all at once, each as if alone."""
    jobs = [place.job("default"), place.job("again")]
    for option, value in LORA_OPTIONS.items():
        jobs.append(place.job(option, lora={option: value}))
    jobs.append(place.job("linear", train={"lr_scheduler": "linear"}))
    jobs.append(place.job("pissa", lora={"init_lora_weights": "pissa"}))
    for option, (value, more) in TRAIN_OPTIONS.items():
        jobs.append(place.job(option, train=more | {option: value}))
        if more:
            jobs.append(place.job(f"without-{option}", train=more))
    return place.train(*jobs)


def test_every_field_has_an_entry_and_every_entry_a_field() -> None:
    assert set(LORA_OPTIONS) == set(LoraConfig.model_fields)
    assert set(TRAIN_OPTIONS) == set(TrainConfig.model_fields)
    assert JOB_OPTIONS | NOT_OF_THE_ENGINE.keys() | {"lora", "train"} == set(JobSpec.model_fields)
    of_a_job = {"name", "dataset", "validation", "init_adapter", "lora", "train"}
    assert {field.name for field in fields(TrainJob)} == of_a_job


def test_without_options_the_same_comes_out_twice(trained: dict[str, Trained]) -> None:
    assert not trained["default"].differs(trained["again"])


@pytest.mark.parametrize("option", LORA_OPTIONS)
def test_every_option_of_an_adapter_changes_what_comes_out(option: str, trained: dict[str, Trained]) -> None:
    assert trained[option].differs(trained["default"])
    assert trained[option].losses[-1] != trained["default"].losses[-1]


@pytest.mark.parametrize("option", TRAIN_OPTIONS)
def test_every_option_of_training_changes_what_comes_out(option: str, trained: dict[str, Trained]) -> None:
    assert trained[option].differs(trained[f"without-{option}" if TRAIN_OPTIONS[option][1] else "default"])


@pytest.mark.parametrize("names", [("default", "lr_scheduler", "linear"), ("default", "init_lora_weights", "pissa")])
def test_no_two_schedules_and_no_two_starts_are_alike(names: tuple[str, ...], trained: dict[str, Trained]) -> None:
    """An option of a few words changes the result with each of them."""
    assert len({trained[name].losses for name in names}) == 3


@pytest.mark.parametrize("option", sorted(JOB_OPTIONS))
def test_every_option_of_a_job_changes_what_comes_out(option: str, place: Place, trained: dict[str, Trained]) -> None:
    changed: dict[str, dict[str, Any]] = {
        "dataset": {"numbers": range(9, 19)},
        "validation": {"validation": 0.3},
        "init_adapter": {"init_adapter": trained["default"].folder},
    }
    base: dict[str, dict[str, Any]] = {"base_model": {"seed_of_base": 1}, "precision": {"precision": "bf16"}}
    (found,) = place.train(place.job("job", **changed.get(option, {})), **base.get(option, {})).values()
    assert found.differs(trained["default"])
