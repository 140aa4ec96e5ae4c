"""The summed token loss of each chunk, without ever holding the logits of a whole batch.

    loss_c = sum over the label rows i of chunk c of  -log softmax(head(hidden_i))[label_i]

Only label rows go through the output head, a slice at a time, and each slice's gradient with respect to the hidden
states is taken at once, so that nothing is needed from its logits later. A slice never spans two chunks. An adapter on
the head gets its gradient in the same moment (`AdapterBank` adds it to `.grad`): that of the sum of all losses, each
times the weight of its chunk where chunks have some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lora_core.data.packing import PackedBatch
from lora_core.models.attention import Attend, PackedAttention
from lora_core.models.base import BaseModel
from lora_core.models.hooks.bank import AdapterBank, Segment

SLICE_ROWS = 512  # at a vocabulary of 128 K: 0.26 GB of fp32 logits at a time

LabelledRows = tuple[Tensor, Tensor]
"""(rows int64 [n] of the hidden states, labels int64 [n])"""

Head = Callable[[Tensor, int, Tensor], Tensor]
"""(hidden states [n, h], number of their chunk, their rows int64 [n]) -> logits [n, vocabulary]"""


def batch_losses(
    base: BaseModel,
    bank: AdapterBank,
    segments: Sequence[Segment],
    batch: PackedBatch,
    attend: Attend | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """`[chunks]`: the summed token loss of each chunk of the batch, whose adapter and dropout keys its segment has.

    `attend` is another attention than `PackedAttention`; `weights` are those of `chunk_losses`.
    """
    with bank.routed(segments):
        hidden = base.hidden(batch.ids, batch.positions, attend or PackedAttention(batch.lengths))[0]
    head, trained = routed_head(base, bank, segments), bank.head_weights(segments)
    return chunk_losses(hidden, head, batch.labels, trained, weights)


def batch_scores(base: BaseModel, bank: AdapterBank, segments: Sequence[Segment], batch: PackedBatch) -> Tensor:
    """fp64 `[chunks, 2]`: each chunk's summed token loss, and how many of its labels are the most probable token."""
    with bank.routed(segments):
        hidden = base.hidden(batch.ids, batch.positions, PackedAttention(batch.lengths))[0]
    return chunk_scores(hidden, routed_head(base, bank, segments), batch.labels)


def routed_head(base: BaseModel, bank: AdapterBank, segments: Sequence[Segment]) -> Head:
    """The output head with the adapters that chunks have on it; chunk i is `segments[i]`."""
    starts = list(accumulate((segment.tokens for segment in segments), initial=0))

    def head(hidden: Tensor, chunk: int, rows: Tensor) -> Tensor:
        segment = segments[chunk]
        keys = None if segment.dropout_keys is None else segment.dropout_keys[rows - starts[chunk]]
        with bank.routed([Segment(segment.adapter, len(rows), keys)]):
            return base.head(hidden)

    return head


def chunk_losses(
    hidden: Tensor,
    head: Head,
    chunks: Sequence[LabelledRows],
    trained: Sequence[Tensor] = (),
    weights: Tensor | None = None,
) -> Tensor:
    """hidden `[tokens, h]` -> `[len(chunks)]`, each the sum of its token losses, in fp32 or wider. What goes backward
    from there is multiplied by `weights` `[len(chunks)]`.

    `trained` are the weights of the head's own adapters: they make a graph grow where the hidden states have none.
    """
    losses: Tensor = _ChunkLosses.apply(hidden, head, chunks, weights, *trained)  # type: ignore[no-untyped-call]
    return losses


class _ChunkLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        chunks: Sequence[LabelledRows],
        weights: Tensor | None,
        *trained: Tensor,
    ) -> Tensor:
        ctx.hidden_shape, ctx.rows, ctx.trained = hidden.shape, [rows for rows, _ in chunks], len(trained)
        losses, gradients = [], []
        for number, (rows, labels) in enumerate(chunks):
            parts = zip(rows.split(SLICE_ROWS), labels.split(SLICE_ROWS), strict=True)
            weight = None if weights is None else weights[number]
            slices = [_slice_loss(hidden, head, number, *part, weight) for part in parts]
            losses.append(torch.stack([loss for loss, _ in slices]).sum())
            gradients.append(torch.cat([gradient for _, gradient in slices]))
        ctx.save_for_backward(*gradients)
        return torch.stack(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        total = gradients[0].new_zeros(ctx.hidden_shape)
        for rows, gradient, scale in zip(ctx.rows, gradients, grads[0].to(total.dtype), strict=True):
            total[rows] = gradient * scale
        return total, None, None, None, *[None] * ctx.trained


def _slice_loss(
    hidden: Tensor, head: Head, chunk: int, rows: Tensor, labels: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Summed loss of a few rows, and its gradient with respect to them: `weight (softmax(logits) - one_hot(labels)) d
    logits / d hidden`.
    """
    part = hidden[rows].detach().requires_grad_()
    with torch.enable_grad():
        logits = head(part, chunk, rows)
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = torch.log_softmax(logits.detach(), dim=-1, dtype=wide)
    loss = -log_p.gather(1, labels[:, None]).sum()
    dlogits = log_p.exp_()
    dlogits[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    if weight is not None:
        dlogits *= weight
    (gradient,) = torch.autograd.grad(logits, part, dlogits.to(logits.dtype))
    return loss, gradient


@torch.no_grad()
def chunk_scores(hidden: Tensor, head: Head, chunks: Sequence[LabelledRows]) -> Tensor:
    """As `chunk_losses`, without a gradient -> fp64 `[len(chunks), 2]`: each chunk's sum of token losses, and how many
    of its labels are the most probable token.
    """
    scores = hidden.new_zeros(len(chunks), 2, dtype=torch.float64)
    for chunk, (score, (rows, labels)) in enumerate(zip(scores, chunks, strict=True)):
        for row_slice, label_slice in zip(rows.split(SLICE_ROWS), labels.split(SLICE_ROWS), strict=True):
            logits = head(hidden[row_slice], chunk, row_slice)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            score[0] -= torch.log_softmax(wide, dim=-1).gather(1, label_slice[:, None]).sum()
            score[1] += (wide.argmax(dim=-1) == label_slice).sum()
    return scores
