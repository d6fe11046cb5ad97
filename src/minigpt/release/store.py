"""MLflow's model registry with our types: what is stored, where, and who may write when."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.core.artifact import Artifact
from minigpt.core.config import from_mapping
from minigpt.core.errors import RegistryError
from minigpt.core.storage import home, is_remote, storage_errors
from minigpt.release.history import AliasHistory, DatabaseHistory, TagHistory
from minigpt.release.version import Evidence, ModelVersion, NothingThereYetError, Origin, origin_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

URI_VARIABLE = "MINIGPT_REGISTRY_URI"
_ORIGIN_TAG = "minigpt.origin"
_EVIDENCE_TAG = "minigpt.evidence"
_MISSING, _EXISTS = "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"


def default_uri() -> str:
    """Return `MINIGPT_REGISTRY_URI`, or the SQLite file in minigpt's home."""
    return os.environ.get(URI_VARIABLE) or f"sqlite:///{home() / 'mlflow.db'}"


class MlflowStore:
    """Registered models, versions and aliases at a URI. Connects on first use.

    On SQLite, `writing` makes the writers of several processes take turns.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        # MLflow reads these when it is imported.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        # Its default of seven keeps a user waiting for minutes where no server is.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")

    def models(self) -> dict[str, dict[str, int]]:
        """Return each registered model's aliases, `{model: {alias: version}}`."""
        with self.errors("list models"):
            found = _all_pages(self._client.search_registered_models)
            return {m.name: _aliases(m) for m in sorted(found, key=lambda model: model.name)}

    def versions(self, model: str) -> list[ModelVersion]:
        """Return a model's versions, oldest first.

        Raises:
            RegistryError: No such model.
        """
        aliases = self.aliases_of(model)
        with self.errors("list versions"):
            found = _all_pages(self._client.search_model_versions, f"name='{model}'")
        versions = [_to_version(each, aliases) for each in found]
        return sorted(versions, key=lambda version: version.version)

    def aliases_of(self, model: str) -> dict[str, int]:
        """Return the version that each of a model's aliases names.

        Raises:
            RegistryError: No such model.
        """
        from mlflow.exceptions import MlflowException

        with self.errors(f"find {model}"):
            try:
                return _aliases(self._client.get_registered_model(model))
            except MlflowException as error:
                if error.error_code != _MISSING:
                    raise
        known = ", ".join(self.models()) or "none yet"
        raise NothingThereYetError(
            f"no model {model!r} in the registry {self.uri}",
            remedy=f"registered models: {known}; see `minigpt models register`",
        )

    def create_model(self, name: str) -> None:
        """Make a registered model, unless it is there."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != _EXISTS:
                raise

    def create_version(self, name: str, artifact: Artifact) -> ModelVersion:
        """Make a model's next version, which points to an artifact."""
        origin = origin_of(artifact)
        # A server refuses sources on its clients' disks, so that those are named by id there;
        # the origin in the tag is what counts.
        keeps_paths = not self._is_server or is_remote(artifact.uri)
        made = self._client.create_model_version(
            name,
            artifact.uri if keeps_paths else f"minigpt://artifact/{artifact.id}",
            run_id=self._mlflow_run(origin) if keeps_paths else None,
            tags={_ORIGIN_TAG: json.dumps(origin.model_dump(mode="json"))},
        )
        return _to_version(made, {})

    def add_evidence(self, version: ModelVersion, evidence: Evidence) -> ModelVersion:
        """Append a verdict to those of a version."""
        version = replace(version, evidence=(*version.evidence, evidence))
        value = json.dumps([each.model_dump(mode="json") for each in version.evidence])
        self._client.set_model_version_tag(
            version.model, str(version.version), _EVIDENCE_TAG, value
        )
        return version

    def set_alias(self, model: str, alias: str, version: int) -> None:
        """Let an alias name a version."""
        self._client.set_registered_model_alias(model, alias, str(version))

    @cached_property
    def history(self) -> AliasHistory:
        """The record of alias changes."""
        client = self._client  # which makes MLflow's own tables first
        return TagHistory(client) if self._is_server else DatabaseHistory(self.uri)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other processes' writers out while a SQLite registry is written."""
        file = self._sqlite_file
        if file is None:
            yield
            return
        with storage_errors(f"write {file}"):
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file.with_name(file.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def errors(self, action: str) -> Iterator[None]:
        """Turn what MLflow and SQLAlchemy raise into one line."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, SQLAlchemyError) as error:
            line = " ".join(str(error).split())[:200]
            raise RegistryError(
                f"can't {action} in the registry {self.uri}: {line}",
                remedy=f"check the name, and {URI_VARIABLE} if it is set",
            ) from error

    @cached_property
    def _client(self) -> MlflowClient:
        from mlflow import MlflowClient

        if (file := self._sqlite_file) is not None:
            with storage_errors(f"create {file.parent}"):
                file.parent.mkdir(parents=True, exist_ok=True)
        with self.errors("connect"):
            return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    @property
    def _is_server(self) -> bool:
        return self.uri.startswith(("http://", "https://"))

    @property
    def _sqlite_file(self) -> Path | None:
        prefix = "sqlite:///"
        return Path(self.uri.removeprefix(prefix)) if self.uri.startswith(prefix) else None

    def _mlflow_run(self, origin: Origin) -> str | None:
        """Return the id of the training run's record where it is in this very database."""
        try:
            record = json.loads((Path(origin.run_dir) / "mlflow.json").read_bytes())
        except (OSError, ValueError):
            return None
        return record.get("run_id") if origin.run_dir and record.get("uri") == self.uri else None


def _aliases(model: Any) -> dict[str, int]:
    return {alias: int(version) for alias, version in sorted(model.aliases.items())}


def _to_version(found: Any, aliases: dict[str, int]) -> ModelVersion:
    number = int(found.version)
    if _ORIGIN_TAG in found.tags:
        origin = from_mapping(Origin, json.loads(found.tags[_ORIGIN_TAG]))
    else:  # made by another tool
        origin = Origin(artifact_id="", artifact_uri=found.source or "")
    evidence = json.loads(found.tags.get(_EVIDENCE_TAG, "[]"))
    return ModelVersion(
        model=found.name,
        version=number,
        created_at=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
        aliases=tuple(alias for alias, named in aliases.items() if named == number),
        origin=origin,
        evidence=tuple(from_mapping(Evidence, each) for each in evidence),
    )


def _all_pages(search: Callable[..., Any], filter_string: str | None = None) -> list[Any]:
    found, token = [], None
    while True:
        page = search(filter_string=filter_string, page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return found
