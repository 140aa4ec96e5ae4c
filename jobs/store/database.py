"""Where the queue lives: engines and transactions, on SQLite (one machine) and PostgreSQL (a cluster).

Every write runs in `Database.write()`. On SQLite that is one writer at a time, kept apart by a file lock beside the
database: SQLite's own waiting is a poll that starves (eight writers: longest wait 4.84 s without the lock, 0.15 s
with it). On PostgreSQL it is READ COMMITTED, where a statement sees what was committed before it began and a locked
row is read again after the wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import event

from jobs.errors import DatabaseSettingError, DatabaseUnavailableError, UnstorableValueError
from jobs.store.schema import create_or_upgrade

SCHEMA_LOCK = 0x4C6F5241  # any number that no other user of the same PostgreSQL database takes for its advisory lock
BUSY_SECONDS = 30.0  # SQLite's own wait, for readers that meet a checkpoint: writers wait for the file lock instead
EXAMPLE = "LORA_DATABASE_URL=postgresql+psycopg://user:password@host/database"


def check_database(url: str, nodes: int) -> None:
    """Refuse, with a sentence that says what to set, a database that a cluster of `nodes` nodes cannot share or this
    cannot use.

    Raises DatabaseSettingError.
    """
    if _parsed(url).get_backend_name() == "sqlite" and nodes > 1:
        raise DatabaseSettingError(
            f"this cluster has {nodes} nodes, and only the processes of one node can share the SQLite file in "
            f"LORA_DATABASE_URL: set {EXAMPLE}"
        )


class Database:
    """One database and its connections. Opening it, even many times at once, creates or upgrades its tables."""

    def __init__(self, url: str) -> None:
        self._url = _parsed(url)
        self._shown = self._url.render_as_string(hide_password=True)
        self._lock_path: Path | None = None
        if self._url.get_backend_name() == "sqlite":
            path = Path(str(self._url.database)).expanduser().absolute()
            self._lock_path = path.with_name(f"{path.name}.lock")
            self._prepare_file(path)
            self._engine = _sqlite_engine(self._url.set(database=str(path)))
        else:
            self._engine = _postgresql_engine(self._url)
        self._writing = self._engine.execution_options(lora_write=True)
        with self.write() as connection:
            if self._lock_path is None:
                # CREATE TABLE IF NOT EXISTS is not safe against itself: two at once end in a unique violation of
                # pg_type.
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(SCHEMA_LOCK)))
            create_or_upgrade(connection)

    @contextlib.contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Begin a transaction that only reads. Raises DatabaseUnavailableError, UnstorableValueError."""
        with self._names_outages(), self._engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Begin a transaction that writes: all of it or, after any error, none. Raises DatabaseUnavailableError,
        UnstorableValueError.
        """
        with self._names_outages(), self._file_lock(), self._writing.begin() as connection:
            yield connection

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def _file_lock(self) -> Iterator[None]:
        """On SQLite, wait until no other process or thread writes. The kernel frees the lock of a process that dies."""
        if self._lock_path is None:
            yield
            return
        # Opened anew: the lock belongs to this opening of the file, so that threads exclude each other too.
        with self._lock_path.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _prepare_file(self, path: Path) -> None:
        """Set WAL once, at creation: readers never wait for the writer, and the mode stays with the file."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._file_lock(), contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
                if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                    connection.execute("PRAGMA journal_mode=WAL")
        except (OSError, sqlite3.Error) as error:
            raise DatabaseSettingError(
                f"cannot open the SQLite file {path} ({error}): set LORA_DATABASE_URL to a file that you may write"
            ) from None

    @contextlib.contextmanager
    def _names_outages(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
            reason = " ".join(str(error.orig).split())
            raise DatabaseUnavailableError(f"the database {self._shown} does not answer: {reason}") from error
        except sa.exc.DataError as error:
            reason = " ".join(str(error.orig).split())
            raise UnstorableValueError(f"the database cannot hold a value ({reason}): send another one") from error


def _parsed(url: str) -> sa.URL:
    """Return the URL with the driver that is installed. Raises DatabaseSettingError, without repeating a password."""
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        raise DatabaseSettingError(f"LORA_DATABASE_URL is not a database URL: set {EXAMPLE}") from None
    if parsed.drivername in ("postgres", "postgresql"):  # as Heroku, RDS and CloudNativePG write it
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername in ("sqlite", "sqlite+pysqlite") and parsed.database not in (None, "", ":memory:"):
        return parsed
    if parsed.drivername == "postgresql+psycopg":
        return parsed
    wrong = "names no file" if parsed.get_backend_name() == "sqlite" else f"starts with '{parsed.drivername}'"
    raise DatabaseSettingError(f"LORA_DATABASE_URL {wrong}: set sqlite:////absolute/path/lora.db or {EXAMPLE}")


def _sqlite_engine(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS}, hide_parameters=True)

    # Left alone, Python's sqlite3 begins late, at the first change, and without the right to write: when somebody wrote
    # since the transaction's first read, it gets "database is locked" at once, whatever the timeout.
    @event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("lora_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql_engine(url: sa.URL) -> sa.Engine:
    """Keep few connections a process, since every process of a cluster has its own; each is tried before use and not
    kept for long, as the server, a failover or a proxy may have closed it. No prepared statements: poolers such as
    PgBouncer mix them up.
    """
    return sa.create_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_size=2,
        max_overflow=8,
        pool_pre_ping=True,
        pool_recycle=1800,
        connect_args={"connect_timeout": 10, "prepare_threshold": None, "application_name": "ray-lora"},
        hide_parameters=True,
    )
