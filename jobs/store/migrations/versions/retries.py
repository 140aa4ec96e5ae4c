"""Why jobs failed, how often that was the infrastructure's fault, and until when they wait for their next attempt."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "retries"
down_revision = "jobs_by_age"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("infrastructure_failures", sa.Integer, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("not_before", sa.Double))
    op.add_column("jobs", sa.Column("error_code", sa.Text))
    op.execute("UPDATE jobs SET error_code = 'training_failed' WHERE error IS NOT NULL")
    op.drop_index("jobs_in_line", "jobs")
    waits, held = sa.text("status = 'queued' AND not_before IS NULL"), sa.text("not_before IS NOT NULL")
    columns = ["cluster", "tenant", "priority", "created_at", "id"]
    op.create_index("jobs_in_line", "jobs", columns, sqlite_where=waits, postgresql_where=waits)
    op.create_index("jobs_held", "jobs", ["cluster", "not_before"], sqlite_where=held, postgresql_where=held)
