"""What a plan reads: the lines of waiting jobs, what each has had, how large a job's steps are, how it was started."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "fair_lines"
down_revision = "step_metrics"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("step_tokens", sa.Integer))
    op.add_column("jobs", sa.Column("level", sa.Integer))
    waits = sa.text("status = 'queued'")
    columns = ["cluster", "tenant", "priority", "created_at", "id"]
    op.create_index("jobs_in_line", "jobs", columns, sqlite_where=waits, postgresql_where=waits)
    op.create_table(
        "lines",
        sa.Column("cluster", sa.Text, primary_key=True),
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("priority", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("mean_workers", sa.Double, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("served_at", sa.Double),
    )
