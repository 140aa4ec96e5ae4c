"""Who runs when: order, slots, budget, and one adapter's requests side by side."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_core.inference.scheduler import RequestScheduler, WaitingRequest


def test_first_come_first_served_into_free_slots() -> None:
    scheduler = RequestScheduler(slots=2, prefill_tokens=100)
    for request in (10, 11, 12):
        scheduler.add(WaitingRequest(request, group=0, prompt_tokens=5))
    plan = scheduler.next_step()
    assert plan.prefill == ((10, 0), (11, 1)) and plan.decode == ()
    assert scheduler.next_step().prefill == ()  # full
    scheduler.remove(10)
    plan = scheduler.next_step()
    assert plan.prefill == ((12, 0),) and plan.decode == ((11, 1),)  # a freed slot is used in the next step


def test_low_slots_first() -> None:
    scheduler = RequestScheduler(slots=3, prefill_tokens=100)
    for request in range(3):
        scheduler.add(WaitingRequest(request, group=0, prompt_tokens=5))
    scheduler.next_step()
    for request in (2, 0, 1):
        scheduler.remove(request)
    scheduler.add(WaitingRequest(3, group=0, prompt_tokens=5))
    assert scheduler.next_step().prefill == ((3, 0),)


def test_a_long_queue_of_prompts_does_not_hold_up_those_who_decode() -> None:
    scheduler = RequestScheduler(slots=8, prefill_tokens=100)
    for request, tokens in enumerate([60, 30, 20, 500, 1]):
        scheduler.add(WaitingRequest(request, group=0, prompt_tokens=tokens))
    assert [r for r, _ in scheduler.next_step().prefill] == [0, 1]  # 60 + 30 fit in 100, 20 more do not
    assert [r for r, _ in scheduler.next_step().prefill] == [2]  # nobody overtakes the one of 500
    plan = scheduler.next_step()
    assert [r for r, _ in plan.prefill] == [3]  # a prompt above the budget gets a step of its own
    assert sorted(r for r, _ in plan.decode) == [0, 1, 2]
    assert [r for r, _ in scheduler.next_step().prefill] == [4]


def test_a_waiting_request_can_leave_the_line() -> None:
    scheduler = RequestScheduler(slots=1, prefill_tokens=10)
    for request in range(3):
        scheduler.add(WaitingRequest(request, 0, 1))
    scheduler.remove(0)
    scheduler.remove(1)
    assert scheduler.next_step().prefill == ((2, 0),)
    assert (scheduler.running, scheduler.waiting) == (1, 0)


events = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 3), st.integers(1, 60)),
        st.tuples(st.just("remove"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("step"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(events, st.integers(1, 5))
def test_whatever_happens_the_rules_hold(events: list[tuple[str, int, int]], slots: int) -> None:
    scheduler = RequestScheduler(slots=slots, prefill_tokens=50)
    groups: dict[int, int] = {}
    live: set[int] = set()
    running: dict[int, int] = {}
    admitted: list[int] = []
    for kind, first, second in events:
        if kind == "add":
            request = len(groups)
            groups[request] = first
            live.add(request)
            scheduler.add(WaitingRequest(request, first, second))
        elif kind == "remove" and first in live:
            live.remove(first)
            running.pop(first, None)
            scheduler.remove(first)
        elif kind == "step":
            plan = scheduler.next_step()
            assert dict(plan.decode) == running, "all that were running decode, each in its slot"
            assert len(list(groupby(groups[r] for r, _ in plan.decode))) == len({groups[r] for r in running}), (
                "side by side"
            )
            running |= dict(plan.prefill)
            admitted += [r for r, _ in plan.prefill]
            assert len(set(running.values())) == len(running) <= slots and set(running) <= live
            assert plan.prefill or len(running) == slots or not live - set(running), "a free slot and somebody waiting"
    assert admitted == sorted(admitted), "first come, first served"
    assert scheduler.running == len(running) and scheduler.waiting == len(live) - len(running)
