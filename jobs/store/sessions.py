"""Sessions and leases: who may write.

A scheduler holds the lease of its cluster, a session's driver the fence that it was started with. Whoever is given up
on - hung, cut off, on a lost node - may still be alive; its next write finds a newer token or fence and changes
nothing.

The guarding row is locked, in the order lease, session, job, and not only compared: PostgreSQL re-checks a condition on
another table with an old snapshot after it waited for a row, and would let a holder that was replaced meanwhile write
once more.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from jobs.errors import IllegalTransitionError
from jobs.job import (
    ALIVE,
    SESSION_TRANSITIONS,
    EventKind,
    JobStatus,
    Lease,
    LeaseInfo,
    QueueEvent,
    Session,
    SessionKey,
    SessionState,
)
from jobs.store.database import Database
from jobs.store.schema import events, jobs, leases, sessions

Fence = tuple[str, int]  # a session's id, and its fence as its driver knows it


class SessionTable:
    """The half of the queue that holds sessions and leases; `JobQueue` adds the jobs."""

    def __init__(self, database: str | Database, clock: Callable[[], float] = time.time) -> None:
        """Open the database of this URL, and create what it lacks; or take one that is open. Raises
        DatabaseSettingError, DatabaseUnavailableError.
        """
        self._db = Database(database) if isinstance(database, str) else database
        self._clock = clock

    def close(self) -> None:
        """Close this process's connections."""
        self._db.close()

    def create_session(self, key: SessionKey, cluster: str, *, lease: Lease | None = None) -> Session | None:
        """Record that a session is going to be launched, before anything is started. None if the lease is lost."""
        now, session_id = self._clock(), f"session-{secrets.token_hex(4)}"
        row = {
            "id": session_id,
            "cluster": cluster,
            **asdict(key),
            "state": SessionState.LAUNCHING,
            "attempt": 1,
            "fence": 1,
            "created_at": now,
            "updated_at": now,
        }
        with self._db.write() as conn:
            if not lease_holds(conn, lease):
                return None
            conn.execute(sa.insert(sessions).values(row))
            self._event(conn, session_id, "launching", data=asdict(key))
            return locked_session(conn, session_id)

    def session(self, session_id: str) -> Session | None:
        with self._db.read() as conn:
            row = conn.execute(sa.select(sessions).where(sessions.c.id == session_id)).one_or_none()
        return None if row is None else _session(row)

    def sessions(self, cluster: str | None = None) -> Sequence[Session]:
        """List the sessions of a cluster, or of all, that have not ended, oldest first."""
        with self._db.read() as conn:
            return alive_sessions(conn, cluster)

    def measured_pace(self, cluster: str, key: SessionKey) -> float | None:
        """Return the tokens/s of the last session of this key that was measured on a cluster; None: there is none."""
        parts = asdict(key)
        precision = parts.pop("precision")
        same = [sessions.c[name].is_not_distinct_from(value) for name, value in parts.items()]
        same.append(sa.or_(sessions.c.precision == precision, sessions.c.resolved_precision == precision))
        known = sa.select(sessions.c.tokens_per_second).where(sessions.c.cluster == cluster, *same)
        newest = known.where(sessions.c.tokens_per_second.is_not(None)).order_by(sessions.c.updated_at.desc()).limit(1)
        with self._db.read() as conn:
            found: float | None = conn.execute(newest).scalar_one_or_none()
        return found

    def session_move(
        self,
        session_id: str,
        from_: SessionState,
        to: SessionState,
        *,
        reason: str,
        fence: int | None = None,
        lease: Lease | None = None,
        only_idle: bool = False,
    ) -> bool:
        """Change a session's state, if it still is `from_`; `only_idle`: and if no job runs in it, so that a session
        which leaves for want of work cannot cross a job that is being assigned to it. Ending a session raises its
        fence: end it first, then take its jobs back. Raises IllegalTransitionError."""
        if to not in SESSION_TRANSITIONS[from_]:
            raise IllegalTransitionError(session_id, from_, to)
        with self._db.write() as conn:
            if not lease_holds(conn, lease):
                return False
            session = locked_session(conn, session_id)
            if session is None or session.state is not from_ or (fence is not None and session.fence != fence):
                return False
            if only_idle and conn.execute(_running_in(session_id)).first() is not None:
                return False
            values = {"state": to} | ({"fence": session.fence + 1} if to is SessionState.ENDED else {})
            return self._change_session(conn, session, reason, values, str(to))

    def stop_session(self, session_id: str, reason: str, *, lease: Lease | None = None) -> bool:
        """Ask a session to stop. It reads that between two steps, and no job is assigned to it from now on."""
        with self._db.write() as conn:
            if not lease_holds(conn, lease):
                return False
            session = locked_session(conn, session_id)
            if session is None or session.state not in (SessionState.LAUNCHING, SessionState.RUNNING):
                return False
            asked = session.requested is not None
            return asked or self._change_session(conn, session, reason, {"requested": "stop"}, "asked to stop")

    def renew_session(self, session_id: str, fence: int, seconds: float) -> bool:
        """Record that a session's driver is alive, for `seconds` more. False: it was given up on, and must leave."""
        values = {"lease_until": self._clock() + seconds, "updated_at": self._clock()}
        change = sa.update(sessions).where(sessions.c.id == session_id).values(values)
        with self._db.write() as conn:
            return fence_holds(conn, (session_id, fence)) and conn.execute(change).rowcount == 1

    def resolve_session(self, session_id: str, fence: int, facts: dict[str, Any]) -> bool:
        """Record what a session computes in, now that its ranks know (`facts` are the fields of `RanksStarted`). Its
        jobs keep that precision, so that one which is continued elsewhere goes on as it began.
        """
        with self._db.write() as conn:
            session = locked_session(conn, session_id)
            if session is None or session.fence != fence:
                return False
            precision = facts["precision"]
            values = {"resolved_precision": precision, "facts": facts, "updated_at": self._clock()}
            conn.execute(sa.update(sessions).where(sessions.c.id == session_id).values(values))
            path = facts["forward_path"]
            message = f"computes in {precision}, {facts['why']}; path: {path}; exact: {facts['exactness']}"
            level = "warning" if facts["exactness"].startswith("not exact") else "info"
            for subject in (session_id, *conn.execute(_running_in(session_id)).scalars()):
                self._event(conn, subject, message, level)
            conn.execute(sa.update(jobs).where(_runs_in(session_id)).values(precision=precision))
            return True

    def acquire_lease(self, name: str, holder: str, seconds: float) -> Lease | None:
        """Take the lease, or prolong it, for `seconds`; None while another holder has it. A lease that ran out is
        given away with a higher token, to its old holder too. Clocks only decide who may try: what protects the rows
        is the token."""
        now = self._clock()
        # An IntegrityError: another process created the row at the same moment, and has the lease.
        with contextlib.suppress(sa.exc.IntegrityError), self._db.write() as conn:
            row = conn.execute(sa.select(leases).where(leases.c.name == name).with_for_update()).one_or_none()
            if row is None:
                conn.execute(sa.insert(leases).values(name=name, holder=holder, token=1, until=now + seconds))
                return Lease(name, holder, 1)
            if row.until >= now and row.holder != holder:
                return None
            token = row.token if row.until >= now else row.token + 1
            change = sa.update(leases).where(leases.c.name == name)
            conn.execute(change.values(holder=holder, token=token, until=now + seconds))
            return Lease(name, holder, token)
        return None

    def lease(self, name: str) -> LeaseInfo | None:
        """Who has a lease, and whether it still runs. None: nobody ever had it."""
        with self._db.read() as conn:
            row = conn.execute(sa.select(leases).where(leases.c.name == name)).one_or_none()
        return None if row is None else LeaseInfo(row.holder, row.token, valid=row.until >= self._clock())

    def release_lease(self, lease: Lease) -> None:
        """Give a lease back, so that the next holder need not wait until it runs out."""
        mine = (leases.c.name == lease.name, leases.c.token == lease.token)
        with self._db.write() as conn:
            conn.execute(sa.update(leases).where(*mine).values(token=leases.c.token + 1, until=float("-inf")))

    def _event(
        self,
        conn: sa.Connection,
        subject: str,
        message: str,
        level: str = "info",
        kind: EventKind = EventKind.NOTE,
        data: dict[str, Any] | None = None,
    ) -> None:
        line = {"subject": subject, "at": self._clock(), "level": level, "kind": kind, "message": message, "data": data}
        conn.execute(sa.insert(events).values(line))

    def _change_session(
        self, conn: sa.Connection, session: Session, reason: str, values: dict[str, Any], message: str
    ) -> bool:
        """Run the one statement that changes a session, whose row is locked; its state is compared all the same."""
        change = sa.update(sessions).where(sessions.c.id == session.id, sessions.c.state == session.state)
        if conn.execute(change.values(values | {"reason": reason, "updated_at": self._clock()})).rowcount != 1:
            return False
        self._event(conn, session.id, f"{message}: {reason}", data={"from": session.state})
        return True


