"""Files that survive: atomic writes, synced directories, and any fsspec URL.

Local paths are ordinary paths; anything with a protocol (`s3://`, `memory://`) goes through
fsspec. A remote directory counts as there only once its last-written file is.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec

from minigpt.core.errors import MinigptError, StorageError


def is_remote(url: str | Path) -> bool:
    """Tell whether `url` names a place that is not on the local file system."""
    return "://" in str(url) and not str(url).startswith("file://")


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Turn an `OSError` while doing `action` into a `StorageError` with a remedy."""
    remedies = {
        errno.ENOSPC: "free space there or choose another directory",
        errno.EDQUOT: "the quota is used up: free space or choose another directory",
        errno.EFBIG: "the file would exceed the size limit: raise `ulimit -f` or the quota",
        errno.EROFS: "the file system is read-only: choose another directory",
        errno.EACCES: "check the permissions or choose another directory",
        errno.ENOENT: "check the path",
    }
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        remedy = remedies.get(error.errno or 0, "")
        raise StorageError(f"can't {action}: {reason.lower()}", remedy=remedy) from error


@contextmanager
def remote_errors(action: str) -> Iterator[None]:
    """Turn whatever a remote file system raises while doing `action` into a `StorageError`.

    Each client library has errors of its own besides `OSError`.
    """
    try:
        yield
    except MinigptError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise StorageError(
            f"can't {action}: {reason}", remedy="check the URL, the credentials and the connection"
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a reader sees the old bytes or the new, never a mixture.

    Raises:
        StorageError: The bytes could not be written; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with storage_errors(f"write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Force a directory's entries to the disk, so that a rename in it survives a power cut."""
    sync_file(path)


def upload_directory(source: Path, url: str, *, last: str) -> None:
    """Copy a directory to a URL, the file `last` at the very end as the mark of completeness."""
    names = sorted(str(p.relative_to(source)) for p in source.rglob("*") if p.is_file())
    names.remove(last)
    with remote_errors(f"write {url}"):
        filesystem, root = fsspec.core.url_to_fs(url)
        for name in [*names, last]:
            target = f"{root.rstrip('/')}/{name}"
            filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            filesystem.put_file(str(source / name), target)


def download_directory(url: str, destination: Path, *, last: str) -> None:
    """Copy a URL's files into `destination` (made anew), which appears only when complete.

    Raises:
        StorageError: `url` holds no file `last`, or can't be read.
    """
    with remote_errors(f"read {url}"):
        filesystem, root = fsspec.core.url_to_fs(url)
        root = root.rstrip("/")
        if not filesystem.exists(f"{root}/{last}"):
            raise StorageError(f"{url} holds no {last}", remedy="check the URL")
        temporary = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            for name in filesystem.find(root):
                target = temporary / name[len(root) + 1 :]
                target.parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(name, str(target))
            temporary.rename(destination)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def home() -> Path:
    """Return minigpt's own directory: `MINIGPT_HOME`, or `~/.minigpt`."""
    return Path(os.environ.get("MINIGPT_HOME") or Path.home() / ".minigpt").absolute()
