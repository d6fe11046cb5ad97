"""The record of which version an alias named when, by whom and why. MLflow keeps none.

Where the registry is a database, the record is a table in it, `minigpt_alias_changes`, to which
rows are only ever added (SQLite refuses changes by triggers). Where it is an MLflow server, which
has no such table, each change is a tag of its own on the registered model.
"""

from __future__ import annotations

import json
import uuid
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from minigpt.core.config import Config, from_mapping

if TYPE_CHECKING:
    from mlflow import MlflowClient

_TABLE = "minigpt_alias_changes"
_TAG_PREFIX = "minigpt.alias_change."


class AliasChange(Config):
    """One change of one alias."""

    at: datetime
    """When, in UTC."""
    model: str
    alias: str
    from_version: int | None
    """What the alias named before; null is nothing."""
    to_version: int | None
    """What it names since; null is nothing."""
    by: str
    """Who changed it."""
    why: str


class AliasHistory(Protocol):
    """An append-only list of changes."""

    def append(self, change: AliasChange) -> None:
        """Add a change; it is stored when this returns."""
        ...

    def read(self, model: str) -> list[AliasChange]:
        """Return a model's changes, oldest first."""
        ...


class DatabaseHistory:
    """Changes in a table beside MLflow's own.

    Args:
        uri: The registry's database, as SQLAlchemy names it.
    """

    def __init__(self, uri: str) -> None:
        import sqlalchemy as sa

        self._engine = sa.create_engine(uri)
        self._table = sa.Table(
            _TABLE,
            sa.MetaData(),
            sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
            sa.Column("at", sa.String(40), nullable=False),
            sa.Column("model", sa.String(255), nullable=False, index=True),
            sa.Column("alias", sa.String(255), nullable=False),
            sa.Column("from_version", sa.Integer),
            sa.Column("to_version", sa.Integer),
            sa.Column("by", sa.String(255), nullable=False),
            sa.Column("why", sa.Text, nullable=False),
        )
        self._table.metadata.create_all(self._engine, checkfirst=True)
        if self._engine.dialect.name == "sqlite":
            self._forbid_changes()

    def append(self, change: AliasChange) -> None:
        """Insert a row."""
        with self._engine.begin() as connection:
            connection.execute(self._table.insert(), change.model_dump(mode="json"))

    def read(self, model: str) -> list[AliasChange]:
        """Select a model's rows in the order of insertion."""
        query = self._table.select().where(self._table.c.model == model).order_by(self._table.c.id)
        with self._engine.connect() as connection:
            rows: list[dict[str, Any]] = [dict(row) for row in connection.execute(query).mappings()]
        return [
            from_mapping(AliasChange, {k: v for k, v in row.items() if k != "id"}) for row in rows
        ]

    def _forbid_changes(self) -> None:
        import sqlalchemy as sa

        with self._engine.begin() as connection:
            for action in ("UPDATE", "DELETE"):
                connection.execute(
                    sa.text(
                        f"CREATE TRIGGER IF NOT EXISTS {_TABLE}_no_{action.lower()} "
                        f"BEFORE {action} ON {_TABLE} "
                        "BEGIN SELECT RAISE(ABORT, 'the history of aliases is append-only'); END"
                    )
                )


class TagHistory:
    """Changes as tags of the registered model, one tag each."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def append(self, change: AliasChange) -> None:
        """Set a tag that never existed: its name holds the time and a random part."""
        key = f"{_TAG_PREFIX}{change.at:%Y%m%dT%H%M%S.%f}.{uuid.uuid4().hex[:8]}"
        value = json.dumps(change.model_dump(mode="json"))
        self._client.set_registered_model_tag(change.model, key, value)

    def read(self, model: str) -> list[AliasChange]:
        """Read the tags in the order of their names, which is that of time."""
        tags = self._client.get_registered_model(model).tags
        return [
            from_mapping(AliasChange, json.loads(tags[key]))
            for key in sorted(tags)
            if key.startswith(_TAG_PREFIX)
        ]
