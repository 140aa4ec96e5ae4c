"""The summed token loss of each chunk, without ever holding the logits of a whole batch.

    loss_c = sum over the label rows i of chunk c of  -log softmax(head(hidden_i))[label_i]

Only label rows go through the output head, a slice at a time, and each slice's gradient with respect to the hidden
states is taken at once: the head is frozen, so nothing else is needed from its logits. A slice never spans two chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SLICE_ROWS = 512  # at a vocabulary of 128 K: 0.26 GB of fp32 logits at a time

LabelledRows = tuple[Tensor, Tensor]
"""(rows int64 [n] of the hidden states, labels int64 [n])"""


def chunk_losses(hidden: Tensor, head: Callable[[Tensor], Tensor], chunks: Sequence[LabelledRows]) -> Tensor:
    """hidden `[tokens, h]`, frozen `head: [n, h] -> [n, vocabulary]` -> `[len(chunks)]`, each the sum of its token
    losses, in fp32 or wider.
    """
    losses: Tensor = _ChunkLosses.apply(hidden, head, chunks)  # type: ignore[no-untyped-call]
    return losses


class _ChunkLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Callable[[Tensor], Tensor], chunks: Sequence[LabelledRows]) -> Tensor:
        ctx.hidden_shape, ctx.rows = hidden.shape, [rows for rows, _ in chunks]
        losses, gradients = [], []
        for rows, labels in chunks:
            slices = [
                _slice_loss(hidden[row_slice].detach(), head, label_slice, ctx.needs_input_grad[0])
                for row_slice, label_slice in zip(rows.split(SLICE_ROWS), labels.split(SLICE_ROWS), strict=True)
            ]
            losses.append(torch.stack([loss for loss, _ in slices]).sum())
            gradients.append(torch.cat([gradient for _, gradient in slices]))
        ctx.save_for_backward(*gradients)
        return torch.stack(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        gradients = ctx.saved_tensors
        total = gradients[0].new_zeros(ctx.hidden_shape)
        for rows, gradient, scale in zip(ctx.rows, gradients, grads[0].to(total.dtype), strict=True):
            total[rows] = gradient * scale
        return total, None, None


def _slice_loss(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Summed loss of a few rows, and its gradient with respect to them: `(softmax(logits) - one_hot(labels)) d logits /
    d hidden`.
    """
    with torch.set_grad_enabled(with_gradient):
        logits = head(hidden.requires_grad_(with_gradient))
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = torch.log_softmax(logits.detach(), dim=-1, dtype=wide)
    loss = -log_p.gather(1, labels[:, None]).sum()
    if not with_gradient:
        return loss, hidden.new_empty(0)
    dlogits = log_p.exp_()
    dlogits[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    (gradient,) = torch.autograd.grad(logits, hidden, dlogits.to(logits.dtype))
    return loss, gradient
