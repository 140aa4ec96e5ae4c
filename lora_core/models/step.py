"""What a forward pass computes where nothing is trained: one step of any number of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_core.kernels.transfer import to_device
from lora_core.models.attention import Attend

Bound = Any
"""An adapter as a path takes it, which its `bind` or `load` returned."""


class UnreadIds(NamedTuple):
    """Ids of a step that are on the device alone, as the step before it made them: its tokens at `places`, int64 `[n]`,
    are `tokens[rows]`.
    """

    places: Tensor
    rows: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Step:
    """Tokens of any number of sequences end to end: ids and positions int64 `[T]`, in the host's memory; (adapter,
    tokens) of each run of them; the attention to all that came before; the tokens whose logits are wanted. `unread` ids
    are any number among `ids`.
    """

    ids: Tensor
    positions: Tensor
    runs: Sequence[tuple[Bound | None, int]]
    attend: Attend
    logits_of: Sequence[int]
    unread: UnreadIds | None = None

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and positions on the device."""
        if self.unread is None:
            ids, positions = to_device(torch.stack([self.ids, self.positions]), device)
            return ids, positions
        places, rows, tokens = self.unread
        joined = to_device(torch.cat([self.ids, self.positions, places, rows]), device)
        ids, positions, places, rows = joined.split([len(self.ids)] * 2 + [len(places)] * 2)
        return ids.index_copy(0, places, tokens[rows]), positions

    def adapters(self) -> list[Bound | None]:
        """Of each token whose logits are wanted."""
        of_tokens = [adapter for adapter, tokens in self.runs for _ in range(tokens)]
        return [of_tokens[token] for token in self.logits_of]
