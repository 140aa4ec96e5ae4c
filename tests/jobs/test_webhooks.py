"""Who is to be told that a job has ended: noted with its end, claimed once, tried again, and given up some day."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs.job import JobStatus
from jobs.store.database import Database
from jobs.store.jobs import JobQueue
from jobs.store.webhooks import (
    CLAIM_SECONDS,
    EVENT_TYPES,
    GIVEN_UP_SECONDS,
    MOST_ENDPOINTS,
    TooManyEndpointsError,
    WebhookTable,
)
from tests.support.queue_kit import CANCELLED, FAILED, PAUSED, QUEUED, SUCCEEDED, Clock, bring_to

pytest_plugins = ["tests.support.queue_kit"]

URL = "https://example.org/hook"


@pytest.fixture
def table(url: str, queue: JobQueue, clock: Clock) -> Iterator[WebhookTable]:
    database = Database(url)
    yield WebhookTable(database, clock)
    database.close()


@pytest.mark.parametrize("status", [SUCCEEDED, FAILED, CANCELLED])
def test_the_end_of_a_job_is_for_its_tenant_s_endpoints_that_want_it(
    table: WebhookTable, queue: JobQueue, status: JobStatus
) -> None:
    kind = f"fine_tuning.job.{status}"
    all_of_them = table.create("default", "all", URL, EVENT_TYPES)
    one = table.create("default", "one", URL, {kind})
    table.create("default", "others", URL, set(EVENT_TYPES) - {kind})
    table.create("another", "all", URL, EVENT_TYPES)
    bring_to(queue, PAUSED, "paused")
    assert table.claim(9) == []
    job = bring_to(queue, status)
    assert not queue.move(job.id, QUEUED, CANCELLED, message="too late")
    found = table.claim(9)
    assert {delivery.endpoint.id for delivery in found} == {all_of_them.id, one.id}
    assert {(delivery.event_type, delivery.job_id) for delivery in found} == {(kind, job.id)}
    assert len({delivery.id for delivery in found}) == 2


def test_a_delivery_is_one_sender_s_until_it_dies_and_comes_later_each_time(
    table: WebhookTable, queue: JobQueue, clock: Clock
) -> None:
    endpoint = table.create("default", "all", URL, EVENT_TYPES)
    for name in "abcdef":
        bring_to(queue, FAILED, name)
    with ThreadPoolExecutor(3) as senders:
        claimed = [delivery for found in senders.map(table.claim, [2, 2, 2]) for delivery in found]
    assert len({delivery.id for delivery in claimed}) == len(claimed) == 6 and table.claim(9) == []
    for delivery in claimed[1:]:
        table.delivered(delivery.id)
    clock.now += CLAIM_SECONDS
    assert table.claim(9, busy=[endpoint.id]) == [] and table.claim(9, busy_tenants=["default"]) == []
    for attempt, wait in enumerate((20, 80, 320, 1280, 5120, 20480, 21600), 2):
        (again,) = table.claim(9)
        assert (again.id, again.attempts) == (claimed[0].id, attempt) and table.put_off(again)
        clock.now += 0.75 * wait
        assert table.claim(9) == []
        clock.now += 0.5 * wait
    clock.now += GIVEN_UP_SECONDS
    (last,) = table.claim(9)
    assert not table.put_off(last)
    clock.now += GIVEN_UP_SECONDS
    assert table.claim(9) == []


def test_endpoints_are_changed_rotated_and_deleted(table: WebhookTable, queue: JobQueue, clock: Clock) -> None:
    endpoint = table.create("default", "all", URL, EVENT_TYPES)
    bring_to(queue, FAILED)
    table.update(endpoint, url=f"{URL}/2", event_types={EVENT_TYPES[0]})
    table.rotate(endpoint, keep_old=True)
    (delivery,) = table.claim(9)
    changed = delivery.endpoint
    assert (changed.url, changed.event_types) == (f"{URL}/2", EVENT_TYPES[:1])
    assert changed.secrets(clock.now) == [changed.secret, endpoint.secret]
    assert changed.secrets(clock.now + 86400) == [changed.secret]
    table.rotate(changed, keep_old=False)
    (found,) = table.list("default")
    assert found.secrets(clock.now) == [found.secret] and found.secret not in (changed.secret, endpoint.secret)
    table.delete(endpoint)
    clock.now += CLAIM_SECONDS
    assert table.claim(9) == [] and table.find("default", endpoint.id) is None
    for _ in range(MOST_ENDPOINTS):
        table.create("default", "x", URL, EVENT_TYPES)
    with pytest.raises(TooManyEndpointsError, match="delete one first"):
        table.create("default", "x", URL, EVENT_TYPES)
    assert table.create("another", "x", URL, EVENT_TYPES)
