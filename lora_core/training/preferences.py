"""Direct preference optimisation (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290) as weights of token losses.

    reward(answer) = beta * (log p(answer) - log p_ref(answer))         log p: the sum over the answer's tokens
    margin = reward(chosen) - reward(rejected)
    loss = -log sigmoid(margin)                                         a step's is the mean over its pairs

    d loss / d log p(chosen) = -beta * sigmoid(-margin)                 of the rejected answer: the opposite

The gradient is that of token losses, each times a number that one forward pass over the pairs tells. So a step scores
its documents first, each by itself, and then trains on them with their weights, wherever they lie: a pair may be cut by
micro-batches and by ranks. The reference is what the job started from, on the same frozen base. It does not change, so
that each document's is computed once, in the first epoch, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.data.packing import Chunk
from lora_core.kernels.transfer import to_device


class PairFigures(NamedTuple):
    """Means over pairs: the loss, how often the chosen answer has the larger reward, and the margin."""

    loss: float
    accuracy: float
    margin: float


class PairScores:
    """One job's log-probabilities on their way to weights. Documents 2i and 2i + 1 are the chosen and the rejected
    answer of pair i, of a step as of all of the job; each is a chunk by itself.
    """

    def __init__(self, beta: float, documents: int, most: int, device: torch.device) -> None:
        """`documents` counts all of the job, `most` those that are scored at a time."""
        self.beta = beta
        self.reference = torch.zeros(documents, dtype=torch.float64, device=device)
        self.step: int | None = None  # the one whose weights are known
        self._log_p = torch.zeros(2, most, dtype=torch.float64, device=device)  # of the job, and of the reference
        self._weights = torch.zeros(0)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, chunk: Chunk, loss: Tensor) -> None:
        """Take in a document's summed token loss."""
        ((index, _),) = chunk.examples
        self._log_p[int(chunk.reference), index] -= loss

    @property
    def shares(self) -> Tensor:
        """What ranks have scored so far, to be added up over them."""
        return self._log_p

    def score(self, documents: Sequence[int], with_reference: bool) -> Tensor:
        """The sums of losses, of chosen answers with the larger reward and of margins over pairs, once all of these
        `documents` of the job are scored, `with_reference` by the reference too: `[3]`. From here on `weight_of` is
        about them.
        """
        log_p, reference = self._log_p[:, : len(documents)]
        places = to_device(torch.tensor(documents), log_p.device)
        if with_reference:
            self.reference[places] = reference
        chosen, rejected = (self.beta * (log_p - self.reference[places])).view(-1, 2).unbind(1)
        margins = chosen - rejected
        slopes = self.beta * torch.sigmoid(-margins)
        self._weights = torch.stack([slopes, -slopes], dim=1).flatten()
        self._sums = torch.stack([-F.logsigmoid(margins).sum(), (margins > 0).sum(), margins.sum()])
        self._log_p.zero_()
        return self._sums

    def weight_of(self, chunk: Chunk) -> Tensor:
        """What the gradient of a document's token losses is multiplied by."""
        ((index, _),) = chunk.examples
        return self._weights[index]

    def figures(self, pairs: int) -> PairFigures:
        """Of the pairs that were scored last, so many."""
        return PairFigures(*(total / pairs for total in self._sums.tolist()))
