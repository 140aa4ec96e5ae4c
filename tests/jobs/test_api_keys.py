"""API keys in SQLite and PostgreSQL."""

from __future__ import annotations

import contextlib

import pytest

from jobs.store.api_keys import KeyNotFoundError, KeyTable, Scope, hash_of
from jobs.store.database import Database
from tests.support.queue_kit import Clock

pytest_plugins = ["tests.support.queue_kit"]


def test_a_key_is_known_by_its_hash_until_it_is_revoked(url: str, clock: Clock) -> None:
    with contextlib.closing(Database(url)) as database:
        table = KeyTable(database, clock)
        key, secret = table.create("acme", frozenset({Scope.TRAIN, Scope.INFER}), name="CI", running_jobs=3)
        other, _ = table.create("other", frozenset({Scope.ADMIN}))
        assert list(table.list()) == [key, other]
        assert (key.sha256, key.running_jobs, key.tokens_per_minute) == (hash_of(secret), 3, None)
        revoked = table.revoke(key.id)
        assert revoked.revoked_at is not None and list(table.list()) == [revoked, other]
        for wrong in (key.id, "key-0"):
            with pytest.raises(KeyNotFoundError, match=f"there is no key {wrong}, or it is revoked"):
                table.revoke(wrong)
