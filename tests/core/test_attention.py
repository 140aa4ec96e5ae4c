"""A document that is packed with others computes what it computes alone in transformers' own eager attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_core.models import attention_cpu as cpu_attention
from lora_core.models.attention import AttentionSpec, DocumentAttention, PackedAttention, scaled_dot_product
from lora_core.models.base import BaseModel
from tests.support.models import CONFIGS, VOCABULARY, relative, tiny_base, tiny_model

LENGTHS = [1, 5, 17, 2, 30]


def packed_logits(base: BaseModel, documents: list[Tensor]) -> list[Tensor]:
    lengths = [len(document) for document in documents]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    hidden = base.hidden(torch.cat(documents)[None], positions, PackedAttention(lengths))
    return list(base.head(hidden)[0].split(lengths))


def random_documents(lengths: list[int], seed: int = 0) -> list[Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=stream) for length in lengths]


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_document_equals_document_alone(kind: str) -> None:
    base, stock = tiny_base(kind, dtype=torch.float64), tiny_model(kind, attention="eager", dtype=torch.float64)
    documents = random_documents(LENGTHS)
    for document, logits in zip(documents, packed_logits(base, documents), strict=True):
        torch.testing.assert_close(logits, stock(document[None]).logits[0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_neighbouring_document_does_not_matter(kind: str) -> None:
    """Other tokens of the same number before and after leave every bit as it was."""
    base = tiny_base(kind)
    mine = random_documents([8])[0]
    before, after = random_documents([16, 8], seed=1), random_documents([16, 8], seed=2)
    ours = [packed_logits(base, [first, mine, last])[1] for first, last in (before, after)]
    assert torch.equal(ours[0], ours[1])
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
def test_nan_stays_in_its_document(window: int | None, softcap: float | None) -> None:
    lengths = [6, 5, 9]
    spec = AttentionSpec(scaling=0.3, sliding_window=window, softcap=softcap)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)

    def run(poison: bool) -> tuple[Tensor, list[Tensor]]:
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        inputs = [tensor.clone() for tensor in leaves]
        if poison:
            for tensor in inputs:
                tensor[:, :, 6:11] = float("nan")
        out = PackedAttention(lengths)(0, *inputs, spec)
        out.sum().backward()
        return out.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]

    (clean, clean_grads), (dirty, dirty_grads) = run(poison=False), run(poison=True)
    assert bool(dirty[:, :, 6:11].isnan().all())
    others = [*range(6), *range(11, 20)]
    assert torch.equal(clean[:, :, others], dirty[:, :, others])
    for clean_grad, dirty_grad in zip(clean_grads, dirty_grads, strict=True):
        assert torch.equal(clean_grad[:, :, others], dirty_grad[:, :, others])


@pytest.mark.parametrize("window", [None, 11])
def test_short_documents_in_bf16_take_another_path_to_the_same_result(window: int | None) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(1, heads, 40, 16, dtype=torch.bfloat16) for heads in (6, 2, 2)]
    spec = AttentionSpec(scaling=0.25, sliding_window=window)

    def run(dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (leaf.to(dtype).requires_grad_() for leaf in leaves)
        out = PackedAttention([40])(0, q, k, v, spec)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), weights)]

    for short, exact in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        assert relative(short, exact) < 2 * torch.finfo(torch.bfloat16).eps  # scores, p and their gradients are rounded


def test_causal_attention_by_hand() -> None:
    """softmax(q k^T * scaling) v over what came before, by loops."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 6, 8, dtype=torch.float64) for heads in (4, 2, 2))
    for softcap in (None, 1.5):
        for window in (None, 2):
            out = PackedAttention([6])(0, q, k, v, AttentionSpec(0.4, window, softcap))
            for head in range(4):
                for t in range(6):
                    first = 0 if window is None else max(0, t - window + 1)
                    scores = k[0, head // 2, first : t + 1] @ q[0, head, t] * 0.4
                    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
                    expected = scores.softmax(0) @ v[0, head // 2, first : t + 1]
                    torch.testing.assert_close(out[0, head, t], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_mask_says_what_a_decoded_token_sees(softcap: float | None) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 1, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 9, 8, dtype=torch.float64)
    mask = torch.zeros(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., :4] = mask[1, ..., 2:9] = True
    spec = AttentionSpec(0.4, softcap=softcap)
    out = scaled_dot_product(q, k, v, spec, mask)
    for row, seen in enumerate((slice(0, 4), slice(2, 9))):
        everything = torch.ones(1, 1, 1, seen.stop - seen.start, dtype=torch.bool)
        alone = scaled_dot_product(q[row, None], k[row, None, :, seen], v[row, None, :, seen], spec, everything)
        torch.testing.assert_close(out[row], alone[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept", [0, 512])
def test_written_out_gradients_are_those_of_autograd(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of documents longer and shorter than a block of queries, alike and not; long ones compute p again."""
    monkeypatch.setattr(cpu_attention, "KEPT_LENGTH", kept)
    lengths = [3, 3, 1, 150, 70, 70]
    torch.manual_seed(0)
    tokens = sum(lengths)
    q, k, v, do = (torch.randn(tokens, heads, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
    leaves = [part.clone().requires_grad_() for part in (q, k, v)]
    heads_first = (part.transpose(0, 1)[None] for part in leaves)
    expected = PackedAttention(lengths)(0, *heads_first, AttentionSpec(0.3))[0].transpose(0, 1)
    out, backward = DocumentAttention(lengths, [sum(lengths)], 0.3, torch.device("cpu"))(0, q, k, v, with_backward=True)
    torch.testing.assert_close(out, expected.flatten(1), rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(expected, leaves, do)
    torch.testing.assert_close(backward(do.flatten(1)), gradients, rtol=1e-12, atol=1e-12)


def test_written_out_nan_stays_in_its_document() -> None:
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(12, heads, 8) for heads in (4, 2, 2, 4))
    for part in (q, k, v, do):
        part[4:8] = torch.nan
    out, backward = DocumentAttention([4, 4, 4], [12], 0.3, torch.device("cpu"))(0, q, k, v, with_backward=True)
    for tensor in (out, *backward(do.flatten(1))):
        assert tensor[4:8].isnan().all()
        assert not tensor[:4].isnan().any() and not tensor[8:].isnan().any()