def alive_sessions(conn: sa.Connection, cluster: str | None) -> list[Session]:
    query = sa.select(sessions).where(sessions.c.state.in_(sorted(ALIVE)))
    if cluster is not None:
        query = query.where(sessions.c.cluster == cluster)
    return [_session(row) for row in conn.execute(query.order_by(sessions.c.created_at, sessions.c.id))]


def lease_holds(conn: sa.Connection, lease: Lease | None) -> bool:
    if lease is None:
        return True
    mine = (leases.c.name == lease.name, leases.c.token == lease.token)
    return conn.execute(sa.select(leases.c.token).where(*mine).with_for_update()).first() is not None


def fence_holds(conn: sa.Connection, fence: Fence | None) -> bool:
    if fence is None:
        return True
    session = locked_session(conn, fence[0])
    return session is not None and session.fence == fence[1]


def locked_session(conn: sa.Connection, session_id: str) -> Session | None:
    row = conn.execute(sa.select(sessions).where(sessions.c.id == session_id).with_for_update()).one_or_none()
    return None if row is None else _session(row)


def _running_in(session_id: str) -> sa.Select[tuple[str]]:
    return sa.select(jobs.c.id).where(_runs_in(session_id))


def _runs_in(session_id: str) -> sa.ColumnElement[bool]:
    return sa.and_(jobs.c.session_id == session_id, jobs.c.status == JobStatus.RUNNING)


def _session(row: sa.Row[Any]) -> Session:
    values = dict(row._mapping)
    return Session(**values | {"state": SessionState(values["state"])})


def event_of(row: sa.Row[Any]) -> QueueEvent:
    """Return a row of `events`; a session of another version may have written kinds of its own."""
    kind = EventKind(row.kind) if row.kind in set(EventKind) else EventKind.NOTE
    return QueueEvent(**dict(row._mapping) | {"kind": kind})
