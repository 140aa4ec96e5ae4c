"""Packing loses nothing, mixes nothing, and cuts a job by rules that look at that job alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.data.dataset import Example
from lora_core.data.packing import PAD_TO_MULTIPLE_OF, Chunk, PackedBatch, chunked, pack
from tests.support.models import micro_batches

CPU = torch.device("cpu")


@st.composite
def example_of(draw: st.DrawFn) -> Example:
    ids = draw(st.lists(st.integers(3, 99), min_size=1, max_size=20))
    mask = [False, *draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))]
    return Example(ids, mask)


jobs_of = st.lists(st.lists(example_of(), max_size=7), min_size=1, max_size=4)


def packed(jobs: list[list[Example]], limit: int, capacity: int) -> tuple[list[list[Chunk]], list[PackedBatch]]:
    chunks = [chunked(str(number), enumerate(examples), limit, 3) for number, examples in enumerate(jobs)]
    batches = micro_batches(chunks, capacity)
    return batches, [pack(batch, CPU) for batch in batches]


@settings(max_examples=150, deadline=None)
@given(jobs_of, st.integers(1, 40), st.integers(1, 80))
def test_every_label_is_predicted_once_from_the_token_before_it(
    jobs: list[list[Example]], limit: int, capacity: int
) -> None:
    """All documents arrive whole, labels sit one row behind their token, inside its document, and none is lost."""
    batches, laid = packed(jobs, limit, capacity)
    seen: dict[tuple[str, int], list[int]] = {}
    for batch, row in zip(batches, laid, strict=True):
        ids, positions = row.ids[0].tolist(), row.positions[0].tolist()
        assert sum(row.lengths) == len(ids) == len(positions) == sum(chunk.padded_tokens for chunk in row.chunks)
        assert positions == [t for length in row.lengths for t in range(length)]
        start = 0
        for chunk, out in zip(batch, row.chunks, strict=True):
            labels = dict(zip(out.label_indices.tolist(), out.labels.tolist(), strict=True))
            offset = start
            for place, example in chunk.examples:
                assert ids[offset : offset + len(example.ids)] == example.ids
                rows = slice(offset - start, offset - start + len(example.ids))
                assert out.example_indices[rows].tolist() == [place] * len(example.ids)
                assert out.positions[rows].tolist() == list(range(len(example.ids)))
                expected = {offset + t - 1: example.ids[t] for t, label in enumerate(example.labels_mask) if label}
                assert {at: labels.pop(at) for at in expected} == expected
                seen.setdefault((chunk.job, place), []).append(len(example.ids))
                offset += len(example.ids)
            assert not labels
            assert start + out.padded_tokens - offset in range(PAD_TO_MULTIPLE_OF)
            assert out.padded_tokens % PAD_TO_MULTIPLE_OF == 0
            assert len(out.example_indices) == len(out.positions) == out.padded_tokens
            start += out.padded_tokens
    everything = {(str(n), place): [len(e.ids)] for n, examples in enumerate(jobs) for place, e in enumerate(examples)}
    assert seen == everything


@settings(max_examples=150, deadline=None)
@given(jobs_of, st.integers(1, 40), st.integers(1, 80))
def test_chunks_and_their_order_are_a_jobs_own(jobs: list[list[Example]], limit: int, capacity: int) -> None:
    batches, _ = packed(jobs, limit, capacity)
    for number, examples in enumerate(jobs):
        alone, _ = packed([examples], limit, capacity=1000)
        colocated = [chunk.examples for batch in batches for chunk in batch if chunk.job == str(number)]
        assert colocated == [chunk.examples for batch in alone for chunk in batch]


@settings(max_examples=150, deadline=None)
@given(jobs_of, st.integers(1, 40), st.integers(1, 80))
def test_limits_are_kept_where_they_can_be(jobs: list[list[Example]], limit: int, capacity: int) -> None:
    batches, _ = packed(jobs, limit, capacity)
    for batch in batches:
        assert batch
        assert len(batch) == 1 or sum(chunk.padded_tokens for chunk in batch) <= capacity
        for chunk in batch:
            assert len(chunk.examples) == 1 or chunk.tokens <= limit


def test_chunks_are_filled_and_jobs_take_turns() -> None:
    def five(count: int) -> list[Example]:
        return [Example([3] * 5, [False] + [True] * 4) for _ in range(count)]

    chunks = [chunked(name, enumerate(five(count)), 10, 0) for name, count in (("a", 6), ("b", 2), ("c", 3))]
    assert [len(of_job) for of_job in chunks] == [3, 1, 2]
    order = [[chunk.job for chunk in batch] for batch in micro_batches(chunks, 40)]
    assert order == [["a", "b"], ["c", "a", "c"], ["a"]]
    assert micro_batches([], 25) == []
    assert micro_batches([[], []], 25) == []
