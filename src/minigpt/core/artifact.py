"""Artifacts: immutable directories with a manifest, the only thing that stages hand on.

Writing goes to a temporary directory beside the destination, which is synced and renamed
into place: after `kill -9` there is a whole artifact or none.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from minigpt.core.config import Config, from_mapping
from minigpt.core.errors import ArtifactError, ConfigError, StorageError
from minigpt.core.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    FileEntry,
    Kind,
    Manifest,
    Parent,
    TensorEntry,
    code_version,
    hash_file,
    hash_tensors,
)
from minigpt.core.storage import (
    download_directory,
    home,
    is_remote,
    storage_errors,
    sync_directory,
    sync_file,
    upload_directory,
)

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Artifact:
    """An artifact on the local disk. `uri` is where it was asked for (path or URL)."""

    path: Path
    uri: str
    manifest: Manifest

    @property
    def id(self) -> str:
        """The hash of the manifest, which covers every file."""
        return self.manifest.id

    def as_parent(self) -> Parent:
        """Return the reference that a child's manifest keeps."""
        return Parent(id=self.id, kind=self.manifest.kind, uri=self.uri)


@dataclass
class ArtifactDraft:
    """An artifact being written: put files under `path`, set `metrics`."""

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    artifact: Artifact | None = None
    """The finished artifact; set when the `with` block has ended without an error."""


@contextmanager
def create_artifact(
    destination: str | Path,
    *,
    kind: Kind,
    parents: Iterable[Artifact | Parent] = (),
    config: Config | Mapping[str, Any] | None = None,
) -> Iterator[ArtifactDraft]:
    """Write an artifact atomically.

    Example:
        with create_artifact("out/model", kind="model", parents=[data]) as draft:
            save_file(tensors, draft.path / "model.safetensors")
        model = draft.artifact

    Args:
        destination: A path or URL at which nothing may exist yet.
        kind: What it is.
        parents: What it was made from; read when the block has ended, so that it may be filled
            within it.
        config: How it was made.

    Raises:
        ArtifactError: Something is at `destination` already.
        StorageError: Full disk, no permission; nothing is left behind.
    """
    uri = str(destination) if is_remote(destination) else str(Path(destination).absolute())
    final = home() / "uploads" / uuid.uuid4().hex if is_remote(uri) else Path(uri)
    if final.exists():
        raise ArtifactError(
            f"{final} exists, and artifacts are never changed",
            remedy="choose another path or remove it",
        )
    with storage_errors(f"write {final}"):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(final)
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        temporary.mkdir()
    try:
        draft = ArtifactDraft(temporary)
        with storage_errors(f"write {final}"):
            yield draft
            manifest = _seal(draft, kind, final.name, parents, config)
            commit_directory(temporary, final)
        if is_remote(uri):
            upload_directory(final, uri, last=MANIFEST)
        draft.artifact = Artifact(final, uri, manifest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_artifact(uri: str | Path, *, kind: Kind | None = None, verify: bool = True) -> Artifact:
    """Open an artifact, fetching it first where `uri` is remote.

    Args:
        uri: A directory or any fsspec URL of one.
        kind: The kind that it must be, or None for any.
        verify: Hash every file and compare (about 1 GB/s).

    Raises:
        ArtifactError: No artifact there, another kind, from a newer version, or a file is
            missing, truncated or changed; the message names the file.
    """
    path = _local_copy(str(uri)) if is_remote(uri) else Path(uri).absolute()
    manifest = read_manifest(path)
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{uri} is a {manifest.kind} artifact, but a {kind} is needed here")
    _check_sizes(path, manifest)
    artifact = Artifact(path, str(uri) if is_remote(uri) else str(path), manifest)
    if verify:
        verify_artifact(artifact)
    return artifact


def is_artifact(path: str | Path) -> bool:
    """Tell whether a local directory holds a manifest."""
    return (Path(path) / MANIFEST).is_file()


def verify_artifact(artifact: Artifact, *, part: int = 0, parts: int = 1) -> None:
    """Compare files with their hashes in the manifest.

    Args:
        artifact: It.
        part: Which share of the files to hash, where `parts` processes divide them up.
        parts: Into how many shares.

    Raises:
        ArtifactError: A file is missing, truncated, changed, or not in the manifest.
    """
    _check_sizes(artifact.path, artifact.manifest)
    for name, entry in list(artifact.manifest.files.items())[part::parts]:
        if hash_file(artifact.path / name) != entry.sha256:
            raise ArtifactError(
                f"{artifact.path / name} is corrupt: its SHA-256 is not the manifest's",
                remedy="restore the artifact from a copy or make it anew",
            )
    for name in _file_names(artifact.path):
        if name != MANIFEST and name not in artifact.manifest.files:
            raise ArtifactError(
                f"{artifact.path / name} is not in the manifest", remedy="move it elsewhere"
            )


def make_manifest(
    kind: Kind,
    name: str,
    *,
    files: Mapping[str, FileEntry],
    tensors: Mapping[str, TensorEntry],
    metrics: Mapping[str, Any],
    parents: Iterable[Artifact | Parent],
    config: Config | Mapping[str, Any] | None,
) -> Manifest:
    """Make the manifest, id and all, of files that are written and hashed."""
    plain = config.model_dump(mode="json") if isinstance(config, Config) else dict(config or {})
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        kind=kind,
        name=name,
        parents=tuple(p.as_parent() if isinstance(p, Artifact) else p for p in parents),
        config=plain,
        files=dict(files),
        tensors=dict(sorted(tensors.items())),
        metrics=dict(metrics),
        code=code_version(),
    )
    return manifest.model_copy(update={"id": manifest.computed_id()})


