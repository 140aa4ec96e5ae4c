"""What a plan is made from, read without what it does not need; and what lines have had."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa

from jobs.job import ALIVE, EventKind, FailureCode, Job, JobStatus, Lease, SessionKey
from jobs.queue_snapshot import Line, QueuedJob, QueueSnapshot, RunningJobs
from jobs.store.pages import job_of
from jobs.store.schema import events, jobs, lines, sessions
from jobs.store.sessions import SessionTable, alive_sessions, lease_holds

HEADS = 32
"""So many jobs of each line are looked at in a plan; those behind them wait until these are served."""


class LineTable(SessionTable):
    """The part of the queue that a scheduler plans from, and where it says what keeps jobs waiting."""

    def snapshot(self, cluster: str) -> QueueSnapshot:
        """Return what a plan is made from."""
        with self._db.read() as conn:
            return QueueSnapshot(
                at=self._clock(),
                queued=[_queued(tuple(row)) for row in conn.execute(_HEADS[conn.dialect.name], {"cluster": cluster})],
                running=[RunningJobs(**row) for row in conn.execute(_RUNNING, {"cluster": cluster}).mappings()],
                sessions=alive_sessions(conn, cluster),
                lines=_lines(conn, cluster),
            )

    def without_session(self, cluster: str) -> Sequence[Job]:
        """Return the running jobs of a cluster whose sessions have ended."""
        ended = sa.select(sessions.c.id).where(sessions.c.id == jobs.c.session_id, sessions.c.state.in_(sorted(ALIVE)))
        training = jobs.c.cluster == cluster, jobs.c.status == JobStatus.RUNNING, jobs.c.session_id != jobs.c.id
        query = sa.select(jobs).where(*training, ~ended.exists())
        with self._db.read() as conn:
            return [job_of(row) for row in conn.execute(query.order_by(jobs.c.created_at, jobs.c.id))]

    def waiting_for(self, cluster: str, key: SessionKey) -> Mapping[str, int]:
        """Return the ids of the jobs that wait for a session of this key, oldest first, and how many could not be
        started for each.
        """
        same = [jobs.c[name].is_not_distinct_from(value) for name, value in asdict(key).items()]
        waits = jobs.c.status == JobStatus.QUEUED, jobs.c.not_before.is_(None)
        query = sa.select(jobs.c.id, jobs.c.failed_launches).where(jobs.c.cluster == cluster, *waits, *same)
        with self._db.read() as conn:
            rows = conn.execute(query.order_by(jobs.c.created_at, jobs.c.id))
            return {row.id: row.failed_launches for row in rows}

    def has_jobs(self, cluster: str, *statuses: JobStatus) -> bool:
        """Whether there is a job in one of these states, those aside that wait for other jobs."""
        query = sa.select(jobs.c.id).where(jobs.c.cluster == cluster, jobs.c.status.in_(statuses))
        on_its_own = sa.or_(jobs.c.not_before.is_(None), jobs.c.not_before < math.inf)
        with self._db.read() as conn:
            return conn.execute(query.where(on_its_own).limit(1)).first() is not None

    def oldest_queued(self, cluster: str) -> float | None:
        """Return since when the job has waited that has waited longest, those aside that wait for another attempt."""
        query = sa.select(sa.func.min(jobs.c.updated_at))
        with self._db.read() as conn:
            in_line = jobs.c.status == JobStatus.QUEUED, jobs.c.not_before.is_(None)
            waiting = query.where(jobs.c.cluster == cluster, *in_line)
            found: float | None = conn.execute(waiting).scalar_one()
        return found

    def tell(self, why: Mapping[str, str], *, lease: Lease | None = None) -> None:
        """Add why they wait to the histories of jobs that still do. They are locked, as wherever there is an event."""
        if not why:
            return
        waiting = sa.select(jobs.c.id).where(jobs.c.id.in_(list(why)), jobs.c.status == JobStatus.QUEUED)
        with self._db.write() as conn:
            if not lease_holds(conn, lease):
                return
            line = {"at": self._clock(), "level": "info", "kind": EventKind.WAITS}
            found = conn.execute(waiting.order_by(jobs.c.id).with_for_update()).scalars()
            if rows := [line | {"subject": job_id, "message": why[job_id]} for job_id in found]:
                conn.execute(sa.insert(events), rows)

    def launch_failed(self, job_id: str, message: str, wait: float, *, lease: Lease | None = None) -> None:
        """Count that a session for a queued job could not start; for `wait` seconds none is started for it."""
        values = {"failed_launches": jobs.c.failed_launches + 1, "not_before": self._clock() + wait}
        change = sa.update(jobs).where(jobs.c.id == job_id, jobs.c.status == JobStatus.QUEUED)
        with self._db.write() as conn:
            if lease_holds(conn, lease) and conn.execute(change.values(values)).rowcount == 1:
                self._event(conn, job_id, message, "warning", EventKind.WAITS, {"code": FailureCode.NOT_STARTED})

    def release_due(self, cluster: str, *, lease: Lease | None = None) -> None:
        """Put jobs that have waited long enough for their next attempt back where they were in line."""
        due = jobs.c.cluster == cluster, jobs.c.not_before.is_not(None), jobs.c.not_before <= self._clock()
        with self._db.read() as conn:
            if conn.execute(sa.select(jobs.c.id).where(*due).limit(1)).first() is None:
                return
        with self._db.write() as conn:
            if lease_holds(conn, lease):
                conn.execute(sa.update(jobs).where(*due).values(not_before=None))

    def write_lines(
        self, cluster: str, changed: Sequence[Line], forgotten: float, *, lease: Lease | None = None
    ) -> bool:
        """Record what lines have had until now; what was not written since `forgotten` is dropped."""
        with self._db.write() as conn:
            if not lease_holds(conn, lease):
                return False
            for line in changed:
                _write(conn, cluster, line, {"mean_workers": line.mean_workers, "at": line.at})
            conn.execute(sa.delete(lines).where(lines.c.cluster == cluster, lines.c.at < forgotten))
            return True


def _queued(row: Sequence[Any]) -> QueuedJob:
    """Return a row of `_COLUMNS`, by its places: there are many."""
    return QueuedJob(
        id=row[0],
        tenant=row[1],
        priority=row[2],
        session_key=SessionKey(row[3], row[4], row[5], row[6]),
        max_colocated=row[7],
        step_tokens=row[8] or 0,
        created_at=row[9],
        waits_since=row[10],
    )


def mark_served(conn: sa.Connection, job: Sequence[Any], at: float) -> None:
    """Record that a job, of which this is its line and when it came, was given to a session, if none of its line has
    waited for longer.
    """
    cluster, tenant, priority, created_at = job
    older = _in_line(cluster).where(
        jobs.c.tenant == tenant, jobs.c.priority == priority, jobs.c.created_at < created_at
    )
    if conn.execute(older.limit(1)).first() is not None:
        return
    line = Line(tenant=tenant, priority=priority, mean_workers=0.0, at=at, served_at=at)
    _write(conn, cluster, line, {"served_at": at})


def _write(conn: sa.Connection, cluster: str, line: Line, values: dict[str, float]) -> None:
    """Change a line that is there, or insert it."""
    mine = lines.c.cluster == cluster, lines.c.tenant == line.tenant, lines.c.priority == line.priority
    if conn.execute(sa.update(lines).where(*mine).values(values)).rowcount == 0:
        conn.execute(sa.insert(lines).values(cluster=cluster, **asdict(line)))


def _in_line(cluster: str | sa.BindParameter[str]) -> sa.Select[tuple[str]]:
    return sa.select(jobs.c.id).where(jobs.c.cluster == cluster, _waits(jobs))


def _waits(table: sa.FromClause) -> sa.ColumnElement[bool]:
    """Whether a job waits for a place; spelled out, as the index `jobs_in_line` is only of such rows."""
    return sa.and_(table.c.status == sa.literal_column(f"'{JobStatus.QUEUED}'"), table.c.not_before.is_(None))


def _heads(dialect: str) -> sa.Select[Any]:
    """Select the oldest `HEADS` jobs of each line: for each line a look into the index, however many wait."""
    cluster, one = sa.bindparam("cluster", type_=sa.Text), jobs.alias("one")
    line = (
        sa.select(jobs.c.tenant, jobs.c.priority)
        .where(jobs.c.cluster == cluster, _waits(jobs))
        .group_by(jobs.c.tenant, jobs.c.priority)
        .cte("line")
    )
    mine = one.c.cluster == cluster, _waits(one), one.c.tenant == line.c.tenant, one.c.priority == line.c.priority
    if dialect == "postgresql":
        oldest = sa.select(*(one.c[name] for name in _COLUMNS)).where(*mine).order_by(one.c.created_at, one.c.id)
        heads = oldest.limit(HEADS).lateral("heads")
        return sa.select(*(heads.c[name] for name in _COLUMNS)).select_from(line.join(heads, sa.true()))
    ids = sa.select(one.c.id).where(*mine).order_by(one.c.created_at, one.c.id).limit(HEADS)
    return sa.select(*(jobs.c[name] for name in _COLUMNS)).select_from(line.join(jobs, jobs.c.id.in_(ids)))


_COLUMNS = (
    "id", "tenant", "priority", "base_model", "precision", "num_workers", "forward_path", "max_colocated",
    "step_tokens", "created_at", "updated_at",
)  # fmt: skip
_HEADS = {dialect: _heads(dialect) for dialect in ("sqlite", "postgresql")}
_RUNNING = (
    sa.select(
        jobs.c.session_id,
        jobs.c.tenant,
        jobs.c.priority,
        sa.func.max(sa.func.coalesce(jobs.c.level, jobs.c.priority)).label("level"),
        sa.func.count().label("number"),
        sa.func.min(jobs.c.max_colocated).label("max_colocated"),
        sa.func.coalesce(sa.func.sum(jobs.c.step_tokens), 0).label("step_tokens"),
    )
    # A sweep that runs has its own id there.
    .where(
        jobs.c.cluster == sa.bindparam("cluster"),
        jobs.c.status == JobStatus.RUNNING,
        jobs.c.session_id != jobs.c.id,
    )
    .group_by(jobs.c.session_id, jobs.c.tenant, jobs.c.priority)
)


def _lines(conn: sa.Connection, cluster: str) -> list[Line]:
    rows = conn.execute(_LINES, {"cluster": cluster}).mappings()
    return [Line(**row) for row in rows]


_LINES = sa.select(lines.c.tenant, lines.c.priority, lines.c.mean_workers, lines.c.at, lines.c.served_at).where(
    lines.c.cluster == sa.bindparam("cluster")
)
