"""The frozen matrix product in each precision a base can have: `y = x W^T`, and its input gradient `dx = dy W`.

    fp32, bf16   as they are
    fp8          W and its transpose in float8 by rows, quantised once; x and dy by rows in each product (Hopper)
    nf4          W in four bits by blocks; made dense for each product and again in the backward pass

The head, the embedding and the norms stay in the dtype that is computed in; of an fp8 base the layers at both ends
too, whose rounding costs the most: of 30 layers those four make half of the loss (`tests/bench/precision.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.kernels.dispatch import device_type
from lora_core.kernels.operands import EXACT_DTYPES, UnscaledProduct
from lora_core.kernels.quantize import dequantize_nf4, quantize_nf4, quantize_rows

QUANTISED = ("fp8", "nf4")
"""Precisions of a base whose linears have no dense weights."""

FP8_DENSE_ENDS = 2
"""Layers at each end of an fp8 base that are not quantised, of 16 layers or more; of 8 or more one."""


def quantised_layers(layers: int, precision: str) -> range:
    """Those of a base of so many layers whose linears are in fp8 or nf4."""
    ends = min(FP8_DENSE_ENDS, layers // 8) if precision == "fp8" else 0
    return range(ends, layers - ends)


class FrozenWeight(Protocol):
    """A frozen `[out, in]` matrix: the weights of one group of linears, stacked."""

    nbytes: int

    def forward(self, x: Tensor) -> Tensor:
        """x `[T, in]` -> `[T, out]`."""
        ...

    def serve(self, x: Tensor) -> Tensor:
        """The same where nothing is trained, by the product that is fastest there."""
        ...

    def unscaled(self, x: Tensor) -> UnscaledProduct:
        """The same of a few rows, for whoever reads the product and can scale it, too."""
        ...

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy `[T, out]` -> `[T, in]`."""
        ...

    def dense(self) -> list[Tensor]:
        """The matrix that `forward` multiplies with, in parts on top of each other; made for the call where it is
        quantised.
        """
        ...


TRANSPOSED_ROWS = range(16, 65)
"""A CPU's fp32 product of so many rows is made as `(W x^T)^T`, for which MKL on AMD has a second thread where it has
none for `x W^T`: all linears and the head of SmolLM2-135M, 64 rows, two threads, 338 ms that way and 205 ms this way.
"""

EXACT_ROWS = 4
"""Rows of a product at least where it is served in fp32 or fp64 on CPU: from so many on MKL on AMD gives a row of
`x W^T` the same bits however many there are, and the other product, too, where it is made.
"""


PACKED_ROWS = 8
"""What oneDNN is told when it packs a weight; on a CPU with AVX2 the layout is the same from 2 to 256."""


