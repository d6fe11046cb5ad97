"""The queue's tables, on SQLite or PostgreSQL, and transactions that hold on both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from minigpt.core.errors import JobError
from minigpt.core.storage import home, storage_errors

URL_VARIABLE = "MINIGPT_JOBS_URL"
SCHEMA_VERSION = 1
_SQLITE_NOW = "(julianday('now') - 2440587.5) * 86400.0"
_POSTGRES_NOW = "extract(epoch from clock_timestamp())"

metadata = sa.MetaData()
schema_table = sa.Table(
    "minigpt_jobs_schema", metadata, sa.Column("version", sa.Integer, nullable=False)
)
jobs_table = sa.Table(
    "minigpt_jobs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("config", sa.Text, nullable=False),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Column("submitted_by", sa.String(255), nullable=False),
    sa.Column("submitted_at", sa.Float(53), nullable=False),
    sa.Column("queued_at", sa.Float(53), nullable=False),
    sa.Column("eligible_at", sa.Float(53), nullable=False),
    sa.Column("waited", sa.Float(53), nullable=False, default=0.0),
    sa.Column("ended_at", sa.Float(53)),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("failures", sa.Integer, nullable=False, default=0),
    sa.Column("losses", sa.Integer, nullable=False, default=0),
    sa.Column("evictions", sa.Integer, nullable=False, default=0),
    sa.Column("cancel_requested", sa.Integer, nullable=False, default=0),
)
attempts_table = sa.Table(
    "minigpt_job_attempts",
    metadata,
    sa.Column("job", sa.Integer, sa.ForeignKey("minigpt_jobs.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("team", sa.String(64), nullable=False),
    sa.Column("placement", sa.Text, nullable=False),
    sa.Column("level", sa.Integer, nullable=False),
    sa.Column("share", sa.Float(53), nullable=False),
    sa.Column("started_at", sa.Float(53), nullable=False),
    sa.Column("ended_at", sa.Float(53)),
    sa.Column("outcome", sa.Text, nullable=False, default=""),
    sa.Column("stop_reason", sa.String(16), nullable=False, default=""),
    sa.Column("stop_at", sa.Float(53)),
    sa.Column("directory", sa.Text, nullable=False),
)
lease_table = sa.Table(
    "minigpt_jobs_lease",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("holder", sa.String(255), nullable=False),
    sa.Column("token", sa.Integer, nullable=False),
    sa.Column("expires_at", sa.Float(53), nullable=False),
)
nodes_table = sa.Table(
    "minigpt_jobs_nodes",
    metadata,
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("millicpus", sa.BigInteger, nullable=False),
    sa.Column("memory", sa.BigInteger, nullable=False),
    sa.Column("gpus", sa.Integer, nullable=False),
    sa.Column("isolation", sa.Text, nullable=False),
)


def default_url() -> str:
    """Return `MINIGPT_JOBS_URL`, or the SQLite file in minigpt's home."""
    return os.environ.get(URL_VARIABLE) or f"sqlite:///{home() / 'jobs.db'}"


class Database:
    """The queue's database. Connects on first use; makes its tables where they are not there.

    Args:
        url: As SQLAlchemy has it: `sqlite:///PATH` or `postgresql://USER@HOST/NAME`.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @contextmanager
    def transaction(self, action: str) -> Iterator[sa.Connection]:
        """Do everything in the block or nothing; on disk when it ends.

        Raises:
            JobError: The database can't be reached or refuses.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as error:
            line = " ".join(str(error).split())[:200]
            raise JobError(
                f"can't {action} in the queue {self._shown_url}: {line}",
                remedy=f"check the database, and {URL_VARIABLE} if it is set",
            ) from error

    def now(self, connection: sa.Connection) -> float:
        """Return the database's own time, which all schedulers share, in seconds."""
        return float(connection.execute(sa.text(f"SELECT {self._now}")).scalar_one())

    def lock_lease(self, connection: sa.Connection) -> Any:
        """Read the lease's row and keep others from changing it until the transaction ends."""
        query = sa.select(lease_table).where(lease_table.c.id == 1).with_for_update()
        return connection.execute(query).one()

    @property
    def _now(self) -> str:
        return _SQLITE_NOW if self._engine.dialect.name == "sqlite" else _POSTGRES_NOW

    @property
    def _shown_url(self) -> str:
        try:
            return sa.make_url(self.url).render_as_string(hide_password=True)
        except SQLAlchemyError:
            return self.url

    @cached_property
    def _engine(self) -> sa.Engine:
        engine = self._connect()
        try:
            with engine.begin() as connection:
                if engine.dialect.name == "postgresql":  # SQLite's writers take turns anyhow
                    connection.execute(sa.text("SELECT pg_advisory_xact_lock(7043221)"))
                metadata.create_all(connection)
                version = connection.execute(sa.select(schema_table.c.version)).scalar()
                if version is None:
                    connection.execute(schema_table.insert().values(version=SCHEMA_VERSION))
                    free = {"id": 1, "holder": "", "token": 0, "expires_at": 0.0}
                    connection.execute(lease_table.insert().values(free))
        except SQLAlchemyError as error:
            line = " ".join(str(error).split())[:200]
            raise JobError(
                f"can't open the queue {self._shown_url}: {line}", remedy="check the URL"
            ) from error
        if version is not None and version > SCHEMA_VERSION:
            raise JobError(
                f"the queue {self._shown_url} has schema {version}, newer than {SCHEMA_VERSION}",
                remedy="use the minigpt that made it, or a newer one",
            )
        return engine

    def _connect(self) -> sa.Engine:
        try:
            url = sa.make_url(self.url)
            if url.drivername in ("postgresql", "postgres"):
                url = url.set(drivername="postgresql+psycopg")
            if url.get_backend_name() not in ("sqlite", "postgresql"):
                raise JobError(
                    f"queue {self._shown_url}: {url.get_backend_name()} is not supported",
                    remedy="use sqlite:///PATH or postgresql://USER@HOST/NAME",
                )
            if url.get_backend_name() == "sqlite":
                return _sqlite(url)
            return sa.create_engine(url, pool_pre_ping=True)
        except (SQLAlchemyError, ImportError) as error:
            raise JobError(
                f"can't open the queue {self._shown_url}: {error}",
                remedy="use sqlite:///PATH or postgresql://USER@HOST/NAME (extra `postgres`)",
            ) from None


def _sqlite(url: sa.URL) -> sa.Engine:
    path = Path(url.database or "")
    with storage_errors(f"create {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url)

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, record: object) -> None:
        connection.isolation_level = None  # so that the driver begins no transaction of its own
        connection.execute("PRAGMA busy_timeout = 30000")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # Writers queue up at once rather than fail when a reader wants to become one.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
