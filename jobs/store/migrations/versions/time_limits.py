"""How long jobs may run, and how long they have, over all attempts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "time_limits"
down_revision = "dependencies"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("time_limit", sa.Double))
    op.add_column("jobs", sa.Column("run_seconds", sa.Double, nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("attempt_at", sa.Double))
