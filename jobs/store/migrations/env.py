"""What alembic runs for every upgrade: the migrations, in the transaction that `schema.create_or_upgrade` is given."""

from __future__ import annotations

from alembic import context

attributes = context.config.attributes
context.configure(connection=attributes["connection"], version_table=attributes["version_table"])
with context.begin_transaction():
    context.run_migrations()