@dataclass(frozen=True)
class LineageNode:
    """An artifact's ancestry; `artifact` is None where the parent is no longer at its URI."""

    parent: Parent
    artifact: Artifact | None
    ancestors: tuple[LineageNode, ...]


def lineage(artifact: Artifact) -> LineageNode:
    """Follow an artifact's parents as far as they can still be found with the same id."""
    return LineageNode(
        artifact.as_parent(), artifact, tuple(_trace(p) for p in artifact.manifest.parents)
    )


def _trace(parent: Parent) -> LineageNode:
    try:
        found = open_artifact(parent.uri, verify=False)
    except (ArtifactError, StorageError):
        return LineageNode(parent, None, ())
    if found.id != parent.id:
        return LineageNode(parent, None, ())
    return lineage(found)


def _seal(
    draft: ArtifactDraft,
    kind: Kind,
    name: str,
    parents: Iterable[Artifact | Parent],
    config: Config | Mapping[str, Any] | None,
) -> Manifest:
    files: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    for file_name in _file_names(draft.path):
        path = draft.path / file_name
        sync_file(path)
        files[file_name] = FileEntry(sha256=hash_file(path), size=path.stat().st_size)
        if path.suffix == ".safetensors":
            tensors |= hash_tensors(path)
    manifest = make_manifest(
        kind,
        name,
        files=files,
        tensors=tensors,
        metrics=draft.metrics,
        parents=parents,
        config=config,
    )
    (draft.path / MANIFEST).write_bytes(manifest.to_json())
    sync_file(draft.path / MANIFEST)
    return manifest


def commit_directory(temporary: Path, final: Path) -> None:
    """Rename a directory whose files are synced, so that it survives a power cut as a whole."""
    for directory in (d for d in temporary.rglob("*") if d.is_dir()):
        sync_directory(directory)
    sync_directory(temporary)
    temporary.rename(final)
    sync_directory(final.parent)


def _remove_abandoned(final: Path) -> None:
    """Remove what a killed writer of the same destination left, unless it still runs."""
    for leftover in final.parent.glob(f".{final.name}.*.tmp"):
        pid = leftover.name.split(".")[-2]
        if not Path("/proc", pid).exists() or int(pid) == os.getpid():
            shutil.rmtree(leftover, ignore_errors=True)


def _file_names(path: Path) -> list[str]:
    return sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest in a directory, and nothing else there.

    Raises:
        ArtifactError: It is missing, malformed, changed or from a newer version.
    """
    source = path / MANIFEST
    missing = ArtifactError(f"no artifact at {path}: {MANIFEST} is missing")
    manifest = read_versioned(source, Manifest, newest=FORMAT_VERSION, missing=missing)
    if manifest.computed_id() != manifest.id:
        raise ArtifactError(f"{source} is corrupt: its content does not hash to its id")
    return manifest


def read_versioned(source: Path, cls: type[C], *, newest: int, missing: ArtifactError) -> C:
    """Read a JSON file whose `format_version` says which minigpt can.

    Args:
        source: The file.
        cls: Its content.
        newest: The highest version that is understood.
        missing: What to raise where there is no such file.

    Raises:
        ArtifactError: The file is missing, malformed or from a newer version.
    """
    try:
        tree = json.loads(source.read_bytes())
        found = tree["format_version"]
    except FileNotFoundError:
        raise missing from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{source} is corrupt: {error}") from None
    if not isinstance(found, int) or found > newest:
        raise ArtifactError(
            f"{source} has format version {found}, this minigpt reads up to {newest}",
            remedy="upgrade minigpt",
        )
    try:
        return from_mapping(cls, tree)
    except ConfigError as error:
        raise ArtifactError(f"{source} is corrupt: {error}") from None


def _check_sizes(path: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise ArtifactError(f"{file} is missing", remedy="restore the artifact from a copy")
        if file.stat().st_size != entry.size:
            raise ArtifactError(
                f"{file} is truncated or changed: {file.stat().st_size} bytes, "
                f"the manifest says {entry.size}",
                remedy="restore the artifact from a copy",
            )


def _local_copy(url: str) -> Path:
    """Fetch a remote artifact into the cache, keyed by its URL."""
    import hashlib

    cached = home() / "cache" / hashlib.sha256(url.encode()).hexdigest()[:32]
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        download_directory(url, cached, last=MANIFEST)
    return cached
