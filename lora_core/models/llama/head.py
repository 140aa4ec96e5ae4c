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
    head: Tensor, normed: Tensor, labels: Labels, with_gradient: bool, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Summed token loss of each chunk of `labels`; then, with the gradient, that of the normed rows `[T, H]`, times the
    chunk's weight where there are `weights`; else how many labels are what the model would have written (the first
    token of those with the largest logit). Only labelled rows go through the head `[vocabulary, H]`: chunk by chunk
    where bits are promised, else those of all together.
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
        for (rows, _), gradient, weight in zip(parts, gradients, _of_rows(weights, counts, parts), strict=True):
            dn.index_copy_(0, rows, gradient if weight is None else gradient.mul_(weight))
    return _sums(losses, counts), _sums(correct, counts), dn


def _of_rows(weights: Tensor | None, counts: Tensor, parts: Sequence[tuple[Tensor, ...]]) -> Sequence[Tensor | None]:
    """The weights `[n, 1]` of each part's rows, of those of stretches of `counts` rows; None where there are none."""
    if weights is None:
        return [None] * len(parts)
    repeats = counts.to(weights.device, non_blocking=True)
    sizes = [len(part[0]) for part in parts]
    return torch.split(weights.repeat_interleave(repeats, output_size=sum(sizes))[:, None], sizes)


def _sums(parts: list[Tensor], counts: Tensor) -> Tensor:
    """fp32 (or wider) `[len(counts)]`: sums of consecutive stretches of the joined parts."""
    if not parts:
        return torch.zeros(len(counts))
    joined = torch.cat(parts)
    wide = joined if joined.is_floating_point() else joined.float()
    # `unsafe` leaves out checks of the counts, for which the device would be waited for.
    return torch.segment_reduce(wide, "sum", lengths=counts.to(wide.device, non_blocking=True), unsafe=True)
