"""How a request's tokens are chosen: plain values, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

GREEDY_BELOW = 1e-5  # dividing by less overflows fp32 logits


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """`temperature` 0 is greedy; `top_k` 0 and -1, `top_p` 1 and `min_p` 0 leave nothing out; penalties of 0, and of 1
    for repetition, change nothing. Without a `seed` every request draws other numbers.

    Raises:
        ValueError: all values that are impossible.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = {
            f"temperature must be at least 0 ({self.temperature})": self.temperature >= 0,
            f"top_p must be above 0 and at most 1 ({self.top_p})": 0 < self.top_p <= 1,
            f"top_k must be at least -1 ({self.top_k})": self.top_k >= -1,
            f"min_p must be between 0 and 1 ({self.min_p})": 0 <= self.min_p <= 1,
            f"repetition_penalty must be above 0 ({self.repetition_penalty})": 0 < self.repetition_penalty < math.inf,
            f"presence_penalty must be finite ({self.presence_penalty})": math.isfinite(self.presence_penalty),
            f"frequency_penalty must be finite ({self.frequency_penalty})": math.isfinite(self.frequency_penalty),
            "logit_bias must be finite": all(map(math.isfinite, self.logit_bias.values())),
        }
        if problems := [problem for problem, holds in rules.items() if not holds]:
            raise ValueError("; ".join(problems))

    def of_choice(self, index: int) -> SamplingParams:
        """Those of the index-th answer to a prompt: with a seed each has a stream of its own, that of seed + index."""
        return self if self.seed is None else replace(self, seed=self.seed + index)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        penalties = self.repetition_penalty != 1, self.presence_penalty != 0, self.frequency_penalty != 0
        return bool(self.logit_bias) or any(penalties)
