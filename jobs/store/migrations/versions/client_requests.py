"""What a client of the API sent with a job."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "client_requests"
down_revision = "files"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("client_request", sa.Text))
    op.add_column("jobs", sa.Column("metadata", sa.JSON))
    op.add_column("jobs", sa.Column("idempotency_key", sa.Text))
    op.create_index("jobs_by_idempotency_key", "jobs", ["tenant", "idempotency_key"], unique=True)
    op.create_index("jobs_by_tenant", "jobs", ["tenant", "created_at"])
