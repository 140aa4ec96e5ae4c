"""What each step computes: order, slots, budgets, prompts in chunks; and which beginnings of prompts are shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.inference.kv_cache import MIN_SHARED_TOKENS, SlotKVCache, fitting, open_kv_cache
from lora_core.inference.paged_kv_cache import PagedKVCache
from lora_core.inference.scheduler import RequestScheduler, Run, WaitingRequest
from lora_core.models.base import load_base
from lora_core.models.forward import open_forward
from lora_core.models.paged_kv import PAGE_TOKENS, PagedKV
from tests.support.tiny_models import save_tiny_model


class Slots:
    """`count` of them, which know the first `shared` tokens of every prompt."""

    def __init__(self, count: int, shared: int = 0) -> None:
        self.free, self.shared = list(range(count)), shared

    def take(self, request: int) -> tuple[int, int] | None:
        return (self.free.pop(0), self.shared) if self.free else None

    def release(self, slot: int) -> None:
        assert slot not in self.free
        self.free.insert(0, slot)


def scheduler_of(slots: Slots, prefill_tokens: int = 100, mixed_tokens: int = 100) -> RequestScheduler:
    return RequestScheduler(slots.take, slots.release, prefill_tokens=prefill_tokens, mixed_tokens=mixed_tokens)


def test_first_come_first_served_into_free_slots() -> None:
    scheduler = scheduler_of(Slots(2))
    for request in (10, 11, 12):
        scheduler.add(WaitingRequest(request, 5))
    assert scheduler.next_step() == [Run(10, 0, 0, 5, True), Run(11, 1, 0, 5, True)]
    assert scheduler.next_step() == [Run(10, 0, 5, 1, True), Run(11, 1, 5, 1, True)]  # full
    scheduler.remove(10)
    assert scheduler.next_step() == [Run(11, 1, 6, 1, True), Run(12, 0, 0, 5, True)]  # the freed slot is used at once


def test_a_long_prompt_is_read_beside_those_who_decode() -> None:
    scheduler = scheduler_of(Slots(4), prefill_tokens=100, mixed_tokens=30)
    scheduler.add(WaitingRequest(0, 5))
    scheduler.next_step()
    scheduler.add(WaitingRequest(1, 70))
    scheduler.add(WaitingRequest(2, 10))
    steps = [scheduler.next_step() for _ in range(3)]
    assert all(Run(0, 0, 5 + number, 1, True) in step for number, step in enumerate(steps)), "it waits for no prompt"
    assert [step[1] for step in steps] == [Run(1, 1, 0, 30, False), Run(1, 1, 30, 30, False), Run(1, 1, 60, 10, True)]
    assert [step[2:] for step in steps] == [[], [], [Run(2, 2, 0, 10, True)]]  # what the long one leaves of the budget


def test_short_prompts_share_a_step() -> None:
    scheduler = scheduler_of(Slots(8), prefill_tokens=100)
    for request, tokens in enumerate([60, 30, 20, 500, 1]):
        scheduler.add(WaitingRequest(request, tokens))
    assert [(run.request, run.tokens, run.last) for run in scheduler.next_step()] == [
        (0, 60, True), (1, 30, True), (2, 10, False),
    ]  # fmt: skip


def test_a_prompt_is_read_from_where_it_is_known() -> None:
    scheduler = scheduler_of(Slots(1, shared=8))
    scheduler.add(WaitingRequest(0, 12))
    assert scheduler.next_step() == [Run(0, 0, 8, 4, True)]


def test_a_waiting_request_can_leave_the_line() -> None:
    scheduler = scheduler_of(Slots(1))
    for request in range(3):
        scheduler.add(WaitingRequest(request, 1))
    scheduler.remove(0)
    scheduler.remove(1)
    assert [run.request for run in scheduler.next_step()] == [2]
    assert (scheduler.running, scheduler.waiting) == (1, 0)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 60)),
        st.tuples(st.just("remove"), st.integers(0, 30)),
        st.tuples(st.just("step"), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(EVENTS, st.integers(1, 5), st.integers(0, 3))
def test_whatever_happens_the_rules_hold(events: list[tuple[str, int]], count: int, shared: int) -> None:
    slots = Slots(count, shared)
    scheduler = scheduler_of(slots, prefill_tokens=50, mixed_tokens=20)
    prompts: list[int] = []
    done: dict[int, int] = {}  # tokens computed of each that runs
    live: set[int] = set()
    admitted: list[int] = []
    for kind, number in events:
        if kind == "add":
            live.add(len(prompts))
            scheduler.add(WaitingRequest(len(prompts), number))
            prompts.append(number)
        elif kind == "remove" and number in live:
            live.remove(number)
            done.pop(number, None)
            scheduler.remove(number)
        elif kind == "step":
            runs = scheduler.next_step()
            decoding = {request for request, tokens in done.items() if tokens >= prompts[request]}
            assert decoding <= {run.request for run in runs}, "whoever decodes gets a token in every step"
            prompt_tokens = sum(run.tokens for run in runs if run.request not in decoding)
            assert prompt_tokens <= (20 if decoding else 50)
            for run in runs:
                assert run.start == done.get(run.request, shared), "nothing twice, nothing left out"
                assert (
                    run.tokens == 1
                    if run.request in decoding
                    else run.start + run.tokens <= max(prompts[run.request], shared + 1)
                )
                admitted += [] if run.request in done else [run.request]
                done[run.request] = run.start + run.tokens
                assert run.last == (done[run.request] >= prompts[run.request])
            assert len({run.slot for run in runs}) == len(runs) and len(done) <= count and done.keys() <= live
    assert admitted == sorted(admitted), "first come, first served"
    assert scheduler.running == len(done) == count - len(slots.free) and scheduler.waiting == len(live) - len(done)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> SlotKVCache:
    folder = tmp_path_factory.mktemp("cache-model")
    base = load_base(str(save_tiny_model("llama", folder)), precision="fp32", cache_dir=folder / "cache")
    cache = open_kv_cache(open_forward(base), slots=3, context=64)
    assert isinstance(cache, SlotKVCache)
    return cache


def test_beginnings_are_shared_by_content_alone(cache: SlotKVCache) -> None:
    prompt = list(range(10, 30))

    def computed(slot: int, start: int, ids: list[int]) -> None:
        cache.step([Run(0, slot, start, len(ids), True)], [ids])

    assert cache.take(prompt, "one", 64) == (0, 0)
    computed(0, 0, prompt)
    assert cache.take(prompt, "two", 64) == (1, 0), "another adapter's keys are other keys"
    computed(1, 0, prompt)
    assert cache.take([*prompt[:15], 99, 98], "one", 64) == (2, 15), "of one that still runs"
    assert all(bool((memory[2, :, :15] == memory[0, :, :15]).all()) for memory in (*cache.keys, *cache.values))
    assert cache.take(prompt, "one", 64) is None
    cache.release(0)
    assert cache.take(prompt, "one", 64) == (0, 19), (
        "in its place; the last token is computed, as its logits are asked for"
    )
    computed(0, 19, prompt[19:])
    cache.release(1)
    assert cache.take([*prompt[: MIN_SHARED_TOKENS - 1], 5, 5], "one", 64) == (1, 0), "too short a beginning"
    cache.release(1)
    assert cache.take(prompt, None, 64) == (1, 0), "without a digest nothing is shared"
    computed(1, 0, prompt)
    cache.release(1)
    assert cache.take(prompt, None, 64) == (1, 0)


def test_the_slot_that_was_used_longest_ago_is_taken(tmp_path: Path, cache: SlotKVCache) -> None:
    for slot in range(3):
        cache.release(slot)
    for slot in (1, 0, 2):
        cache.release(slot)
    assert cache.take([1, 2], "other", 64) == (1, 0)


def test_what_is_kept_on_a_gpu_leaves_three_quarters_of_what_is_free() -> None:
    gib = 2**30
    assert [fitting(gib, free * gib, least=2, most=32) for free in (1, 12, 100, 1000)] == [2, 3, 25, 32]


class Pages:
    """A paged cache and what its pages hold: whose, and all tokens from the sequence's first one on."""

    def __init__(self, pages: int, slots: int) -> None:
        kv = PagedKV(
            layers=1, heads=1, kv_heads=1, head_size=1, pages=pages, slots=slots, context=6 * PAGE_TOKENS,
            dtype=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
        self.kv, self.cache = kv, PagedKVCache(kv)
        self.held: dict[int, tuple[str | None, list[int]]] = {}
        self.running: dict[int, tuple[str | None, list[int], int]] = {}  # owner, tokens, at most

    def take(self, owner: str | None, prompt: list[int], more: int, share: bool) -> int | None:
        """Tokens that are there already; None where there is no room."""
        most = min(len(prompt) + more, self.kv.context)
        free = self.cache.free_pages
        taken = self.cache.take(prompt, owner, most, share=share)
        pages = -(-most // PAGE_TOKENS)
        if taken is None:
            assert len(self.running) == len(self.kv.table) or pages > free - self._idle(prompt, owner), "there was room"
            return None
        slot, shared = taken
        assert slot not in self.running and shared < len(prompt) and shared % PAGE_TOKENS == 0
        for page, end in zip(self._pages(slot, shared), range(PAGE_TOKENS, shared + 1, PAGE_TOKENS), strict=True):
            assert self.held[page] == (owner, prompt[:end]) and owner is not None and share
        for page in self._pages(slot, most)[shared // PAGE_TOKENS :]:
            assert all(page not in self._pages(other, len(of[1])) for other, of in self.running.items()), "is another's"
        self.running[slot] = owner, prompt[:shared], most
        self._compute(slot, prompt[shared:])
        return shared

    def go_on(self, slot: int, token: int) -> None:
        if len(self.running[slot][1]) < self.running[slot][2]:
            self._compute(slot, [token])

    def release(self, slot: int) -> None:
        self.cache.release(slot)
        del self.running[slot]

    def _compute(self, slot: int, ids: list[int]) -> None:
        owner, tokens, _ = self.running[slot]
        self.cache.step([Run(0, slot, len(tokens), len(ids), True)], [ids])
        pages = self._pages(slot, len(tokens) + len(ids))
        for token in ids:
            tokens.append(token)
            self.held[pages[(len(tokens) - 1) // PAGE_TOKENS]] = owner, list(tokens)

    def _pages(self, slot: int, tokens: int) -> list[int]:
        return [int(page) for page in self.kv.table[slot, : -(-tokens // PAGE_TOKENS)]]

    def _idle(self, prompt: list[int], owner: str | None) -> int:
        return len(prompt) // PAGE_TOKENS if owner is not None else 0


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_pages_are_shared_by_content_and_lost_by_nobody(data: st.DataObject) -> None:
    """Random sequences come, go on and go; what is shared holds those tokens of that owner, and all pages come back."""
    count = data.draw(st.integers(6, 14))
    pages = Pages(count, data.draw(st.integers(1, 4)))
    for _ in range(data.draw(st.integers(1, 40))):
        kind = data.draw(st.sampled_from(["take", "go on", "release"]))
        if kind == "take":
            beginning = [data.draw(st.sampled_from([1, 2]))] * data.draw(st.sampled_from([5, 16, 33, 50]))
            prompt = beginning + data.draw(st.lists(st.integers(3, 5), max_size=20))
            owner, more = data.draw(st.sampled_from(["one", "two", None])), data.draw(st.integers(0, 30))
            pages.take(owner, prompt[: pages.kv.context], more, data.draw(st.booleans()))
        elif pages.running:
            slot = data.draw(st.sampled_from(sorted(pages.running)))
            if kind == "go on":
                for token in data.draw(st.lists(st.integers(3, 5), min_size=1, max_size=20)):
                    pages.go_on(slot, token)
            else:
                pages.release(slot)
    for slot in list(pages.running):
        pages.release(slot)
    assert pages.cache.free_pages == count


def test_a_beginning_in_pages_is_found_again() -> None:
    prompt = list(range(3, 3 + 2 * PAGE_TOKENS))
    pages = Pages(pages=6, slots=2)
    assert pages.take("one", prompt, 8, share=True) == 0
    assert pages.take("one", [*prompt, 99], 0, share=True) == 2 * PAGE_TOKENS, "of one that still runs"
    assert pages.take("one", prompt, 0, share=True) is None, "no slot"
    first, second = pages.running
    pages.release(first)
    assert pages.cache.free_pages == 3, "who still runs reads two of its pages"
    pages.release(second)
    assert pages.take("one", prompt, 0, share=True) == PAGE_TOKENS, "the last token's logits are asked for"
    assert pages.take("two", [7] * 5 * PAGE_TOKENS, 0, share=True) is None, "six pages, two of which are in use"
    pages.release(next(iter(pages.running)))
    assert pages.take("two", [7] * 6 * PAGE_TOKENS, 0, share=True) == 0, "its memory is wanted"
    pages.release(next(iter(pages.running)))
    assert pages.take("one", prompt, 0, share=True) == 0
    pages = Pages(pages=4, slots=2)
    pages.take("one", [*prompt, 99], 0, share=True)
    pages.release(next(iter(pages.running)))
    assert pages.take("one", [*prompt, 99], 60, share=True) is None, "two to share and two others are not six"
    assert pages.cache.free_pages == 4
