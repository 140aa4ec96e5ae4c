"""What the decoder's kernels return, and what they take besides until they do: `kernels/` without numbers, once for
Triton and once for torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_core.adapters.dora import SLICE_ROWS
from lora_core.kernels.cross_entropy import CACHED_ELEMENTS
from lora_core.kernels.dora import CPU_ROWS
from lora_core.kernels.operands import TILE_ROWS
from lora_core.models.attention_cpu import KEPT_LENGTH, QUERY_BLOCK

LARGEST_BLOCK = 64
"""Ranks that a program of `low_rank_triton` takes at a time. The SwiGLU kernels make a shrink of up to so many."""

DEQUANTISED = 2 + 4
"""Bytes of a dense nf4 element while torch makes it: half a code in int32, its level in fp32."""

MOST_ADAPTERS = 64
"""In one batch, as far as anybody reckons with them."""

STRIPE_COLUMNS = 1024
"""COLUMNS x BLOCKS of `swiglu_triton.SWIGLU` and `layer_ops_triton.NORM_BACKWARD`: each stripe has fp32 sums of its
own.
"""


class Ledger:
    """Bytes that are held now and at most, and that are `saved` when the head begins."""

    def __init__(self) -> None:
        self.live = self.peak = self.saved = 0

    def moment(self, nbytes: int) -> None:
        """Bytes that are there beside what is held, and are gone at once."""
        self.peak = max(self.peak, self.live + nbytes)


class Held:
    """Stands for a tensor: counted until nobody refers to it."""

    def __init__(self, ledger: Ledger, nbytes: int) -> None:
        self._ledger, self._nbytes = ledger, nbytes
        ledger.live += nbytes
        ledger.moment(0)

    def __del__(self) -> None:
        self._ledger.live -= self._nbytes


@dataclass(frozen=True)
class TritonKernels:
    """Of `tokens` rows in documents of up to `longest`; linears may be `quantised`."""

    ledger: Ledger
    itemsize: int
    tokens: int
    longest: int
    quantised: str | None

    def rows(self, width: int, itemsize: int | None = None) -> Held:
        """`[T, width]` in the dtype of the batch, or of other numbers."""
        return Held(self.ledger, self.tokens * width * (itemsize or self.itemsize))

    def _moment(self, width: int, itemsize: int | None = None) -> None:
        """`[T, width]` that is gone at once."""
        self.ledger.moment(self.tokens * width * (itemsize or self.itemsize))

    def product(self, inputs: int, outputs: Sequence[int]) -> Held:
        """`FrozenWeight.forward`: x `[T, inputs]` -> `[T, outputs]`."""
        return self._multiplied(inputs, sum(outputs))

    def input_gradient(self, inputs: int, outputs: Sequence[int]) -> Held:
        """`FrozenWeight.input_gradient`: dy `[T, outputs]` -> `[T, inputs]`."""
        return self._multiplied(sum(outputs), inputs)

    def _multiplied(self, columns: int, width: int) -> Held:
        """`[T, columns]` -> `[T, width]`; besides in fp8 the rows in 8 bits and their scales, in nf4 a dense W."""
        y = self.rows(width)
        if self.quantised == "fp8":
            self._moment(columns + 4, 1)
        elif self.quantised == "nf4":
            self.ledger.moment(columns * width * self.itemsize)
        return y

    def shrink(self, width: int) -> Held | None:
        return self.rows(width) if width else None

    def norm_forward(self, x: Held, y: Held | None, width: int, *, dora: bool = False) -> tuple[Held, Held, Held]:
        """x + y (in y's memory, but for DoRA), its norm, and rstd."""
        total = self.rows(width) if dora and y is not None else y or x
        return total, self.rows(width), self.rows(1, 4)

    def norm_again(self, width: int) -> None:
        """`Norm.of` besides its result: x with rstd in fp32, and that in the dtype of the batch."""
        self._moment(width * (4 + self.itemsize), 1)

    def add_a_gradients_of_norm(self, width: int) -> None:
        """The norm is made in registers."""

    def norm_backward(self, width: int, below: int) -> tuple[Held, Held | None]:
        """The gradient and its shrink."""
        dx = self.rows(width)
        return dx, self._in_stripes(width, below, below)

    def rope_forward(self, turned: int, *, normed: bool, with_backward: bool) -> Held | None:
        """In place; q and k before their norm, where the backward pass needs them."""
        return self.rows(turned) if normed and with_backward else None

    def rope_backward(
        self, width: int, turned: int, heads: int, *, normed: bool, dora: bool
    ) -> tuple[Held, Held | None]:
        """The gradient and the products, which are there for each head before."""
        dy, products = self.rows(width), self.rows(1, 4)
        self._moment(heads, 4)
        self._moment_of_sums(width if dora else 0)
        return dy, products

    def swiglu_forward(self, columns: int, width: int) -> tuple[Held, Held | None]:
        """The activation and its shrink."""
        activation = self.rows(columns)
        return activation, self._in_stripes(columns, width, width)

    def swiglu_backward(self, columns: int, width: int, rank: int, *, dora: bool) -> tuple[Held | None, Held | None]:
        """The shrunk gradient of gate and up, and the products, which are there for each stripe before."""
        products = self.rows(1, 4)
        self._moment(-(-columns // STRIPE_COLUMNS), 4)
        self._moment_of_sums(2 * columns if dora else 0)
        return self._in_stripes(columns, width, rank), products

    def _in_stripes(self, columns: int, width: int, rank: int) -> Held | None:
        """Where one block takes all ranks, besides: `partial` `[stripes, T, width]` in fp32."""
        shrunk = self.shrink(width)
        if 0 < rank <= LARGEST_BLOCK:
            self._moment(-(-columns // STRIPE_COLUMNS) * width, 4)
        return shrunk

    def refresh_dora_scales(self, inputs: int, outputs: Sequence[int], width: int) -> None:
        """The squares of W, slice by slice in fp32, when they are first needed; and W A^T for all adapters. Of a
        quantised group all W are made dense for it.
        """
        largest = max(outputs)
        squares = 2 * min(largest, SLICE_ROWS) * inputs * 4
        dense = sum(outputs) * inputs * self.itemsize if self.quantised else 0
        self.ledger.moment(dense + max(squares, largest * width * MOST_ADAPTERS * 4))

    def dora_backward(self, width: int) -> Held:
        """dv."""
        dv = self.rows(width)
        self._moment_of_sums(width)
        return dv

    def _moment_of_sums(self, width: int) -> None:
        """Those of dy y over the rows of each tile, of which the last one of a chunk may not be full."""
        self.ledger.moment((self.tokens // TILE_ROWS + MOST_ADAPTERS) * width * 4)

    def cross_entropy(self, rows: int, vocabulary: int) -> None:
        """Over the logits."""

    def attention(self, heads: int, kv_heads: int, size: int, *, with_backward: bool) -> tuple[Held, list[Held]]:
        """Attended rows, and what is kept beside q, k and v: one fp32 number a row and head.

        Flash attention and cuDNN's take bf16 alone. In fp32 torch makes two products and a softmax of each document; it
        keeps q and k scaled, k and v for every head, the softmax, and each document's output, which are then joined.
        """
        if self.itemsize == 2:
            return self.rows(heads * size), [self.rows(heads, 4)]
        kept = [self.rows(heads * size) for _ in range(4)] + [self.rows(heads * self.longest)]
        self._moment_of_scores(heads, 2 * self.itemsize)
        return self.rows(heads * size), kept if with_backward else []

    def attention_backward(self, heads: int, kv_heads: int, size: int) -> list[Held]:
        """dq, dk, dv. Until then dq is summed in fp32, and dk and dv are there for every query head."""
        gradients = [self.rows(count * size) for count in (heads, kv_heads, kv_heads)]
        expanded = 2 * heads * size * self.itemsize if kv_heads < heads else 0
        self._moment(4 * (heads * size + heads) + expanded, 1)
        if self.itemsize > 2:
            self._moment_of_scores(heads, 2 * self.itemsize)
        return gradients

    def _moment_of_scores(self, heads: int, itemsize: int) -> None:
        """Numbers for every two tokens of one document, gone at once."""
        self.ledger.moment(heads * self.longest**2 * itemsize)


class TorchKernels(TritonKernels):
    """On CPU, in torch's own operators, which widen to fp32 in tensors."""

    def _multiplied(self, columns: int, width: int) -> Held:
        if self.quantised:
            self.ledger.moment(columns * width * DEQUANTISED)
        return super()._multiplied(columns, width)

    def refresh_dora_scales(self, inputs: int, outputs: Sequence[int], width: int) -> None:
        """The squares of W, or W in fp32 for W A^T of one adapter, slice by slice; of a quantised group all W before,
        as for products.
        """
        largest, elements = max(outputs), sum(outputs) * inputs if self.quantised else 0
        self.ledger.moment(elements * DEQUANTISED)
        self.ledger.moment(elements * self.itemsize + 2 * min(largest, SLICE_ROWS) * inputs * 4 + largest * width * 4)

    def norm_forward(self, x: Held, y: Held | None, width: int, *, dora: bool = False) -> tuple[Held, Held, Held]:
        """x, its product with rstd and that in the dtype of the batch, besides."""
        total = x if y is None else self.rows(width)
        self._moment(8 * width, 1)
        normed, rstd = self.rows(width), self.rows(1, 4)
        self._moment(width * (4 + self.itemsize), 1)
        return total, normed, rstd

    def add_a_gradients_of_norm(self, width: int) -> None:
        """The norm is made once more."""
        self.norm_again(width)
        self._moment(2 * width)

    def norm_backward(self, width: int, below: int) -> tuple[Held, Held | None]:
        """g, x and their product, in fp32."""
        self._moment(3 * width, 4)
        return self.rows(width), self.shrink(below)

    def rope_forward(self, turned: int, *, normed: bool, with_backward: bool) -> Held | None:
        """q and k with their halves exchanged; for their norm what `norm_forward` takes, at most."""
        unnormed = super().rope_forward(turned, normed=normed, with_backward=with_backward)
        self._moment(turned * (8 + self.itemsize) if normed else turned * self.itemsize, 1)
        return unnormed

    def rope_backward(
        self, width: int, turned: int, heads: int, *, normed: bool, dora: bool
    ) -> tuple[Held, Held | None]:
        """q and k with their halves exchanged; for their norm what `norm_backward` takes. For DoRA what was turned is
        copied and turned back.
        """
        dy = self.rows(width)
        self._moment(turned * (3 * 4 if normed else self.itemsize), 1)
        if dora:
            self._moment_of_dora_scales(width, width)
        return dy, None

    def swiglu_forward(self, columns: int, width: int) -> tuple[Held, Held | None]:
        return self.rows(columns), self.shrink(width)

    def swiglu_backward(self, columns: int, width: int, rank: int, *, dora: bool) -> tuple[Held | None, Held | None]:
        """silu and its gradient, and that of up; for DoRA gate and up before."""
        self._moment((5 if dora else 3) * columns)
        if dora:
            self._moment_of_dora_scales(5 * columns, columns)
        return self.shrink(width), None

    def dora_backward(self, width: int) -> Held:
        dv = self.rows(width)
        self._moment_of_dora_scales(0, width)
        return dv

    def _moment_of_dora_scales(self, held: int, width: int) -> None:
        """A few rows in fp32, and their products, beside `held` columns of all rows."""
        few = min(self.tokens, CPU_ROWS) * width * 2 * 4
        self.ledger.moment(self.tokens * held * self.itemsize + few)

    def cross_entropy(self, rows: int, vocabulary: int) -> None:
        """A few rows and their softmax in fp32."""
        self.ledger.moment(2 * 4 * min(rows, max(1, CACHED_ELEMENTS // vocabulary)) * vocabulary)

    def attention(self, heads: int, kv_heads: int, size: int, *, with_backward: bool) -> tuple[Held, list[Held]]:
        """k and v laid out by document, and the probabilities of documents that are not too long: where longer ones are
        there, too, all others may be of the longest that keep theirs. A block takes its q, scores, their softmax and
        its output.
        """
        attended, kept = self.rows(heads * size), [self.rows(2 * kv_heads * size)]
        length = min(self.longest, KEPT_LENGTH)
        ends = [min(start + QUERY_BLOCK, length) for start in range(0, length, QUERY_BLOCK)]
        scores = sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False))
        kept.append(Held(self.ledger, self.tokens * heads * scores // length * self.itemsize))
        self._moment_of_block(heads * 2 * (size + self.longest))
        return attended, kept if with_backward else []

    def attention_backward(self, heads: int, kv_heads: int, size: int) -> list[Held]:
        """dq, dk, dv; besides dk and dv by document. A block takes its q, its output's gradient and its dq, the
        gradients of probabilities and scores, and the probabilities of a long document.
        """
        gradients = [self.rows(count * size) for count in (heads, kv_heads, kv_heads)]
        by_document = self.rows(2 * kv_heads * size)
        again = self.longest > KEPT_LENGTH
        self._moment_of_block(heads * (3 * size + (3 if again else 2) * self.longest))
        del by_document
        return gradients

    def _moment_of_block(self, width: int) -> None:
        """So much for each query of one block in all documents."""
        documents = -(-self.tokens // self.longest)
        self.ledger.moment(documents * min(QUERY_BLOCK, self.longest) * width * self.itemsize)
