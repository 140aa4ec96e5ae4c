"""Log-probabilities of tokens under the model's own distribution.

    ln p = log_softmax(z)      z: the logits as the model and its adapter give them

Bias, penalties, temperature, grammars and whatever else shapes a sample come after that and have no say: so what is
served is what validation in training computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 256  # in fp32 at a time: a prompt's 1,024 over a vocabulary of 128 K would take 0.5 GB


@dataclass(frozen=True)
class TokenLogprob:
    """ln p of a token, and of the likeliest in its place: (token, ln p) of `top`, the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """Score n tokens by logits `[n, vocabulary]`, each beside as many of the likeliest as its entry of `tops` says."""
    scored = []
    for start in range(0, len(tokens), _ROWS):
        part = slice(start, start + _ROWS)
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_p = torch.log_softmax(logits[part], dim=-1, dtype=wide)
        chosen = log_p.gather(-1, torch.tensor(tokens[part], device=log_p.device)[:, None])[:, 0]
        values, indices = log_p.topk(min(max(tops[part]), log_p.shape[-1]))
        rows = zip(tokens[part], chosen.tolist(), indices.tolist(), values.tolist(), tops[part], strict=True)
        scored += [
            TokenLogprob(token, logprob, tuple(zip(likeliest[:top], of_likeliest[:top], strict=True)))
            for token, logprob, likeliest, of_likeliest, top in rows
        ]
    return scored
