"""`cross_entropy.py` in Triton: one program a row, the logits read twice and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_core.kernels.dispatch import launch


@triton.jit
def _cross_entropy(logits, labels, losses, V, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    row = logits + i * stride
    label = tl.load(labels + i)
    largest = -float("inf")
    total = 0.0
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        z = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(z))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(z - higher))
        largest = higher
    log_sum = largest + tl.log(total)
    label_logit = tl.load(row + label).to(tl.float32)
    tl.store(losses + i, log_sum - label_logit)
    tl.debug_barrier()  # the label's logit is read before another thread writes over it
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        z = tl.load(row + v, mask=v < V, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(z - log_sum) - tl.where(v == label, 1.0, 0.0)
        tl.store(row + v, gradient.to(logits.dtype.element_ty), mask=v < V)


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """See `cross_entropy.cross_entropy_`."""
    count, vocabulary = logits.shape
    losses = torch.empty(count, dtype=torch.float32, device=logits.device)
    if count:
        block = min(8192, triton.next_power_of_2(vocabulary))
        launch(
            _cross_entropy, (count,), logits, labels, losses, vocabulary, logits.stride(0), BLOCK=block, num_warps=16
        )
    return losses
