"""The chunked loss is cross-entropy summed by chunk, with its gradient, a few rows of logits at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.models.hooks import loss
from lora_core.models.hooks.loss import chunk_losses, chunk_scores

WEIGHT = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))


def logits_of(hidden: Tensor) -> Tensor:
    return hidden @ WEIGHT.to(hidden.dtype).t()


def head(hidden: Tensor, chunk: int, rows: Tensor) -> Tensor:
    return logits_of(hidden)


def capped_head(hidden: Tensor, chunk: int, rows: Tensor) -> Tensor:
    return torch.tanh(logits_of(hidden) / 3.0) * 3.0


def chunk(rows: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 50, (len(rows),), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(rows, dtype=torch.int64), labels


CHUNKS = [chunk([0, 1, 2, 5]), chunk([9], seed=1), chunk(list(range(12, 30)), seed=2), chunk([], seed=3)]


def hidden_rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


@pytest.mark.parametrize("function", [head, capped_head])
@pytest.mark.parametrize("slice_rows", [1, 4, 7, 512])
def test_losses_and_gradient_are_cross_entropys(
    function: object, slice_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(function)
    monkeypatch.setattr(loss, "SLICE_ROWS", slice_rows)
    hidden, same = hidden_rows(torch.float64), hidden_rows(torch.float64)
    losses = chunk_losses(hidden, function, CHUNKS)
    expected = torch.stack(
        [
            F.cross_entropy(function(same[rows], number, rows), labels, reduction="sum")
            for number, (rows, labels) in enumerate(CHUNKS)
        ]
    )
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)  # each chunk by its own factor
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(hidden.grad, same.grad, rtol=1e-12, atol=1e-12)
    assert hidden.grad is not None
    assert not hidden.grad[[3, 4, 6, 10, 31]].any()  # rows without a label


def test_only_label_rows_meet_the_head_and_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "SLICE_ROWS", 5)
    seen: list[int] = []

    def counting(part: Tensor, chunk: int, rows: Tensor) -> Tensor:
        assert torch.equal(part, hidden[rows])
        assert set(rows.tolist()) <= set(CHUNKS[chunk][0].tolist())
        seen.append(len(part))
        return logits_of(part)

    hidden = hidden_rows()
    chunk_losses(hidden, counting, CHUNKS)
    assert max(seen) == 5
    assert sum(seen) == 23


def test_without_gradient_the_losses_are_the_same() -> None:
    hidden = hidden_rows(torch.float64)
    losses = chunk_losses(hidden, head, CHUNKS).detach()
    torch.testing.assert_close(chunk_scores(hidden, head, CHUNKS)[:, 0], losses, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_softmax_is_taken_in_fp32_or_wider(dtype: torch.dtype, wide: torch.dtype) -> None:
    hidden = hidden_rows(dtype)
    losses = chunk_losses(hidden, head, CHUNKS)
    assert losses.dtype == wide
    expected = torch.stack(
        [F.cross_entropy(logits_of(hidden[rows]).to(wide), labels, reduction="sum") for rows, labels in CHUNKS]
    )
    rounding = 64 * torch.finfo(wide).eps  # of up to 18 rows' losses, each a sum of 50 exponentials
    torch.testing.assert_close(losses, expected, rtol=rounding, atol=0)
    losses.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype


def test_nan_of_one_chunk_stays_there() -> None:
    def run(poison: bool) -> tuple[Tensor, Tensor]:
        hidden = hidden_rows()
        if poison:
            with torch.no_grad():
                hidden[12:30] = math.nan
        losses = chunk_losses(hidden, head, CHUNKS)
        losses.sum().backward()
        assert hidden.grad is not None
        return losses.detach(), hidden.grad

    (losses, gradient), (clean_losses, clean_gradient) = run(poison=True), run(poison=False)
    assert bool(losses[2].isnan())
    assert torch.equal(losses[[0, 1, 3]], clean_losses[[0, 1, 3]])
    assert torch.equal(gradient[:12], clean_gradient[:12])
