"""Jobs that wait until other jobs have succeeded."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "dependencies"
down_revision = "retries"


def upgrade() -> None:
    op.create_table(
        "dependencies",
        sa.Column("job_id", sa.Text, primary_key=True),
        sa.Column("needs_id", sa.Text, primary_key=True),
    )
    op.create_index("dependencies_by_needed", "dependencies", ["needs_id"])
