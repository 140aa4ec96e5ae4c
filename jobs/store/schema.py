"""The tables, and how a database that an earlier version wrote becomes one with these tables.

A new database is created as it stands here. An older one goes through `migrations/` (alembic): whoever changes a table
adds a file there and sets `REVISION` to its revision.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from jobs.errors import DatabaseSettingError
from jobs.job import TERMINAL, EventKind, JobStatus, SessionState

REVISION = "sweeps"
"""The newest migration's."""
MIGRATIONS = Path(__file__).parent / "migrations"


class _Json(sa.TypeDecorator[dict[str, Any]]):
    """A dictionary as text. Not the database's JSON: PostgreSQL's refuses NaN, which is a loss that must be shown."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: dict[str, Any] | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> dict[str, Any] | None:
        loaded: dict[str, Any] | None = None if value is None else json.loads(value)
        return loaded


class _Text(sa.TypeDecorator[str]):
    """Text that others wrote, such as an error of a rank: characters that no database stores are replaced."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        if value is None:
            return None
        return value.encode("utf-8", "replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")


def _one_of(column: str, values: type[JobStatus] | type[SessionState]) -> sa.CheckConstraint:
    return sa.CheckConstraint(f"{column} IN ({', '.join(repr(value.value) for value in values)})")


metadata = sa.MetaData()

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("cluster", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("spec_json", sa.Text, nullable=False),
    sa.Column("base", sa.Text, nullable=False),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("precision", sa.Text, nullable=False, server_default="auto"),
    sa.Column("forward_path", sa.Text),
    sa.Column("num_workers", sa.Integer, nullable=False),
    sa.Column("step_tokens", sa.Integer),
    sa.Column("level", sa.Integer),
    sa.Column("content_key", sa.Text, nullable=False),
    sa.Column("copy", sa.Text, nullable=False),
    sa.Column("code_version", sa.Text, nullable=False),
    sa.Column("dataset_sha", sa.Text, nullable=False),
    sa.Column("validation_sha", sa.Text),
    sa.Column("examples_sha", sa.Text),
    sa.Column("init_adapter_sha", sa.Text),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    sa.Column("time_limit", sa.Double),
    sa.Column("run_seconds", sa.Double, nullable=False, server_default="0"),
    sa.Column("attempt_at", sa.Double),
    sa.Column("session_id", sa.Text),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("lost_attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("infrastructure_failures", sa.Integer, nullable=False, server_default="0"),
    sa.Column("failed_launches", sa.Integer, nullable=False, server_default="0"),
    sa.Column("not_before", sa.Double),
    sa.Column("max_colocated", sa.Integer),
    sa.Column("requested", sa.Text),
    sa.Column("error", _Text),
    sa.Column("error_code", sa.Text),
    sa.Column("progress", _Json),
    sa.Column("result", _Json),
    sa.Column("client_request", _Json),
    sa.Column("metadata", sa.JSON(none_as_null=True)),
    sa.Column("idempotency_key", sa.Text),
    sa.Column("sweep_id", sa.Text),
    _one_of("status", JobStatus),
    sa.CheckConstraint("status <> 'running' OR session_id IS NOT NULL"),
)
sa.Index("jobs_by_status", jobs.c.cluster, jobs.c.status)
sa.Index("jobs_by_session", jobs.c.session_id)
sa.Index("jobs_by_tenant", jobs.c.tenant, jobs.c.created_at)
sa.Index("jobs_by_age", jobs.c.created_at, jobs.c.id)
sa.Index("jobs_by_idempotency_key", jobs.c.tenant, jobs.c.idempotency_key, unique=True)
_waits = sa.and_(jobs.c.status == JobStatus.QUEUED.value, jobs.c.not_before.is_(None))
sa.Index(
    "jobs_in_line",
    jobs.c.cluster,
    jobs.c.tenant,
    jobs.c.priority,
    jobs.c.created_at,
    jobs.c.id,
    sqlite_where=_waits,
    postgresql_where=_waits,
)
_held = jobs.c.not_before.is_not(None)
sa.Index("jobs_held", jobs.c.cluster, jobs.c.not_before, sqlite_where=_held, postgresql_where=_held)
_is_open = sa.and_(jobs.c.sweep_id == jobs.c.id, jobs.c.finished_at.is_(None))
sa.Index("open_sweeps", jobs.c.id, sqlite_where=_is_open, postgresql_where=_is_open)
_is_of_one = jobs.c.sweep_id.is_not(None)
sa.Index("jobs_by_sweep", jobs.c.sweep_id, sqlite_where=_is_of_one, postgresql_where=_is_of_one)
# Two processes that submit the same content at once cannot both insert it. `copy` is empty, but for a job that was
# wanted again.
_unwanted = sorted(TERMINAL - {JobStatus.SUCCEEDED})
sa.Index(
    "jobs_by_content",
    jobs.c.tenant,
    jobs.c.cluster,
    jobs.c.content_key,
    jobs.c.copy,
    unique=True,
    sqlite_where=jobs.c.status.not_in(_unwanted),
    postgresql_where=jobs.c.status.not_in(_unwanted),
)

dependencies = sa.Table(
    "dependencies",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("needs_id", sa.Text, primary_key=True),
)
sa.Index("dependencies_by_needed", dependencies.c.needs_id)

# Jobs with one `sweep_id`, which is the id of the job that is the sweep: where each stands among the others.
trials = sa.Table(
    "trials",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("sweep_id", sa.Text, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("parameters", _Json, nullable=False),
    sa.Column("steps", sa.Integer, nullable=False),
    sa.Column("rung", sa.Integer),
    sa.Column("until_step", sa.Integer),
    sa.Column("reached", sa.Integer, nullable=False),
    sa.Column("loss", sa.Double),
    sa.Column("place", sa.Integer),
    sa.Column("compared", sa.Integer),
)
sa.Index("trials_by_sweep", trials.c.sweep_id, trials.c.number)

events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("level", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False, server_default=EventKind.NOTE),
    sa.Column("message", _Text, nullable=False),
    sa.Column("data", _Json),
)
sa.Index("events_by_subject", events.c.subject, events.c.id)

# `event_id` is the newest event of the job before the step, so that both make one history.
step_metrics = sa.Table(
    "step_metrics",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("event_id", sa.Integer, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("validated", sa.Boolean, nullable=False),
    sa.Column("figures", _Json, nullable=False),
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("cluster", sa.Text, nullable=False),
    sa.Column("base_model", sa.Text, nullable=False),
    sa.Column("precision", sa.Text, nullable=False, server_default="auto"),
    sa.Column("forward_path", sa.Text),
    sa.Column("num_workers", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("fence", sa.Integer, nullable=False),
    sa.Column("resolved_precision", sa.Text),
    sa.Column("facts", _Json),
    sa.Column("tokens_per_second", sa.Double),
    sa.Column("lease_until", sa.Double),
    sa.Column("requested", sa.Text),
    sa.Column("reason", _Text),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
    _one_of("state", SessionState),
)
sa.Index("sessions_by_state", sessions.c.cluster, sessions.c.state)

lines = sa.Table(
    "lines",
    metadata,
    sa.Column("cluster", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("priority", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("mean_workers", sa.Double, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("served_at", sa.Double),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("token", sa.Integer, nullable=False),
    sa.Column("until", sa.Double, nullable=False),
)

# What a key can open is worth a secret of 256 random bits, so that its hash alone says nothing: no salt, no slow hash.
api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("sha256", sa.Text, nullable=False, unique=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("name", _Text, nullable=False),
    sa.Column("scopes", sa.Text, nullable=False),
    sa.Column("requests_per_minute", sa.Integer),
    sa.Column("tokens_per_minute", sa.Integer),
    sa.Column("running_jobs", sa.Integer),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("revoked_at", sa.Double),
)

# The row is there before the content, and says so (`status` uploading) until that is there too.
files = sa.Table(
    "files",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("filename", _Text, nullable=False),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("status_details", _Text),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double),
)
sa.Index("files_by_tenant", files.c.tenant, files.c.created_at)

uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("filename", _Text, nullable=False),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("file_id", sa.Text),
    sa.Column("file_seconds", sa.Integer),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
)

upload_parts = sa.Table(
    "upload_parts",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("upload_id", sa.Text, nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)
sa.Index("upload_parts_by_upload", upload_parts.c.upload_id)

webhook_endpoints = sa.Table(
    "webhook_endpoints",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("name", _Text, nullable=False),
    sa.Column("url", _Text, nullable=False),
    sa.Column("event_types", sa.Text, nullable=False),
    sa.Column("secret", sa.Text, nullable=False),
    sa.Column("old_secret", sa.Text),
    sa.Column("old_secret_until", sa.Double),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
)
sa.Index("webhook_endpoints_by_tenant", webhook_endpoints.c.tenant, webhook_endpoints.c.created_at)

# What is still to be told; `next_at` is when somebody may try.
webhook_deliveries = sa.Table(
    "webhook_deliveries",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("endpoint_id", sa.Text, nullable=False),
    sa.Column("event_type", sa.Text, nullable=False),
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("next_at", sa.Double, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
)
sa.Index("webhook_deliveries_by_time", webhook_deliveries.c.next_at)

schema_version = sa.Table("lora_schema_version", metadata, sa.Column("version_num", sa.String(32), primary_key=True))


def create_or_upgrade(connection: sa.Connection) -> None:
    """Bring a database, empty or an older one, to these tables, in the transaction of `connection`.

    Raises:
        DatabaseSettingError: a newer version of this code has written it.
    """
    inspector = sa.inspect(connection)
    if not inspector.has_table(jobs.name):
        metadata.create_all(connection)
        connection.execute(sa.insert(schema_version).values(version_num=REVISION))
    elif not inspector.has_table(schema_version.name) or _version(connection) != REVISION:
        _upgrade(connection)


def _version(connection: sa.Connection) -> str | None:
    return connection.execute(sa.select(schema_version.c.version_num)).scalar_one_or_none()


def _upgrade(connection: sa.Connection) -> None:
    # Late: alembic takes half a second to import, and nearly always the tables are as they should be.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes |= {"connection": connection, "version_table": schema_version.name}
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise DatabaseSettingError(
            f"a newer version of this code has written the database of LORA_DATABASE_URL ({error}): start that version,"
            " or set another database"
        ) from None
