"""How the registry names and describes a model version."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from minigpt.core.artifact import Artifact, LineageNode, lineage
from minigpt.core.config import Config
from minigpt.core.errors import RegistryError

CHAMPION = "champion"
ALIASES = (CHAMPION, "challenger")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RUN_MARK = "metrics.jsonl"


class NothingThereYetError(RegistryError):
    """A model that has no version yet, or an alias that names none."""


class Reference(NamedTuple):
    """A model version as a user names it: `model/3`, `model@alias`, `model` or `alias`."""

    model: str | None
    """None where only an alias is given."""
    version: int | None = None
    alias: str | None = None


def parse_reference(text: str) -> Reference:
    """Read a reference.

    Raises:
        RegistryError: It is none of the four forms.
    """
    name, slash, version = text.partition("/")
    if slash and version.isdecimal() and _NAME.fullmatch(name):
        return Reference(name, version=int(version))
    name, at, alias = text.partition("@")
    if at and alias in ALIASES and _NAME.fullmatch(name):
        return Reference(name, alias=alias)
    if text in ALIASES:
        return Reference(None, alias=text)
    if is_name(text):
        return Reference(text, alias=CHAMPION)
    raise RegistryError(
        f"{text!r} is neither a path that exists nor a registered model",
        remedy="write MODEL, MODEL/3, MODEL@challenger, champion or challenger",
    )


def is_name(text: str) -> bool:
    """Tell whether a text can be a registered model's name."""
    return _NAME.fullmatch(text) is not None and text not in ALIASES


def check_name(name: str) -> None:
    """Refuse a name that references could not express.

    Raises:
        RegistryError: See above.
    """
    if not is_name(name):
        raise RegistryError(
            f"model name {name!r} can't be used",
            remedy=f"letters, digits, '.', '_' and '-', and not {' or '.join(ALIASES)}",
        )


class Evidence(Config):
    """A gate's verdict on a version, and the report that says why."""

    report_id: str
    report_uri: str
    verdict: str
    """pass, fail or insufficient; "none" where the report was made without a gate."""
    at: datetime


class Origin(Config):
    """What a version was made from."""

    artifact_id: str
    artifact_uri: str
    data_id: str = ""
    data_uri: str = ""
    code_version: str = ""
    code_commit: str = ""
    run_dir: str = ""
    """The training run's directory, where it can be found."""


@dataclass(frozen=True)
class ModelVersion:
    """A version in the registry."""

    model: str
    version: int
    created_at: datetime
    aliases: tuple[str, ...]
    origin: Origin
    evidence: tuple[Evidence, ...]
    """Oldest first; the last one counts."""

    @property
    def reference(self) -> str:
        """The version's unambiguous name."""
        return f"{self.model}/{self.version}"

    @property
    def verdict(self) -> str:
        """The last verdict, "none" before any."""
        return self.evidence[-1].verdict if self.evidence else "none"


def origin_of(artifact: Artifact) -> Origin:
    """Trace a model artifact to its data, code and run."""
    data_id = data_uri = run_dir = ""
    pending: list[LineageNode] = [lineage(artifact)]
    while pending:
        node = pending.pop(0)
        if node.parent.kind == "dataset" and not data_id:
            data_id, data_uri = node.parent.id, node.parent.uri
        directory = Path(node.parent.uri).parent
        if node.parent.kind == "model" and not run_dir and (directory / _RUN_MARK).is_file():
            run_dir = str(directory)
        pending += node.ancestors
    code = artifact.manifest.code
    return Origin(
        artifact_id=artifact.id,
        artifact_uri=artifact.uri,
        data_id=data_id,
        data_uri=data_uri,
        code_version=code.version,
        code_commit=code.commit + ("+modified" if code.dirty else ""),
        run_dir=run_dir,
    )
