"""Metrics of steps in a table of their own: they were events, those of the validation rows beside the others'."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "step_metrics"
down_revision = "webhooks"

EVALUATION = {"loss": "valid_loss", "accuracy": "valid_mean_token_accuracy"}


def upgrade() -> None:
    op.add_column("sessions", sa.Column("tokens_per_second", sa.Double))
    table = op.create_table(
        "step_metrics",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("event_id", sa.Integer, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("validated", sa.Boolean, nullable=False),
        sa.Column("figures", sa.Text, nullable=False),
    )
    events = sa.table("events", *map(sa.column, ("id", "subject", "at", "kind", "data")))
    told = sa.select(events).where(events.c.kind.in_(["metrics", "evaluation"])).order_by(events.c.id)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for event in op.get_bind().execute(told):
        step, figures = _figures(event.kind, json.loads(event.data))
        row = {"job_id": event.subject, "step": step, "event_id": event.id, "at": event.at}
        known = rows.get((event.subject, step), {}).get("figures", {})
        rows[event.subject, step] = row | {"figures": known | figures}
    for row in rows.values():
        row |= {"validated": "valid_loss" in row["figures"], "figures": json.dumps(row["figures"])}
    op.bulk_insert(table, [*rows.values()])
    op.execute(sa.delete(events).where(events.c.kind == "metrics"))


def _figures(kind: str, data: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    step = data.pop("step")
    return step, data if kind == "metrics" else {EVALUATION[name]: data[name] for name in EVALUATION}
