"""DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353): every row of W + s B A gets a trained length m.

    y = g * (W x + s B A x) + bias          g = m / ||W + s B A||          all [out], norms of rows

The norm is a constant to the gradient (section 4.3 of the paper, and PEFT). The sum W + s B A is never made:

    ||W + B A||^2 = ||W||^2 + 2 B . (W A^T) + B . (B A A^T)       s is in B; . multiplies by element and sums each row

with ||W||^2 computed once for each linear. W A^T is one product of W with r rows. Of a base in fp8 or nf4, W is what
its products take, as PEFT has it for four bits (QDoRA).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SLICE_ROWS = 4096
"""Rows of a bf16 W that are widened at a time: 64 MB at 4,096 inputs, where a whole output head would be 2 GB."""


class RowNorms:
    """Row norms of W + s B A for the linears of one frozen base; `weight` finds W `[out, in]` by a linear's name."""

    def __init__(self, weight: Callable[[str], Tensor]) -> None:
        self._weight = weight
        self._squared: dict[tuple[str, torch.dtype], Tensor] = {}

    @torch.no_grad()
    def of(self, module: str, a: Tensor, b: Tensor) -> Tensor:
        """Return norms `[out]` with A `[r, in]` and s B `[out, r]`, in fp32 or wider, where the base's weights are."""
        weight = self._weight(module)
        wide = _wide(weight, a.dtype)
        a, b = a.to(weight.device, wide), b.to(weight.device, wide)
        wa = torch.cat([F.linear(part.to(wide), a) for part in weight.split(SLICE_ROWS)])
        return _root(self.squares(module, wide, weight) + 2 * (b * wa).sum(1) + (b * (b @ (a @ a.t()))).sum(1))

    @torch.no_grad()
    def of_base(self, module: str, dtype: torch.dtype) -> Tensor:
        """Return the same where B is zero, for an A of this dtype."""
        weight = self._weight(module)
        return _root(self.squares(module, _wide(weight, dtype), weight))

    def squares(self, module: str, wide: torch.dtype, weight: Tensor) -> Tensor:
        """Return ||W||^2 `[out]` of every row; `weight` is W, which whoever asks has at hand."""
        if (module, wide) not in self._squared:
            parts = weight.split(SLICE_ROWS)
            self._squared[module, wide] = torch.cat([part.to(wide).square().sum(1) for part in parts])
        return self._squared[module, wide]


def _wide(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.promote_types(weight.dtype, dtype), torch.float32)


def _root(squared: Tensor) -> Tensor:
    # A row of zeros (padding of a vocabulary) would otherwise divide 0 by 0 until B gives it a direction.
    return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()


def weight_of(linear: nn.Module) -> Tensor:
    """Return W `[out, in]` of an `nn.Linear`, or of GPT-2's `Conv1D`, which keeps its transpose."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(linear, Conv1D) else weight
