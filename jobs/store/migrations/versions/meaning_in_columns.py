"""From the tables before alembic: what was spelled inside a text becomes columns.

`session_key` was `<base>|<precision>|<workers>`; how often a job was put back, or no session started for it, was
counted by the beginnings of its events' messages.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "meaning_in_columns"
down_revision = None

# Those that came before alembic, one after the other, to databases that were there.
LATER: dict[str, dict[str, type[sa.types.TypeEngine[Any]]]] = {
    "jobs": {"company": sa.Integer, "init_adapter_sha": sa.Text, "examples_sha": sa.Text},
    "sessions": {"resolved_key": sa.Text, "facts": sa.Text},
}
RENAMED = {
    "jobs": {"session_key": "base_model", "company": "max_colocated", "wish": "requested"},
    "sessions": {"session_key": "base_model", "resolved_key": "resolved_precision", "wish": "requested"},
}
COUNTED = {"lost_attempts": "back to the queue%", "failed_launches": "its session could not start:%"}


def upgrade() -> None:
    for name, columns in LATER.items():
        known = {column["name"] for column in sa.inspect(op.get_bind()).get_columns(name)}
        for column, kind in columns.items():
            if column not in known:
                op.add_column(name, sa.Column(column, kind()))
    for name, renamed in RENAMED.items():
        for old, new in renamed.items():
            op.alter_column(name, old, new_column_name=new)
        op.add_column(name, sa.Column("precision", sa.Text, nullable=False, server_default="auto"))
        op.add_column(name, sa.Column("forward_path", sa.Text))
    for column in COUNTED:
        op.add_column("jobs", sa.Column(column, sa.Integer, nullable=False, server_default="0"))
    op.add_column("events", sa.Column("kind", sa.Text, nullable=False, server_default="note"))
    for name in RENAMED:
        _part_keys(sa.table(name, sa.column("base_model"), sa.column("precision")))
    resolved = sa.table("sessions", sa.column("resolved_precision"))
    for key in op.get_bind().execute(sa.select(resolved.c.resolved_precision).distinct()).scalars().all():
        if key is not None:
            values = {"resolved_precision": key.split("|")[-2]}
            op.execute(sa.update(resolved).where(resolved.c.resolved_precision == key).values(values))
    _count_events()


def _part_keys(table: sa.TableClause) -> None:
    """Part the whole key that `base_model` still holds."""
    for key in op.get_bind().execute(sa.select(table.c.base_model).distinct()).scalars().all():
        base_model, precision, _ = key.rsplit("|", 2)
        values = {"base_model": base_model, "precision": precision}
        op.execute(sa.update(table).where(table.c.base_model == key).values(values))


def _count_events() -> None:
    events = sa.table("events", sa.column("subject"), sa.column("message"), sa.column("kind"))
    jobs = sa.table("jobs", sa.column("id"), *map(sa.column, COUNTED))
    op.execute(sa.update(events).where(events.c.message.like("waits: %")).values(kind="waits"))
    for column, beginning in COUNTED.items():
        told = sa.select(sa.func.count()).where(events.c.subject == jobs.c.id, events.c.message.like(beginning))
        op.execute(sa.update(jobs).values({column: told.scalar_subquery()}))
