"""Whether a job beside others computes the same bits as alone on this CPU, asked of its products, not of its name.

Jobs share frozen products, whose rows do not touch. Whether a row has the same bits whatever rows are beside it is up
to the library that multiplies: it may split the inner dimension where rows are few, take another kernel for the last
ones, or round by where a row lies in memory. MKL does the first on Intel unless it is asked not to, and the others on
AMD. What was seen of all these depends on sizes, threads and the library's version, so each base's own products decide:

    rows alone are rows beside others                      chunks lie end to end as they are
    they are where chunks begin and end at eights          chunks are padded to `PAD_TO_MULTIPLE_OF`
    they are not, but a product repeats itself             every chunk is a batch of its own
    it does not                                            training is not exact here, and says so
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_core.adapters.dora import weight_of
from lora_core.adapters.targets import in_and_out
from lora_core.data.packing import PAD_TO_MULTIPLE_OF
from lora_core.kernels.operands import EXACT_DTYPES

log = logging.getLogger("lora.engine")

PRODUCT_ROWS = 384
"""Rows of the product that others are compared with, or 128 for each thread: seen with two threads on Intel, MKL splits
the inner dimension of products of up to 256.
"""

_PADDED = ((0, 8), (8, 16), (24, 24), (16, 72), (8, 136))
_AS_THEY_ARE = ((0, 1), (3, 1), (5, 2), (0, 3), (8, 5), (1, 6), (13, 7), (2, 9), (0, 11), (7, 13), (29, 27), (5, 131))
"""(first row, rows) of chunks in that product."""

_SERVED = (
    (0, 1), (3, 2), (5, 3), (0, 4), (7, 5), (2, 8), (9, 15), (0, 16), (3, 17), (5, 31), (1, 33), (8, 64), (7, 65),
    (29, 131),
)  # fmt: skip
"""The same of what is served; the head has as few rows as there are sequences."""

SERVED_ROWS = 1056
"""Rows of the product that those are compared with: a step's prompts, and answers beside them."""

SERVED_HEAD_ROWS = 40
"""The same of the head, which is wide, and of few rows but where a prompt's log-probabilities are asked for."""

_RANK = 16  # of the adapter whose products are compared


@dataclass(frozen=True)
class Exactness:
    """How chunks are laid out so that a job beside others equals the same job alone bit for bit.

    Chunks are padded to a multiple of `pad_to_multiple_of` tokens; they share a batch if `joined`. `promised` is False
    where nobody promises bits (bf16, GPUs); `problem` says why the promise cannot be kept.
    """

    pad_to_multiple_of: int = PAD_TO_MULTIPLE_OF
    joined: bool = True
    promised: bool = False
    problem: str | None = None

    def __str__(self) -> str:
        if self.problem is not None:
            return f"not exact on this CPU: {self.problem}"
        if not self.promised:
            return "by formula: bits are promised in fp32 on CPU alone"
        if not self.joined:
            return "bit for bit, a chunk at a time"
        return "bit for bit"

    @staticmethod
    def of_all(ranks: Iterable[Exactness]) -> Exactness:
        """What keeps the promise on every rank; all must lay out alike to stay in step."""
        ranks = list(ranks)
        return Exactness(
            pad_to_multiple_of=max(rank.pad_to_multiple_of for rank in ranks),
            joined=all(rank.joined for rank in ranks),
            promised=all(rank.promised for rank in ranks),
            problem=next((rank.problem for rank in ranks if rank.problem is not None), None),
        )


def ask_for_exact_products() -> None:
    """Have MKL compute a row alike whatever rows are beside it: its strict mode, with the widest vectors there are.

    It counts if it is in the environment before MKL's first product in this process, also after `import torch`; later
    it is ignored without a word, and so would be a mode that this CPU has not. Measured on Intel (AVX-512, two
    threads): nothing from 64 rows on, up to 1.5 times as long at 8 rows of small matrices, 2 to 3 times at one row,
    which is never multiplied by itself. Whoever has set MKL_CBWR keeps what he chose.
    """
    vectors = "AVX512" if torch.cpu.get_capabilities().get("avx512_f") else "AVX2"
    os.environ.setdefault("MKL_CBWR", f"{vectors},STRICT")


@dataclass(frozen=True)
class FrozenProduct:
    """A product with a frozen weight, of rows `[n, inputs]`, and its input's gradient; those of one `kind` compute
    alike.
    """

    kind: tuple[object, ...]
    inputs: int
    outputs: int
    dtype: torch.dtype
    forward: Callable[[Tensor], Tensor]
    input_gradient: Callable[[Tensor], Tensor]

    @staticmethod
    def of_linear(linear: nn.Module) -> FrozenProduct:
        """As a module of the model multiplies."""
        weight = linear.weight
        assert isinstance(weight, Tensor)
        has_bias = getattr(linear, "bias", None) is not None
        return FrozenProduct(
            (type(linear), has_bias),
            *in_and_out(linear),
            weight.dtype,
            lambda rows: linear.forward(rows[None])[0],
            lambda rows: rows @ weight_of(linear),
        )

    @property
    def key(self) -> _Key:
        """What its bits depend on."""
        return self.kind, self.inputs, self.outputs, self.dtype, torch.get_num_threads()


