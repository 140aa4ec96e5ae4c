"""What a user chooses about an adapter and its training. Names are PEFT's, so that a config reads the same here, on
disk and in PEFT.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class LoraConfig(BaseModel):
    """Shape and scale of one adapter (Hu et al. 2021, https://arxiv.org/abs/2106.09685): `W x + scale * B A x`.

    `target_modules` is `"all-linear"` (every linear but the output head), a list of module names matched as PEFT does
    (equal to the full name or to its last parts), or one regular expression that must match the full name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    r: int = Field(default=16, ge=1, le=1024)
    lora_alpha: float = Field(default=32.0, gt=0)
    target_modules: str | list[str] = Field(default="all-linear", min_length=1)
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    use_rslora: bool = False

    def rank_of(self, module: str) -> int:
        """The rank of this module's A and B."""
        return self.r

    def scale_of(self, module: str) -> float:
        """`lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora` (Kalajdzievski 2023,
        https://arxiv.org/abs/2312.03732), with this module's rank.
        """
        rank = self.rank_of(module)
        return self.lora_alpha / (rank**0.5 if self.use_rslora else rank)


class TrainConfig(BaseModel):
    """How one adapter is trained. Every job has its own; nothing here is shared with a neighbour in the same session.

    `batch_size` counts examples of one optimizer step over all ranks. `warmup_ratio` is the share of all steps in which
    the learning rate grows linearly from zero. `train_on` says which tokens are labels, `overlong` what becomes of rows
    longer than `max_seq_len` tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0.0, le=1.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_seq_len: int = Field(default=1024, ge=2)
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    train_on: Literal["completion", "all"] = "completion"
    overlong: Literal["truncate", "drop"] = "truncate"
