"""Token losses and their gradient, written over the logits, so that no second matrix of that size ever exists.

loss_i = logsumexp(z_i) - z_i[label_i]          dz_i = softmax(z_i) - one_hot(label_i)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_core.kernels import dispatch

CACHED_ELEMENTS = 1 << 20
"""Logits that a CPU widens at a time: 4 MB of fp32, which stay in its caches from the first pass to the last."""


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """logits `[n, vocabulary]`, labels int64 `[n]` -> losses `[n]`.

    The logits become the gradient of the summed losses with respect to them. Losses are fp32 (fp64 for fp64).
    """
    if dispatch.runs_in_triton(logits):
        from lora_core.kernels import cross_entropy_triton

        return cross_entropy_triton.cross_entropy_(logits, labels)
    rows = max(1, CACHED_ELEMENTS // logits.shape[1])
    return torch.cat([_few_rows_(*part) for part in zip(logits.split(rows), labels.split(rows), strict=True)])


def _few_rows_(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest probability is exp(largest logit - logsumexp) and never too small for its logarithm."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest, label_logits = wide.amax(-1), wide.gather(1, labels[:, None])[:, 0]
    p = torch.softmax(wide, dim=-1)
    losses = largest - label_logits - p.amax(-1).log()
    p[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    logits.copy_(p)
    return losses
