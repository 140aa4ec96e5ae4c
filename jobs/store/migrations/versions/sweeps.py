"""Sweeps: to which one a job belongs, and where its trials stand."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "sweeps"
down_revision = "time_limits"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("sweep_id", sa.Text))
    is_open = sa.text("sweep_id = id AND finished_at IS NULL")
    op.create_index("open_sweeps", "jobs", ["id"], sqlite_where=is_open, postgresql_where=is_open)
    is_of_one = sa.text("sweep_id IS NOT NULL")
    op.create_index("jobs_by_sweep", "jobs", ["sweep_id"], sqlite_where=is_of_one, postgresql_where=is_of_one)
    op.create_table(
        "trials",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("sweep_id", sa.Text, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("parameters", sa.Text, nullable=False),
        sa.Column("steps", sa.Integer, nullable=False),
        sa.Column("rung", sa.Integer),
        sa.Column("until_step", sa.Integer),
        sa.Column("reached", sa.Integer, nullable=False),
        sa.Column("loss", sa.Double),
        sa.Column("place", sa.Integer),
        sa.Column("compared", sa.Integer),
    )
    op.create_index("trials_by_sweep", "trials", ["sweep_id", "number"])
