"""The manifest: what an artifact is, whence it came, and the hash of every byte and tensor."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from minigpt.core.config import Config

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
Kind = Literal["tokenizer", "dataset", "model", "adapter", "draft-heads", "checkpoint", "report"]

_BLOCK = 1 << 20


class FileEntry(Config):
    """One file of an artifact."""

    sha256: str
    size: int


class TensorEntry(Config):
    """One logical tensor, whatever file or shard holds it."""

    sha256: str | None = None
    """Over dtype, shape and bytes, where a file holds the tensor whole."""
    fingerprint: str | None = None
    """128 bits that are the same however it is cut (`train.tensor_hash`), in checkpoints."""
    dtype: str
    shape: tuple[int, ...]

    @model_serializer(mode="wrap")
    def _without_the_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the hash that is not there, so that a manifest's id covers what it has."""
        tree: dict[str, Any] = handler(self)
        return {key: value for key, value in tree.items() if value is not None}


class Parent(Config):
    """An artifact that this one was made from."""

    id: str
    kind: Kind
    uri: str


class CodeVersion(Config):
    """The code that made an artifact."""

    version: str
    commit: str = ""
    dirty: bool = False


class Manifest(Config):
    """The record that makes a directory an artifact; `id` hashes all the rest."""

    format_version: int
    id: str = ""
    kind: Kind
    name: str
    parents: tuple[Parent, ...] = ()
    config: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, FileEntry] = Field(default_factory=dict)
    tensors: dict[str, TensorEntry] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    code: CodeVersion
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))

    def computed_id(self) -> str:
        """Hash everything but `id`, in canonical JSON."""
        content = self.model_dump(mode="json", exclude={"id"})
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> bytes:
        """Render for `manifest.json`."""
        return (json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n").encode()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def hash_tensors(path: Path) -> dict[str, TensorEntry]:
    """Hash each tensor of a safetensors file over its dtype, shape and bytes.

    The hash does not depend on the file that holds the tensor, so that two shardings of the
    same weights have equal tensor hashes. Format: https://github.com/huggingface/safetensors
    """
    entries = {}
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        for name, info in header.items():
            begin, end = info["data_offsets"]
            digest = hashlib.sha256(f"{info['dtype']}{info['shape']}".encode())
            file.seek(8 + header_size + begin)
            remaining = end - begin
            while remaining and (block := file.read(min(_BLOCK, remaining))):
                digest.update(block)
                remaining -= len(block)
            entries[name] = TensorEntry(
                sha256=digest.hexdigest(), dtype=info["dtype"], shape=tuple(info["shape"])
            )
    return dict(sorted(entries.items()))


@lru_cache(maxsize=1)
def code_version() -> CodeVersion:
    """Return the package's version and, in a checkout of its own, the commit it runs from."""
    source = Path(__file__).resolve().parent
    try:
        commit = _git(source, "rev-parse", "HEAD")
        dirty = bool(_git(source, "status", "--porcelain", "--", str(source.parent)))
    except (OSError, subprocess.SubprocessError):
        commit, dirty = "", False
    return CodeVersion(version=version("minigpt"), commit=commit, dirty=dirty)


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()
