"""Token losses and their gradient, written over the logits, so that no second matrix of that size ever exists.

loss_i = logsumexp(z_i) - z_i[label_i]          dz_i = softmax(z_i) - one_hot(label_i)
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logits `[n, vocabulary]`, labels int64 `[n]` -> (losses `[n]`, bool `[n]`: the label has the largest logit).

    The logits become the gradient of the summed losses with respect to them. Losses are fp32 (fp64 for fp64).
    """
    if logits.is_cuda:
        from lora_core.kernels import cross_entropy_triton

        return cross_entropy_triton.cross_entropy_(logits, labels)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(-1)
    label_logits = wide.gather(1, labels[:, None])[:, 0]
    log_p = torch.log_softmax(wide, dim=-1)
    losses = -log_p.gather(1, labels[:, None])[:, 0]
    gradient = log_p.exp_()
    gradient[torch.arange(len(labels)), labels] -= 1.0
    logits.copy_(gradient)
    return losses, label_logits == largest
