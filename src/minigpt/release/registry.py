"""The registry: MLflow's registered models, and a history of aliases that MLflow lacks.

A version points to an artifact by URI and id; it holds no weights itself. By default everything
is in one SQLite file, `mlflow.db` in minigpt's home; `MINIGPT_REGISTRY_URI` names any other
database or MLflow server. On SQLite, writers of several processes take turns behind a file lock.
"""

from __future__ import annotations

import getpass
import os
import socket
from pathlib import Path

from minigpt.core.artifact import Artifact, is_artifact, open_artifact
from minigpt.core.clock import Clock, SystemClock
from minigpt.core.errors import ArtifactError, GateError, RegistryError
from minigpt.core.storage import is_remote
from minigpt.release.history import AliasChange
from minigpt.release.store import MlflowStore, default_uri
from minigpt.release.version import (
    ALIASES,
    CHAMPION,
    Evidence,
    ModelVersion,
    NothingThereYetError,
    check_name,
    is_name,
    parse_reference,
)

_OUTSIDE = "changed outside minigpt, or a promotion was interrupted"


class Registry:
    """Registered models, their versions and aliases, and the rules of promotion.

    Args:
        uri: A database (`sqlite:///...`, `postgresql://...`) or MLflow server (`http://...`);
            None is `MINIGPT_REGISTRY_URI` or the SQLite file in minigpt's home.
        clock: Stamps changes.
    """

    def __init__(self, uri: str | None = None, *, clock: Clock | None = None) -> None:
        self._store = MlflowStore(uri or default_uri())
        self._clock = clock or SystemClock()

    def models(self) -> dict[str, dict[str, int]]:
        """Return each registered model's aliases, `{model: {alias: version}}`."""
        return self._store.models()

    def versions(self, model: str) -> list[ModelVersion]:
        """Return a model's versions, oldest first.

        Raises:
            RegistryError: No such model.
        """
        return self._store.versions(model)

    def get(self, reference: str) -> ModelVersion:
        """Return the version that `model/3`, `model@alias`, `model` or `alias` names.

        Raises:
            RegistryError: No such model, version or alias, or several models have the alias.
        """
        wanted = parse_reference(reference)
        model = wanted.model or self._only_model_with(str(wanted.alias))
        number = wanted.version
        if number is None:
            number = self._store.aliases_of(model).get(str(wanted.alias))
        if number is None:
            raise NothingThereYetError(
                f"{model} has no {wanted.alias}",
                remedy=f"minigpt models promote {model}/VERSION --alias {wanted.alias}",
            )
        for version in self._store.versions(model):
            if version.version == number:
                return version
        raise RegistryError(
            f"{model} has no version {number}", remedy=f"minigpt models list {model}"
        )

    def newest(self, reference: str) -> ModelVersion:
        """Return what `get` does, but for a bare `model` its newest version.

        Raises:
            RegistryError: As `get`.
        """
        if not is_name(reference):
            return self.get(reference)
        versions = self._store.versions(reference)
        if not versions:
            raise NothingThereYetError(
                f"{reference} has no versions", remedy="see `minigpt models register`"
            )
        return versions[-1]

    def register(self, model: str | Path, name: str, report: str | None = None) -> ModelVersion:
        """Make an artifact a version of a registered model, or add evidence to the version it is.

        Args:
            model: A model artifact, which is verified.
            name: The registered model; made if it is new.
            report: An evaluation report of this very artifact, whose verdict is recorded.

        Raises:
            ArtifactError: The artifact or the report is corrupt or of another kind.
            RegistryError: The name can't be used, or the report is of another model.
        """
        check_name(name)
        artifact = open_artifact(model, kind="model")
        evidence = self._read_evidence(report, artifact) if report else None
        with self._store.writing(), self._store.errors(f"register {name}"):
            self._store.create_model(name)
            known = [v for v in self._store.versions(name) if v.origin.artifact_id == artifact.id]
            version = known[0] if known else self._store.create_version(name, artifact)
            if evidence and evidence.report_id not in {e.report_id for e in version.evidence}:
                version = self._store.add_evidence(version, evidence)
        return version

    def promote(
        self, reference: str, alias: str = CHAMPION, *, by: str | None = None, why: str = ""
    ) -> AliasChange | None:
        """Let an alias name a version whose gate passed; `None` where it did already.

        Args:
            reference: As `get`.
            alias: `champion` or `challenger`.
            by: Who does it; default is the user and host.
            why: For the record.

        Raises:
            GateError: No gate judged this very artifact, or its verdict is not `pass`.
            ArtifactError: The artifact or the report can't be verified.
            RegistryError: No such version or alias.
        """
        if alias not in ALIASES:
            raise RegistryError(
                f"alias {alias!r} is unknown", remedy=f"one of {', '.join(ALIASES)}"
            )
        version = self.get(reference)
        self._check_promotable(version)
        with self._store.writing(), self._store.errors(f"promote {version.reference}"):
            current = self._reconciled(version.model).get(alias)
            if current == version.version:
                return None
            change = AliasChange(
                at=self._clock.now(),
                model=version.model,
                alias=alias,
                from_version=current,
                to_version=version.version,
                by=by or _who(),
                why=why,
            )
            # The record comes first: a crash between the two is found and noted by the next
            # `_reconciled`, while a change without a record would leave no trace.
            self._store.history.append(change)
            self._store.set_alias(version.model, alias, version.version)
        return change

    def history(self, model: str) -> list[AliasChange]:
        """Return a model's alias changes, oldest first, those made outside minigpt included.

        Raises:
            RegistryError: No such model.
        """
        self._store.aliases_of(model)
        with self._store.writing(), self._store.errors(f"read the history of {model}"):
            self._reconciled(model)
            return self._store.history.read(model)

    def resolve(self, name: str | Path) -> Path:
        """Return the local directory of a model: a path as it is, a reference looked up.

        Args:
            name: A directory, a URL of an artifact, or a reference as `get` takes.

        Raises:
            RegistryError: Neither a path nor in the registry.
            ArtifactError: The registered artifact is gone or was replaced.
        """
        if is_remote(name):
            return open_artifact(name, kind="model", verify=False).path
        path = Path(name)
        if is_artifact(path) or (path / "config.json").is_file():
            return path
        try:
            parse_reference(str(name))
        except RegistryError:
            if path.exists():
                raise ArtifactError(
                    f"{path} holds no model: neither manifest.json nor config.json is there",
                    remedy="give a model artifact or a Hugging Face directory",
                ) from None
            raise
        return self.open(self.get(str(name)), verify=False).path

    def open(self, version: ModelVersion, *, verify: bool = True) -> Artifact:
        """Open a version's artifact and make sure that it is the registered one.

        Raises:
            ArtifactError: It is gone, corrupt, or another artifact by now.
        """
        origin = version.origin
        artifact = open_artifact(origin.artifact_uri, kind="model", verify=verify)
        if artifact.id != origin.artifact_id:
            raise ArtifactError(
                f"{origin.artifact_uri} is not the artifact registered as {version.reference}: "
                f"its id is {artifact.id[:12]}, registered was {origin.artifact_id[:12]}",
                remedy="restore the artifact or register the new one",
            )
        return artifact

    def _only_model_with(self, alias: str) -> str:
        """Return the one model that has an alias, for references that name only that."""
        having = [model for model, aliases in self._store.models().items() if alias in aliases]
        if len(having) == 1:
            return having[0]
        if not having:
            raise NothingThereYetError(
                f"no model has a {alias} in the registry {self._store.uri}",
                remedy=f"minigpt models promote MODEL/VERSION --alias {alias}",
            )
        raise RegistryError(
            f"several models have a {alias}: {', '.join(having)}",
            remedy=f"say which, for example {having[0]}@{alias}",
        )

    def _read_evidence(self, report: str, artifact: Artifact) -> Evidence:
        found = open_artifact(report, kind="report")
        if artifact.id not in {parent.id for parent in found.manifest.parents}:
            raise RegistryError(
                f"report {report} is of another model than {artifact.uri}",
                remedy=f"minigpt evaluate {artifact.uri} --gate GATE.yaml --out REPORT",
            )
        verdict = str(found.manifest.metrics.get("verdict", "none"))
        return Evidence(
            report_id=found.id, report_uri=found.uri, verdict=verdict, at=self._clock.now()
        )

    def _check_promotable(self, version: ModelVersion) -> None:
        """Look at the files themselves, not only at what the registry remembers of them."""
        artifact = self.open(version)
        remedy = (
            f"minigpt evaluate {artifact.uri} --data DATASET --gate GATE.yaml --out REPORT, then "
            f"minigpt models register {artifact.uri} --name {version.model} --report REPORT"
        )
        if not version.evidence:
            raise GateError(f"no gate has judged {version.reference}", remedy=remedy)
        recorded = version.evidence[-1]
        current = self._read_evidence(recorded.report_uri, artifact)
        if current.report_id != recorded.report_id:
            raise ArtifactError(f"{recorded.report_uri} is not the report that was registered")
        if current.verdict != "pass":
            raise GateError(
                f"the gate's verdict on {version.reference} is {current.verdict!r}, not 'pass' "
                f"(report {current.report_uri}){self._broken_rules(current)}",
                remedy="promote another version, or mend the model and register it anew",
            )

    def _broken_rules(self, evidence: Evidence) -> str:
        found = open_artifact(evidence.report_uri, kind="report", verify=False)
        broken = found.manifest.metrics.get("broken_rules")
        return f": {broken}" if broken else ""

    def _reconciled(self, model: str) -> dict[str, int]:
        """Return a model's aliases after noting changes that have no record yet."""
        aliases = self._store.aliases_of(model)
        recorded: dict[str, int | None] = {}
        for change in self._store.history.read(model):
            recorded[change.alias] = change.to_version
        for alias in sorted(aliases.keys() | recorded.keys()):
            before, now = recorded.get(alias), aliases.get(alias)
            if before != now:
                change = AliasChange(
                    at=self._clock.now(), model=model, alias=alias, from_version=before,
                    to_version=now, by="unknown", why=_OUTSIDE,
                )  # fmt: skip
                self._store.history.append(change)
        return aliases


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
