"""What a user chooses about an adapter and its training. Names are PEFT's, so that a config reads the same here, on
disk and in PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Rank = Annotated[int, Field(ge=1, le=1024)]
Alpha = Annotated[float, Field(gt=0)]

Method = Literal["supervised", "dpo"]

FINEST_DROPOUT = 2**-16
"""Masks are drawn from 16 bits a feature."""

DPO_LEARNING_RATE = 2e-5
"""Ten to twenty times what suits DPO on all weights, as the other default is of supervised training."""

DPO_BETA = 0.1
"""That of the paper and of TRL."""


def pattern_key(pattern: Mapping[str, object], module: str) -> str | None:
    """Return the first key of a rank or alpha pattern that is this module's: a regular expression that matches its full
    name or its last parts (PEFT's `get_pattern_key`).
    """
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)


class RanksAndScales(BaseModel):
    """The part of PEFT's config that says which rank and scale each module has.

    `rank_pattern` and `alpha_pattern` give some modules another r and lora_alpha: a key is a regular expression that
    matches a module's full name or its last parts, and the first that does counts.
    """

    r: int = Field(ge=1)
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _keys_are_expressions(cls, pattern: dict[str, float]) -> dict[str, float]:
        for key in pattern:
            try:
                re.compile(key)
                pattern_key({key: None}, "")  # flags such as (?i) stand only at the start of a whole expression
            except re.error as error:
                raise ValueError(f"has the key {key!r}, which is no regular expression ({error})") from error
        return pattern

    def rank_of(self, module: str) -> int:
        """Return the rank of this module's A and B."""
        key = pattern_key(self.rank_pattern, module)
        return self.r if key is None else self.rank_pattern[key]

    def scale_of(self, module: str) -> float:
        """Return `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora` (Kalajdzievski 2023,
        https://arxiv.org/abs/2312.03732), with this module's alpha and rank.
        """
        key, rank = pattern_key(self.alpha_pattern, module), self.rank_of(module)
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        return alpha / (rank**0.5 if self.use_rslora else rank)


class LoraConfig(RanksAndScales):
    """Shape and scale of one adapter (Hu et al. 2021, https://arxiv.org/abs/2106.09685): `W x + scale * B A x`.

    `target_modules` is `"all-linear"` (every linear but the output head), a list of module names matched as PEFT does
    (equal to the full name or to its last parts), or one regular expression that must match the full name; an
    output head that does not share its weight with the embedding is adapted where it is named. Of the modules that it
    selects, `layers_to_transform` keeps those in layers of these indices.

    `init_lora_weights`: True is uniform A and zero B, "gaussian" is normal A of deviation 1/r and zero B, and "pissa"
    trains the r largest singular vectors of each weight (Meng et al. 2024, https://arxiv.org/abs/2404.02948).
    `use_dora` trains a length of every row of the weights too (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    r: Rank = 16
    lora_alpha: Alpha = 32.0
    target_modules: str | list[str] = Field(default="all-linear", min_length=1)
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] = Field(default_factory=dict)
    layers_to_transform: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    init_lora_weights: Literal[True, "gaussian", "pissa"] = True
    use_dora: bool = False

    @field_validator("lora_dropout")
    @classmethod
    def _dropout_drops_something(cls, lora_dropout: float) -> float:
        if 0 < lora_dropout < FINEST_DROPOUT:
            raise ValueError("must be 0 or at least 1/65,536 (1.6e-05): less would drop nothing")
        return lora_dropout

    @field_validator("use_dora")
    @classmethod
    def _dora_is_without_dropout(cls, use_dora: bool, info: ValidationInfo) -> bool:
        if use_dora and info.data.get("lora_dropout", 0) > 0:
            raise ValueError(
                "needs lora_dropout to be 0: with dropout PEFT computes another formula, in which the frozen weights'"
                " product is dropped too"
            )
        return use_dora


class TrainConfig(BaseModel):
    """How one adapter is trained. Every job has its own; nothing here is shared with a neighbour in the same session.

    `method` "dpo" is direct preference optimisation (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290) of pairs
    of answers; `beta` (null: 0.1) is how strongly it holds to what the job started from. `learning_rate` is 2e-5 there
    where nobody says another, and a pair is one example.

    `batch_size` counts examples of one optimizer step over all ranks. `warmup_ratio` is the share of all steps in which
    the learning rate grows linearly from zero. `loraplus_lr_ratio` times the learning rate is that of B (LoRA+, Hayou
    et al. 2024, https://arxiv.org/abs/2402.12354). A gradient longer than `max_grad_norm` is clipped (null: never).
    `train_on` says which tokens are labels, `overlong` what becomes of rows longer than `max_seq_len` tokens.

    Where there are validation rows, they are evaluated before the first step, every `eval_steps` optimizer steps (null:
    after each epoch) and after the last. `load_best_model_at_end` publishes the weights of the lowest validation loss
    instead of the last ones (null: where `early_stopping_patience` is given). `early_stopping_patience` ends training
    after that many evaluations in a row that are no better than the best.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Method = "supervised"
    beta: float | None = Field(default=None, gt=0)
    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0.0, le=1.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    loraplus_lr_ratio: float = Field(default=1.0, gt=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    max_seq_len: int = Field(default=1024, ge=2)
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    train_on: Literal["completion", "all"] = "completion"
    overlong: Literal["truncate", "drop"] = "truncate"
    eval_steps: int | None = Field(default=None, ge=1)
    load_best_model_at_end: bool | None = None
    early_stopping_patience: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _dpo_learns_slowly(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("method") == "dpo":
            return {"learning_rate": DPO_LEARNING_RATE} | given
        return given

    @field_validator("beta")
    @classmethod
    def _beta_is_of_dpo(cls, beta: float | None, info: ValidationInfo) -> float | None:
        if beta is not None and info.data.get("method", "dpo") != "dpo":
            raise ValueError("is of method dpo alone: set method to dpo, or leave beta out")
        return beta

    @field_validator("train_on")
    @classmethod
    def _dpo_compares_answers(cls, train_on: str, info: ValidationInfo) -> str:
        if train_on == "all" and info.data.get("method") == "dpo":
            raise ValueError("must be completion with method dpo: both answers of a pair have the same prompt")
        return train_on

    @property
    def is_preference(self) -> bool:
        """Whether examples are pairs of answers."""
        return self.method == "dpo"

    @property
    def keeps_best(self) -> bool:
        """Whether the adapter that comes out is the one of the lowest validation loss."""
        if self.load_best_model_at_end is None:
            return self.early_stopping_patience is not None
        return self.load_best_model_at_end

    @property
    def needs_validation(self) -> list[str]:
        """The options in use that mean nothing without validation rows."""
        options = ("eval_steps", "load_best_model_at_end", "early_stopping_patience")
        return [option for option in options if getattr(self, option)]
