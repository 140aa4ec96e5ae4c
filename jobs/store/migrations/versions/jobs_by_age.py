"""An index by which the newest jobs of all tenants are listed without reading the others."""

from __future__ import annotations

from alembic import op

revision = "jobs_by_age"
down_revision = "fair_lines"


def upgrade() -> None:
    op.create_index("jobs_by_age", "jobs", ["created_at", "id"])
