"""The head of the written-out decoder (`decoder.py`) and its loss: logits by slices of rows, each of which becomes its
own gradient, so that those of a whole batch are never there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_core.kernels.cross_entropy import cross_entropy_
from lora_core.kernels.dispatch import device_type
from lora_core.kernels.operands import EXACT_DTYPES

HEAD_ROWS = 2048  # at a vocabulary of 128 K: 0.5 GB of bf16 logits at a time
CPU_HEAD_ROWS = 256  # the fewest at which the head's products are as fast as at 1,024

Labels = Sequence[tuple[Tensor, Tensor]]
"""(rows int64 `[n]` of the batch, labels int64 `[n]`) of each chunk."""


def head_losses(
    head: Tensor, normed: Tensor, labels: Labels, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Summed token loss of each chunk of `labels`; then, with the gradient, that of the normed rows `[T, H]`, else how
    many labels are what the model would have written (the first token of those with the largest logit). Only labelled
    rows go through the head `[vocabulary, H]`: chunk by chunk where bits are promised, else those of all together.
    """
    on_gpu = device_type(normed.device) == "cuda"
    joined = on_gpu or normed.dtype not in EXACT_DTYPES
    parts = [tuple(map(torch.cat, zip(*labels, strict=True)))] if joined else labels
    losses, correct, gradients = [], [], []
    limit = HEAD_ROWS if on_gpu else CPU_HEAD_ROWS
    for rows, targets in parts:
        picked = normed[rows]
        gradients.append(torch.empty_like(picked))
        memory = picked.new_empty(min(limit, len(rows)), head.shape[0])
        for start in range(0, len(rows), limit):
            part = slice(start, start + limit)
            logits = torch.mm(picked[part], head.t(), out=memory[: len(rows) - start])
            if not with_gradient:
                correct.append(logits.argmax(-1) == targets[part])
            losses.append(cross_entropy_(logits, targets[part]))
            if with_gradient:
                torch.mm(logits, head, out=gradients[-1][part])
    counts = torch.tensor([len(targets) for _, targets in labels])
    dn = torch.zeros_like(normed) if with_gradient else None
    if dn is not None:
        for (rows, _), gradient in zip(parts, gradients, strict=True):
            dn.index_copy_(0, rows, gradient)
    return _sums(losses, counts), _sums(correct, counts), dn


def _sums(parts: list[Tensor], counts: Tensor) -> Tensor:
    """fp32 (or wider) `[len(counts)]`: sums of consecutive stretches of the joined parts."""
    if not parts:
        return torch.zeros(len(counts))
    joined = torch.cat(parts)
    wide = joined if joined.is_floating_point() else joined.float()
    # `unsafe` leaves out checks of the counts, for which the device would be waited for.
    return torch.segment_reduce(wide, "sum", lengths=counts.to(wide.device, non_blocking=True), unsafe=True)
