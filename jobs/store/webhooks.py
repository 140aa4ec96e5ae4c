"""Webhooks: where a tenant is told how its jobs ended, and what is still to be told.

A delivery is inserted in the transaction that ends its job, so that none is lost, and is there until its endpoint has
taken it. Any number of senders may look: who claims one has `CLAIM_SECONDS` for it, and where that dies with it,
another tries again.

    table.create("acme", "CI", "https://example.org/hook", {"fine_tuning.job.succeeded"})
    queue.move(...)                               the job ends: a delivery for every endpoint that wants to hear of it
    for delivery in table.claim(10):              send it, then
        table.delivered(delivery.id)              or table.put_off(delivery)
"""

from __future__ import annotations

import base64
import random
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from jobs.errors import JobError
from jobs.job import TERMINAL, JobStatus
from jobs.store.database import Database
from jobs.store.schema import jobs, webhook_deliveries, webhook_endpoints

EVENT_TYPES = tuple(f"fine_tuning.job.{status}" for status in JobStatus if status in TERMINAL)
MOST_ENDPOINTS = 20  # of a tenant
CLAIM_SECONDS = 60.0  # longer than a sender takes for one
FIRST_RETRY_SECONDS, RETRY_FACTOR, LONGEST_RETRY_SECONDS = 5.0, 4.0, 6 * 3600.0
GIVEN_UP_SECONDS = 72 * 3600.0
OLD_SECRET_SECONDS = 24 * 3600.0


class TooManyEndpointsError(JobError):
    """A tenant has as many endpoints as it may have."""

    def __str__(self) -> str:
        return f"there may be {MOST_ENDPOINTS} webhook endpoints; delete one first"


