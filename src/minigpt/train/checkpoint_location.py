"""Where checkpoints are kept: a directory that all ranks share, or a URL such as `s3://...`.

A checkpoint is there from the moment that its manifest is, and not before: locally the whole
directory gets its name by a rename, remotely the manifest is the last object to be written.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Protocol

import fsspec

from minigpt.core.artifact import commit_directory
from minigpt.core.errors import ArtifactError
from minigpt.core.manifest import MANIFEST, Manifest
from minigpt.core.storage import (
    download_directory,
    home,
    is_remote,
    remote_errors,
    storage_errors,
    sync_file,
)

_NAME = re.compile(r"step-(\d{8,})")
_ASIDE = "corrupt-manifest.json"


class Location(Protocol):
    """The place of a run's checkpoints. Only `writable` and `path` are for ranks other than 0.

    Everything may raise a StorageError.
    """

    def steps(self) -> list[int]:
        """List the steps that have a checkpoint, ascending."""
        ...

    def uri(self, step: int) -> str:
        """Return the path or URL of a step's checkpoint."""
        ...

    def path(self, step: int) -> Path:
        """Return where a step's checkpoint is on this machine, remote ones once fetched."""
        ...

    def begin(self, step: int) -> str:
        """Make an empty place to write to, and return it.

        Raises:
            ArtifactError: The step has a checkpoint already.
        """
        ...

    def writable(self, place: str, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open a new file there; it is safe when the `with` block has ended without an error."""
        ...

    def commit(self, place: str, step: int, manifest: Manifest) -> None:
        """Write the manifest: from now on the step has a checkpoint."""
        ...

    def clean(self) -> None:
        """Remove what killed writers and removers left."""
        ...

    def remove(self, step: int) -> None:
        """Remove a checkpoint; a kill in the middle leaves none."""
        ...

    def set_aside(self, step: int) -> str:
        """Take a corrupt checkpoint out of the way and return where it is now."""
        ...

    def fetch(self, step: int) -> None:
        """Bring a remote checkpoint to `path`; a local one is there."""
        ...

    def release(self, step: int) -> None:
        """Remove what `fetch` brought."""
        ...


def open_location(directory: str | Path) -> Location:
    """Return the location that a path or URL names."""
    return RemoteLocation(str(directory)) if is_remote(directory) else LocalLocation(directory)


class LocalLocation:
    """A directory; for ranks on several machines, one on a file system that they share."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory).absolute()

    def steps(self) -> list[int]:
        found = (_NAME.fullmatch(path.name) for path in self._directory.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def uri(self, step: int) -> str:
        return str(self.path(step))

    def path(self, step: int) -> Path:
        return self._directory / _name(step)

    def begin(self, step: int) -> str:
        if self.path(step).exists():
            raise _exists(self.uri(step))
        place = self._directory / f".{_name(step)}.{os.getpid()}.tmp"
        with storage_errors(f"write {self.path(step)}"):
            self.clean()
            place.mkdir(parents=True)
        return str(place)

    @contextmanager
    def writable(self, place: str, name: str) -> Iterator[IO[bytes]]:
        path = Path(place, name)
        with storage_errors(f"write {path}"):
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())

    def commit(self, place: str, step: int, manifest: Manifest) -> None:
        with storage_errors(f"write {self.path(step)}"):
            path = Path(place, MANIFEST)
            path.write_bytes(manifest.to_json())
            sync_file(path)
            commit_directory(Path(place), self.path(step))

    def clean(self) -> None:
        for leftover in self._directory.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def remove(self, step: int) -> None:
        # Renamed first: a kill in the middle never leaves half a checkpoint by its name.
        doomed = self._directory / f".{_name(step)}.old.tmp"
        with storage_errors(f"remove {self.path(step)}"):
            self.path(step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def set_aside(self, step: int) -> str:
        aside = self._directory / f"corrupt-{_name(step)}"
        shutil.rmtree(aside, ignore_errors=True)
        with storage_errors(f"move {self.path(step)}"):
            return str(self.path(step).rename(aside))

    def fetch(self, step: int) -> None:
        """Do nothing."""

    def release(self, step: int) -> None:
        """Do nothing."""


class RemoteLocation:
    """Any fsspec URL. Files are streamed to it and never wait on the local disk."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        with remote_errors(f"open {url}"):
            self._filesystem, root = fsspec.core.url_to_fs(url)
        self._root = root.rstrip("/")
        host = f"{socket.gethostname()}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
        self._downloads = home() / "downloads" / host

    def steps(self) -> list[int]:
        found = (_NAME.fullmatch(key.split("/")[-2]) for key in self._keys() if _is(key, MANIFEST))
        return sorted(int(match[1]) for match in found if match)

    def uri(self, step: int) -> str:
        return f"{self._url}/{_name(step)}"

    def path(self, step: int) -> Path:
        return self._downloads / _name(step)

    def begin(self, step: int) -> str:
        if step in self.steps():
            raise _exists(self.uri(step))
        self._remove_keys(self._keys(step))
        return self._key(step)

    @contextmanager
    def writable(self, place: str, name: str) -> Iterator[IO[bytes]]:
        with (
            remote_errors(f"write {self._url}/{place.rsplit('/', 1)[1]}/{name}"),
            self._filesystem.open(f"{place}/{name}", "wb") as file,
        ):
            yield file

    def commit(self, place: str, step: int, manifest: Manifest) -> None:
        with remote_errors(f"write {self.uri(step)}"):
            self._filesystem.pipe_file(f"{place}/{MANIFEST}", manifest.to_json())

    def clean(self) -> None:
        keys = self._keys()
        alive = {key.rsplit("/", 1)[0] for key in keys if _is(key, MANIFEST) or _is(key, _ASIDE)}
        places = {self._place_of(key) for key in keys}
        dead = {p for p in places if _NAME.fullmatch(p.rsplit("/", 1)[-1])} - alive
        self._remove_keys([key for key in keys if self._place_of(key) in dead])

    def remove(self, step: int) -> None:
        manifest = f"{self._key(step)}/{MANIFEST}"
        self._remove_keys([manifest])  # first: without it there is no checkpoint
        self._remove_keys(self._keys(step))

    def set_aside(self, step: int) -> str:
        source, target = (f"{self._key(step)}/{name}" for name in (MANIFEST, _ASIDE))
        with remote_errors(f"move {self.uri(step)}"):
            self._filesystem.pipe_file(target, self._filesystem.cat_file(source))
        self._remove_keys([source])
        return f"{self.uri(step)}/{_ASIDE}"

    def fetch(self, step: int) -> None:
        self.release(step)
        self.path(step).parent.mkdir(parents=True, exist_ok=True)
        download_directory(self.uri(step), self.path(step), last=MANIFEST)

    def release(self, step: int) -> None:
        shutil.rmtree(self.path(step), ignore_errors=True)

    def _key(self, step: int) -> str:
        return f"{self._root}/{_name(step)}"

    def _place_of(self, key: str) -> str:
        return f"{self._root}/{key[len(self._root) :].strip('/').split('/')[0]}"

    def _keys(self, step: int | None = None) -> list[str]:
        with remote_errors(f"list {self._url}"):
            self._filesystem.invalidate_cache()
            found = self._filesystem.find(self._root if step is None else self._key(step))
        return [str(key) for key in found]

    def _remove_keys(self, keys: list[str]) -> None:
        with remote_errors(f"remove from {self._url}"):
            for key in keys:
                with suppress(FileNotFoundError):
                    self._filesystem.rm_file(key)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _is(key: str, name: str) -> bool:
    return key.rsplit("/", 1)[-1] == name


def _exists(uri: str) -> ArtifactError:
    return ArtifactError(
        f"{uri} exists, and artifacts are never changed",
        remedy="remove it, or resume from it",
    )