class DenseWeight:
    """In the dtype of the batch. On CPU the parts stay apart, since they are the pages of a file that is shared."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = list(parts)
        self.nbytes = sum(part.nbytes for part in parts)
        self._packed: Tensor | None = None

    @property
    def is_packed(self) -> bool:
        """Whether there is a second copy, by which `serve` multiplies."""
        return self._packed is not None

    def pack(self) -> int:
        """Copy the whole matrix as oneDNN takes it, for `serve` alone; the bytes of the copy."""
        joined = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(joined, PACKED_ROWS)
        return int(torch.ops.mkldnn._nbytes(self._packed))

    def unpack(self) -> None:
        """Let go of that copy."""
        self._packed = None

    def forward(self, x: Tensor) -> Tensor:
        if len(self.parts) == 1:
            return x @ self.parts[0].t()
        sizes = [part.shape[0] for part in self.parts]
        y = x.new_empty(x.shape[0], sum(sizes))
        for part, columns in zip(self.parts, y.split(sizes, dim=1), strict=True):
            torch.mm(x, part.t(), out=columns)
        return y

    def serve(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
            return y
        if x.dtype not in EXACT_DTYPES or x.is_cuda:
            return self.forward(x)
        if len(x) < EXACT_ROWS:
            return self.forward(F.pad(x, (0, 0, 0, EXACT_ROWS - len(x))))[: len(x)]
        if len(x) not in TRANSPOSED_ROWS:
            return self.forward(x)
        transposed = x.t()
        return torch.cat([part @ transposed for part in self.parts]).t().contiguous()

    def unscaled(self, x: Tensor) -> UnscaledProduct:
        return UnscaledProduct(self.forward(x))

    def input_gradient(self, dy: Tensor) -> Tensor:
        if len(self.parts) == 1:
            return dy @ self.parts[0]
        grads = dy.split([part.shape[0] for part in self.parts], dim=1)
        dx: Tensor = grads[0] @ self.parts[0]
        for part, grad in zip(self.parts[1:], grads[1:], strict=True):
            dx.addmm_(grad, part)
        return dx

    def dense(self) -> list[Tensor]:
        return self.parts


def stacked_dense(parts: Sequence[Tensor]) -> DenseWeight:
    """One matrix in memory for the parts, which become views of it."""
    stacked = torch.cat(list(parts)) if len(parts) > 1 else parts[0].detach()
    for part, piece in zip(parts, stacked.split([part.shape[0] for part in parts]), strict=True):
        part.data = piece
    return DenseWeight([stacked])


class Fp8Weight:
    """Quantised once, as it is and transposed, since the scaled product takes its right side by columns alone."""

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._scales = quantize_rows(weight)
        self._transposed, self._transposed_scales = quantize_rows(weight.t().contiguous())
        self.nbytes = 2 * self._weight.nbytes + self._scales.nbytes + self._transposed_scales.nbytes
        self._dtype = weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self._weight, self._scales)

    serve = forward

    def unscaled(self, x: Tensor) -> UnscaledProduct:
        """cuBLAS, which multiplies by one number alone, reads the weights of 64 rows in half the time that the product
        which scales rows and columns takes (a down-projection of 8B's shape on an H200: 18 us, 37).
        """
        q, row_scales = quantize_rows(x)
        if device_type(x.device) != "cuda":
            return UnscaledProduct((q.float() @ self._weight.float().t()).to(self._dtype), row_scales, self._columns)
        values = torch._scaled_mm(
            q, self._weight.t(), scale_a=self._one, scale_b=self._one, out_dtype=self._dtype, use_fast_accum=True
        )
        return UnscaledProduct(values, row_scales, self._columns)

    @property
    def _columns(self) -> Tensor:
        return self._scales.t()

    @cached_property
    def _one(self) -> Tensor:
        return torch.ones((), device=self._scales.device)

    def input_gradient(self, dy: Tensor) -> Tensor:
        return self._product(dy, self._transposed, self._transposed_scales)

    def dense(self) -> list[Tensor]:
        return [self._weight.to(self._dtype).mul_(self._scales)]

    def _product(self, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        q, row_scales = quantize_rows(x)
        if device_type(x.device) != "cuda":
            return ((q.float() @ weight.float().t()) * row_scales * scales.t()).to(self._dtype)
        y: Tensor = torch._scaled_mm(
            q, weight.t(), scale_a=row_scales, scale_b=scales.t(), out_dtype=self._dtype, use_fast_accum=True
        )
        return y


class Nf4Weight:
    """Four bits an element; the dense matrix lives for one product."""

    def __init__(self, weight: Tensor) -> None:
        self._packed = quantize_nf4(weight)
        self.nbytes = self._packed.codes.nbytes + self._packed.scales.nbytes
        self._dtype = weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense()[0].t()

    serve = forward

    def unscaled(self, x: Tensor) -> UnscaledProduct:
        return UnscaledProduct(self.forward(x))

    def input_gradient(self, dy: Tensor) -> Tensor:
        return dy @ self.dense()[0]

    def dense(self) -> list[Tensor]:
        return [dequantize_nf4(self._packed, self._dtype)]