@dataclass(frozen=True, kw_only=True)
class WebhookEndpoint:
    """`old_secret` signs too, until `old_secret_until`."""

    id: str
    tenant: str
    name: str
    url: str
    event_types: tuple[str, ...]
    secret: str
    old_secret: str | None
    old_secret_until: float | None
    created_at: float
    updated_at: float

    def secrets(self, now: float) -> list[str]:
        """Return what a delivery is signed with at this time."""
        old = self.old_secret if (self.old_secret_until or 0) > now else None
        return [self.secret] if old is None else [self.secret, old]


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What an endpoint is to be told: its id stays the same however often that is tried."""

    id: str
    endpoint: WebhookEndpoint
    event_type: str
    job_id: str
    created_at: float
    attempts: int


class WebhookTable:
    """The endpoints and deliveries in one database. Methods raise DatabaseUnavailableError, UnstorableValueError."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._db, self._clock = database, clock

    def create(self, tenant: str, name: str, url: str, event_types: Collection[str]) -> WebhookEndpoint:
        """Add an endpoint with a new secret. Raises TooManyEndpointsError."""
        now = self._clock()
        endpoint = WebhookEndpoint(
            id=f"we_{secrets.token_hex(12)}",
            tenant=tenant,
            name=name,
            url=url,
            event_types=tuple(sorted(event_types)),
            secret=new_secret(),
            old_secret=None,
            old_secret_until=None,
            created_at=now,
            updated_at=now,
        )
        row = vars(endpoint) | {"event_types": " ".join(endpoint.event_types)}
        own = sa.select(sa.func.count()).where(webhook_endpoints.c.tenant == tenant)
        with self._db.write() as conn:
            if conn.execute(own).scalar_one() >= MOST_ENDPOINTS:
                raise TooManyEndpointsError
            conn.execute(sa.insert(webhook_endpoints).values(row))
        return endpoint

    def find(self, tenant: str, endpoint_id: str) -> WebhookEndpoint | None:
        """Return a tenant's endpoint; None where there is none of this id."""
        with self._db.read() as conn:
            row = conn.execute(sa.select(webhook_endpoints).where(*_own(tenant, endpoint_id))).one_or_none()
        return None if row is None else _endpoint(row)

    def list(self, tenant: str) -> Sequence[WebhookEndpoint]:
        """Return a tenant's endpoints, the newest first."""
        query = sa.select(webhook_endpoints).where(webhook_endpoints.c.tenant == tenant)
        newest = (webhook_endpoints.c.created_at.desc(), webhook_endpoints.c.id)
        with self._db.read() as conn:
            return [_endpoint(row) for row in conn.execute(query.order_by(*newest))]

    def update(self, endpoint: WebhookEndpoint, **values: Any) -> None:
        """Change name, url or event types; deliveries that wait go to where the endpoint is then."""
        if "event_types" in values:
            values["event_types"] = " ".join(sorted(values["event_types"]))
        self._change(endpoint, values)

    def rotate(self, endpoint: WebhookEndpoint, keep_old: bool) -> None:
        """Give an endpoint another secret; with `keep_old` the one that it has signs too, for a day."""
        until = self._clock() + OLD_SECRET_SECONDS if keep_old else None
        old = endpoint.secret if keep_old else None
        self._change(endpoint, {"secret": new_secret(), "old_secret": old, "old_secret_until": until})

    def delete(self, endpoint: WebhookEndpoint) -> None:
        """Remove an endpoint with what it was still to be told."""
        with self._db.write() as conn:
            conn.execute(sa.delete(webhook_deliveries).where(webhook_deliveries.c.endpoint_id == endpoint.id))
            conn.execute(sa.delete(webhook_endpoints).where(webhook_endpoints.c.id == endpoint.id))

    def claim(self, most: int, busy: Collection[str] = (), busy_tenants: Collection[str] = ()) -> Sequence[Delivery]:
        """Return deliveries whose time has come, of endpoints that are not `busy`, nor their tenants; nobody else gets
        them for a while, and by then each must have been delivered or put off.
        """
        now, rows = self._clock(), webhook_deliveries.c
        due = sa.select(webhook_deliveries.c.id).where(rows.next_at <= now, rows.endpoint_id.not_in(list(busy)))
        if busy_tenants:
            theirs = webhook_endpoints.c.tenant.in_(list(busy_tenants))
            due = due.where(rows.endpoint_id.not_in(sa.select(webhook_endpoints.c.id).where(theirs)))
        with self._db.read() as conn:  # most looks find nothing, and a write waits for all others
            if conn.execute(due.limit(1)).first() is None:
                return []
        claimed = due.order_by(rows.next_at).limit(most).with_for_update(skip_locked=True)
        with self._db.write() as conn:
            ids = list(conn.execute(claimed).scalars())
            mine = sa.update(webhook_deliveries).where(rows.id.in_(ids))
            # An endpoint may have been deleted while a job ended.
            gone = rows.endpoint_id.not_in(sa.select(webhook_endpoints.c.id))
            conn.execute(sa.delete(webhook_deliveries).where(rows.id.in_(ids), gone))
            conn.execute(mine.values(next_at=now + CLAIM_SECONDS, attempts=rows.attempts + 1))
            joined = sa.select(webhook_deliveries).where(rows.id.in_(ids)).order_by(rows.created_at, rows.id)
            found = conn.execute(joined).all()
            wanted = webhook_endpoints.c.id.in_({row.endpoint_id for row in found})
            endpoints = {row.id: _endpoint(row) for row in conn.execute(sa.select(webhook_endpoints).where(wanted))}
        return [
            Delivery(
                id=row.id,
                endpoint=endpoints[row.endpoint_id],
                event_type=row.event_type,
                job_id=row.job_id,
                created_at=row.created_at,
                attempts=row.attempts,
            )
            for row in found
            if row.endpoint_id in endpoints
        ]

    def delivered(self, delivery_id: str) -> None:
        """Forget a delivery, which its endpoint has taken, or for which it is too late."""
        with self._db.write() as conn:
            conn.execute(sa.delete(webhook_deliveries).where(webhook_deliveries.c.id == delivery_id))

    def put_off(self, delivery: Delivery) -> bool:
        """Have a delivery tried again, later each time; False where it is given up, three days after its job ended."""
        now = self._clock()
        if now - delivery.created_at > GIVEN_UP_SECONDS:
            self.delivered(delivery.id)
            return False
        wait = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * RETRY_FACTOR ** min(delivery.attempts - 1, 20))
        later = sa.update(webhook_deliveries).where(webhook_deliveries.c.id == delivery.id)
        with self._db.write() as conn:
            conn.execute(later.values(next_at=now + wait * random.uniform(0.8, 1.2)))
        return True

    def _change(self, endpoint: WebhookEndpoint, values: dict[str, Any]) -> None:
        change = sa.update(webhook_endpoints).where(webhook_endpoints.c.id == endpoint.id)
        with self._db.write() as conn:
            conn.execute(change.values(values | {"updated_at": self._clock()}))


def add_deliveries(conn: sa.Connection, job_id: str, status: JobStatus, now: float) -> None:
    """Note who is to be told that a job has ended, in the transaction that ends it; of a sweep, not of its trials."""
    asked_for = sa.or_(jobs.c.sweep_id.is_(None), jobs.c.sweep_id == jobs.c.id)
    tenant = sa.select(jobs.c.tenant).where(jobs.c.id == job_id, asked_for).scalar_subquery()
    event_type = f"fine_tuning.job.{status}"
    own = sa.select(webhook_endpoints.c.id, webhook_endpoints.c.event_types).where(webhook_endpoints.c.tenant == tenant)
    rows = [
        {
            "id": f"evt_{secrets.token_hex(12)}",
            "endpoint_id": endpoint.id,
            "event_type": event_type,
            "job_id": job_id,
            "created_at": now,
            "next_at": now,
            "attempts": 0,
        }
        for endpoint in conn.execute(own)
        if event_type in endpoint.event_types.split()
    ]
    if rows:
        conn.execute(sa.insert(webhook_deliveries), rows)


def new_secret() -> str:
    """Return a secret as Standard Webhooks writes it: 32 random bytes."""
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


def _own(tenant: str, endpoint_id: str) -> tuple[sa.ColumnElement[bool], ...]:
    return webhook_endpoints.c.id == endpoint_id, webhook_endpoints.c.tenant == tenant


def _endpoint(row: sa.Row[Any]) -> WebhookEndpoint:
    values = dict(row._mapping)
    return WebhookEndpoint(**values | {"event_types": tuple(values["event_types"].split())})
