"""API keys: who may ask for what. A secret is shown once, when it is made; the table holds its sha256."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from jobs.errors import JobError
from jobs.store.database import Database
from jobs.store.schema import api_keys

PREFIX = "sk-lora-"


class Scope(StrEnum):
    """What a key is for. `admin` is for everything."""

    TRAIN = "train"
    INFER = "infer"
    ADMIN = "admin"


class KeyNotFoundError(JobError):
    """There is no key of this id that is not revoked."""

    def __str__(self) -> str:
        return f"there is no key {self.args[0]}, or it is revoked; see: python -m deploy keys list"


@dataclass(frozen=True, kw_only=True)
class ApiKey:
    """A key without its secret. A limit of None is none."""

    id: str
    sha256: str
    tenant: str
    name: str
    scopes: frozenset[Scope]
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    running_jobs: int | None = None
    created_at: float
    revoked_at: float | None = None


def hash_of(secret: str) -> str:
    """Return what the table knows a secret by."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


class KeyTable:
    """The keys in one database. Methods raise DatabaseUnavailableError."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self._db, self._clock = database, clock

    def create(
        self,
        tenant: str,
        scopes: frozenset[Scope],
        *,
        name: str = "",
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        running_jobs: int | None = None,
    ) -> tuple[ApiKey, str]:
        """Make a key; returns it and its secret, which nothing shows again."""
        secret = PREFIX + secrets.token_urlsafe(32)
        key = ApiKey(
            id=f"key-{secrets.token_hex(6)}",
            sha256=hash_of(secret),
            tenant=tenant,
            name=name,
            scopes=scopes,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            running_jobs=running_jobs,
            created_at=self._clock(),
        )
        row = vars(key) | {"scopes": " ".join(sorted(scopes))}
        with self._db.write() as conn:
            conn.execute(sa.insert(api_keys).values(row))
        return key, secret

    def list(self) -> Sequence[ApiKey]:
        """Return all keys, revoked ones too, oldest first."""
        with self._db.read() as conn:
            rows = conn.execute(sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id))
            return [_key(row) for row in rows]

    def revoke(self, key_id: str) -> ApiKey:
        """End a key for ever. Raises KeyNotFoundError."""
        mine = (api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
        now = self._clock()
        with self._db.write() as conn:
            row = conn.execute(sa.select(api_keys).where(*mine).with_for_update()).one_or_none()
            if row is None:
                raise KeyNotFoundError(key_id)
            conn.execute(sa.update(api_keys).where(*mine).values(revoked_at=now))
        return replace(_key(row), revoked_at=now)


def _key(row: sa.Row[Any]) -> ApiKey:
    values = dict(row._mapping)
    return ApiKey(**values | {"scopes": frozenset(map(Scope, values["scopes"].split()))})
