"""What a forward pass computes where nothing is trained: one step of any number of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_core.models.attention import Attend

Bound = Any
"""An adapter as a path takes it, which its `bind` or `load` returned."""


@dataclass(frozen=True)
class Step:
    """Tokens of any number of sequences end to end: ids and positions int64 `[T]`, in the host's memory; (adapter,
    tokens) of each run of them; the attention to all that came before; the tokens whose logits are wanted.
    """

    ids: Tensor
    positions: Tensor
    runs: Sequence[tuple[Bound | None, int]]
    attend: Attend
    logits_of: Sequence[int]

    def adapters(self) -> list[Bound | None]:
        """Of each token whose logits are wanted."""
        of_tokens = [adapter for adapter, tokens in self.runs for _ in range(tokens)]
        return [of_tokens[token] for token in self.logits_of]
