"""Which files a source covers, locally or behind any fsspec URL, in a fixed order."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec

from minigpt.core.errors import DataError
from minigpt.core.storage import storage_errors
from minigpt.data.config import SourceConfig

_SUFFIXES = {
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet",),
    "chat": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"),
    "preference": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"),
}


class SourceFile(NamedTuple):
    """A file to read."""

    path: str
    size: int
    filesystem: Any
    """fsspec's file system that opens `path`."""


def find_files(config: SourceConfig) -> list[SourceFile]:
    """List the files of a source that is made of files, sorted by path.

    Below a directory, hidden files and directories and links to directories are left out.

    Raises:
        DataError: A path does not exist, matches no file, or has an unknown protocol.
        StorageError: A directory can't be read.
    """
    assert config.kind != "huggingface"
    if config.kind == "pystdlib":
        return _standard_library()
    suffixes = config.suffixes or _SUFFIXES.get(config.kind, ())
    found: dict[str, SourceFile] = {}
    for pattern in config.paths:
        try:
            filesystem, root = fsspec.core.url_to_fs(pattern)
        except (ValueError, ImportError) as error:
            raise DataError(f"source.paths: can't open {pattern}: {error}") from None
        with storage_errors(f"read {pattern}"):
            matches = _expand(filesystem, root, suffixes)
        if not matches:
            ends = f" that ends in {' or '.join(suffixes)}" if suffixes else ""
            raise DataError(
                f"source.paths: no file{ends} at {pattern}",
                remedy="check the path; relative ones begin at the working directory",
            )
        found |= matches
    return [found[path] for path in sorted(found)]


def _expand(filesystem: Any, root: str, suffixes: tuple[str, ...]) -> dict[str, SourceFile]:
    """Return the files that a path, directory or glob stands for."""
    is_glob = any(char in root for char in "*?[") and not filesystem.exists(root)
    if not is_glob and filesystem.isfile(root):  # named outright: whatever its suffix
        return {root: SourceFile(root, int(filesystem.size(root) or 0), filesystem)}
    found = {}
    for top in filesystem.glob(root) if is_glob else [root]:
        for path, info in filesystem.find(top, detail=True).items():
            hidden = path != top and _is_hidden(path[len(top.rstrip("/")) + 1 :])
            # Local links are of type "other"; one to a file counts as that file.
            is_file = info["type"] == "file" or filesystem.isfile(path)
            if is_file and not hidden and (not suffixes or path.endswith(suffixes)):
                found[path] = SourceFile(path, int(info["size"] or 0), filesystem)
    return found


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(path).parts)


def _standard_library() -> list[SourceFile]:
    """List the source files of the running Python's standard library, sub-packages included.

    Packages installed beside it are no part of it.
    """
    root = sysconfig.get_paths()["stdlib"]
    filesystem = fsspec.filesystem("file")
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    found = []
    for directory, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        for name in names:
            path = Path(directory, name)
            if path.suffix == ".py" and path.is_file():
                found.append(SourceFile(str(path), path.stat().st_size, filesystem))
    if not found:
        raise DataError(
            f"this Python has no sources of its standard library at {root}",
            remedy="install them or use another source",
        )
    return sorted(found)