_Key = tuple[tuple[object, ...], int, int, torch.dtype, int]
_answers: dict[_Key, Exactness] = {}


@torch.no_grad()
def exactness_of(products: Iterable[FrozenProduct], device: torch.device, dtype: torch.dtype) -> Exactness:
    """How a base that computes these keeps the promise with as many threads as there are now: measured once a process.

    It multiplies about 850 rows with each kind of product and back: 8 GFLOP for a model of 135 M parameters.
    """
    if device.type != "cpu" or dtype not in EXACT_DTYPES:
        return Exactness()
    kinds = {product.key: product for product in products}
    for key, product in kinds.items():
        if key not in _answers:
            _answers[key] = _measured(product)
    found = Exactness.of_all([*map(_answers.__getitem__, kinds), Exactness(pad_to_multiple_of=1, promised=True)])
    log.log(
        logging.INFO if found.joined and found.problem is None else logging.WARNING,
        "event=exactness answer=%r pad_to_multiple_of=%d joined=%s threads=%d mkl_cbwr=%s%s",
        str(found), found.pad_to_multiple_of, found.joined, torch.get_num_threads(), os.environ.get("MKL_CBWR"),
        "" if found.joined else " advice='set MKL_CBWR before the first product to train jobs side by side'",
    )  # fmt: skip
    return found


def _measured(frozen: FrozenProduct) -> Exactness:
    """Compared in its own products: the output, and the gradient of its input."""
    rows = max(PRODUCT_ROWS, 128 * torch.get_num_threads())
    stream, widths = torch.Generator().manual_seed(0), (frozen.inputs, frozen.outputs)
    x, dy = (torch.randn(rows, width, dtype=frozen.dtype, generator=stream) for width in widths)
    products = _Product(x, frozen.forward), _Product(dy, frozen.input_gradient)
    if all(_rows_are_theirs(product, _PADDED) for product in products):
        as_they_are = all(_rows_are_theirs(product, _AS_THEY_ARE) for product in products) and _slices_are_alike(x, dy)
        return Exactness(pad_to_multiple_of=1 if as_they_are else PAD_TO_MULTIPLE_OF, promised=True)
    if all(_repeats(product) for product in products):
        return Exactness(joined=False, promised=True)
    size = f"{frozen.inputs} x {frozen.outputs}"
    return Exactness(joined=False, problem=f"a product of its {size} linears comes out otherwise each time")


@torch.no_grad()
def served_rows_are_alike(products: Iterable[FrozenProduct], rows: int) -> bool:
    """Whether rows have the same bits whatever is served beside them, in products of up to so many, with the threads of
    now; `forward` of each product is what serves.
    """
    stream = torch.Generator().manual_seed(0)
    kinds = {product.key: product for product in products}.values()
    sources = [torch.randn(rows, kind.inputs, dtype=kind.dtype, generator=stream) for kind in kinds]
    chunks = [(first, count) for first, count in _SERVED if first + count <= rows]
    return all(_rows_are_theirs(_Product(x, kind.forward), chunks) for x, kind in zip(sources, kinds, strict=True))


@dataclass(frozen=True)
class _Product:
    """A function of rows, each of which should depend on that row of `source` alone."""

    source: Tensor
    of: Callable[[Tensor], Tensor]


def _rows_are_theirs(product: _Product, chunks: Iterable[tuple[int, int]]) -> bool:
    together = product.of(product.source)
    return all(
        torch.equal(product.of(product.source[first : first + rows].clone()), together[first : first + rows])
        for first, rows in chunks
    )


def _repeats(product: _Product) -> bool:
    """Whether the same chunk alone has the same bits again."""
    for _, rows in (*_PADDED, *_AS_THEY_ARE):
        chunk = product.source[:rows]
        if not torch.equal(product.of(chunk.clone()), product.of(chunk.clone())):
            return False
    return True


def _slices_are_alike(x: Tensor, dy: Tensor) -> bool:
    """Whether an adapter's own products, which are of one chunk's rows alone, are the same wherever the chunk lies, and
    beside however many columns of other adapters.
    """
    stream = torch.Generator().manual_seed(1)
    a, b = (torch.randn(_RANK, wide.shape[1], dtype=x.dtype, generator=stream) for wide in (x, dy))
    for first, rows in (*_PADDED, *_AS_THEY_ARE):
        for source, narrow in ((x, a), (dy, b)):
            here = source[first : first + rows]
            there = here.clone()
            h = F.linear(there, narrow)
            beside = here.new_empty(rows, 3 * _RANK)[:, :_RANK].copy_(h)
            if not torch.equal(F.linear(here, narrow), h) or not torch.equal(beside.t() @ here, h.t() @ there):
                return False
            if not torch.equal(here.addmm(beside, narrow), there.addmm(h, narrow)):
                return False
    return True
