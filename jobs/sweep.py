"""A sweep: the values of options that one job is tried with, side by side, and how many of its trials go on.

    sweep: {learning_rate: [1.0e-4, 3.0e-4, 1.0e-3], r: [8, 32]}

Successive halving (Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943), n trials, K rungs, eta the reduction
factor: a trial of S steps comes to rung k = 1..K after

    ceil(S / eta^(K + 1 - k)) steps, where the max(1, floor(n / eta^k)) of the lowest validation loss go on

and to rung K + 1 at its end, where the best is published. By default K is the number of times until one is left.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails

from lora_core.config import LoraConfig, TrainConfig

MOST_TRIALS = 256


class Sweep(BaseModel):
    """Lists of values, of options of `lora` and `train` that change neither rows nor what their loss is, for every
    combination of which there is a trial: the grid; or `num_samples` of these, drawn by the job's `train.seed`.

    `reduction_factor` is eta, and `rungs` how often trials are compared before their end (null: until one is left,
    0: never, all are trained to their end).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_samples: int | None = Field(default=None, ge=1)
    reduction_factor: int = Field(default=3, ge=2)
    rungs: int | None = Field(default=None, ge=0)

    r: list[int] | None = Field(default=None, min_length=1)
    lora_alpha: list[float] | None = Field(default=None, min_length=1)
    use_rslora: list[bool] | None = Field(default=None, min_length=1)
    target_modules: list[str | list[str]] | None = Field(default=None, min_length=1)
    layers_to_transform: list[list[int] | None] | None = Field(default=None, min_length=1)
    lora_dropout: list[float] | None = Field(default=None, min_length=1)
    init_lora_weights: list[Literal[True, "gaussian", "pissa"]] | None = Field(default=None, min_length=1)
    use_dora: list[bool] | None = Field(default=None, min_length=1)
    epochs: list[int] | None = Field(default=None, min_length=1)
    batch_size: list[int] | None = Field(default=None, min_length=1)
    learning_rate: list[float] | None = Field(default=None, min_length=1)
    lr_scheduler: list[Literal["constant", "linear", "cosine"]] | None = Field(default=None, min_length=1)
    warmup_ratio: list[float] | None = Field(default=None, min_length=1)
    weight_decay: list[float] | None = Field(default=None, min_length=1)
    loraplus_lr_ratio: list[float] | None = Field(default=None, min_length=1)
    max_grad_norm: list[float | None] | None = Field(default=None, min_length=1)
    seed: list[int] | None = Field(default=None, min_length=1)

    @field_validator("*", mode="after")
    @classmethod
    def _values_can_be_tried(cls, values: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        if name not in _CONTROLS and values is not None and (wrong := _problems(name, values)):
            raise ValidationError.from_exception_data("sweep", wrong)
        return values

    @property
    def parameters(self) -> dict[str, list[Any]]:
        """Return the options that differ between trials, with their values."""
        return {name: value for name, value in self if name not in _CONTROLS and value is not None}

    @property
    def grid_size(self) -> int:
        """How many combinations there are."""
        return math.prod(len(values) for values in self.parameters.values())

    def combinations(self, seed: int) -> list[dict[str, Any]]:
        """Return the values of each trial, in the order of the grid, whose last parameter changes fastest."""
        size = self.grid_size
        chosen = set(range(size)) if self.num_samples is None or self.num_samples >= size else set[int]()
        draw = random.Random(seed)
        while len(chosen) < min(size, self.num_samples or size):
            chosen.add(draw.randrange(size))
        return [self._combination(index) for index in sorted(chosen)]

    def _combination(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, values in reversed(self.parameters.items()):
            index, place = divmod(index, len(values))
            found[name] = values[place]
        return {name: found[name] for name in self.parameters}

    def rungs_of(self, trials: int, steps: int) -> int:
        """Return K, for trials of which none has fewer steps: a first rung before the first step decides nothing."""
        count, left = 0, trials
        while left > 1 and self.reduction_factor ** (count + 1) <= steps and count != self.rungs:
            count, left = count + 1, left // self.reduction_factor
        return count

    def step_of(self, rung: int, rungs: int, steps: int) -> int:
        """Return after which of its steps a trial comes to a rung."""
        share: int = self.reduction_factor ** (rungs + 1 - rung)
        return -(-steps // share)

    def left_after(self, rung: int, rungs: int, trials: int) -> int:
        """Return how many trials go on from a rung; from the last one that is published."""
        return 1 if rung > rungs else max(1, trials // self.reduction_factor**rung)

    def most_tokens(self, trials: Sequence[tuple[int, int]]) -> int:
        """Return on about how many tokens all trials together train at most, each given its steps and tokens."""
        rungs, total = self.rungs_of(len(trials), min(steps for steps, _ in trials)), 0.0
        for rung in range(1, rungs + 2):
            going = len(trials) if rung == 1 else self.left_after(rung - 1, rungs, len(trials))
            parts = [
                tokens * (self.step_of(rung, rungs, steps) - (rung > 1) * self.step_of(rung - 1, rungs, steps)) / steps
                for steps, tokens in trials
            ]
            total += sum(sorted(parts, reverse=True)[:going])
        return math.ceil(total)

    def refuse_impossible(self, lora: LoraConfig, train: TrainConfig) -> None:
        """Raise ValueError where there are no trials or too many, or some of what one tries does not go together."""
        if not self.parameters:
            raise ValueError("has no values to try: give lists of some, such as learning_rate: [1.0e-4, 3.0e-4]")
        if (trials := min(self.grid_size, self.num_samples or self.grid_size)) > MOST_TRIALS:
            raise ValueError(f"has {trials:,} trials, and may have {MOST_TRIALS}: give num_samples, or fewer values")
        for chosen in self.combinations(train.seed):
            try:
                tried(lora, chosen)
                tried(train, chosen)
            except ValidationError as error:
                option, reason = error.errors()[0]["loc"][0], error.errors()[0]["ctx"]["error"]
                raise ValueError(f"would try {parameters_text(chosen)}, where {option} {reason}") from None


_CONTROLS = ("num_samples", "reduction_factor", "rungs")
Block = TypeVar("Block", LoraConfig, TrainConfig)


def tried(block: Block, chosen: dict[str, Any]) -> Block:
    """Return a block of options with those of a trial's values that are its own. Raises ValidationError."""
    own = {name: value for name, value in chosen.items() if name in type(block).model_fields}
    return type(block).model_validate(block.model_dump() | own, strict=True)


def parameters_text(chosen: Mapping[str, Any]) -> str:
    """Write the values of a trial on a line, as JSON has them."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in chosen.items())


def value_text(value: Any) -> str:
    """Write a value as JSON has it, but text without quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def _problems(name: str, values: list[Any]) -> list[InitErrorDetails]:
    """Return what is wrong with an option's values by themselves."""
    block = LoraConfig if name in LoraConfig.model_fields else TrainConfig
    found = []
    for index, value in enumerate(values):
        if value in values[:index]:
            twice = ValueError("is there twice: leave one of them out")
            found.append(InitErrorDetails(type="value_error", loc=(index,), input=value, ctx={"error": twice}))
            continue
        try:
            block.model_validate({name: value}, strict=True)
        except ValidationError as error:
            found += [
                InitErrorDetails(type=one["type"], loc=(index,), input=one["input"], ctx=one.get("ctx", {}))
                for one in error.errors()
            ]
    return found
