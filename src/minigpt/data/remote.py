"""Datasets behind a URL, read in place: shards come on demand into a bounded local cache.

The small files (manifest, index, offsets, tokenizer) are copied when the dataset is opened; a
shard is fetched when it is first read, or a little earlier in the background. Every file's
SHA-256 is compared with the manifest's. Failing transfers are tried again with growing pauses.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import queue
import shutil
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import numpy as np
import numpy.typing as npt

from minigpt.core.artifact import Artifact, read_manifest
from minigpt.core.errors import ArtifactError, MinigptError, StorageError
from minigpt.core.manifest import MANIFEST, FileEntry, hash_file
from minigpt.core.retry import Retry
from minigpt.core.storage import home, storage_errors, write_atomic

ORIGIN_FILE = "origin.json"
CACHE_BYTES_VARIABLE = "MINIGPT_SHARD_CACHE_BYTES"
_CACHE_BYTES = 20 << 30
_BLOCK = 1 << 20
_SHARD_SUFFIX = ".tokens"
_RETRY = Retry()


class _CorruptError(Exception):
    """Bytes that are not the manifest's; a new transfer may mend it."""


def open_remote(url: str, *, retry: Retry = _RETRY) -> Artifact:
    """Open a dataset artifact at a URL without its shards.

    Args:
        url: Any fsspec URL of a dataset artifact.
        retry: How failing transfers are tried again.

    Returns:
        The artifact; `path` is a local copy of everything but the shards, which
        `TokenDataset.open` reads like any dataset.

    Raises:
        ArtifactError: No dataset there, or a file is missing or corrupt.
        StorageError: The URL can't be read.
    """
    url = url.rstrip("/")
    root = home() / "cache" / "remote"
    temporary = root / f".{uuid.uuid4().hex}.tmp"
    try:
        with storage_errors(f"write {temporary}"):
            temporary.mkdir(parents=True)
            _fetch(f"{url}/{MANIFEST}", temporary / MANIFEST, None, retry)
            manifest = read_manifest(temporary)
            if manifest.kind != "dataset":
                raise ArtifactError(
                    f"{url} is a {manifest.kind} artifact, but a dataset is needed here"
                )
            final = root / manifest.id[:32]
            if not final.exists():
                for name, entry in manifest.files.items():
                    if not name.endswith(_SHARD_SUFFIX):
                        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                        _fetch(f"{url}/{name}", temporary / name, entry, retry)
                with suppress(OSError):  # another process was quicker
                    temporary.rename(final)
            write_atomic(final / ORIGIN_FILE, json.dumps({"url": url}).encode())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Artifact(final, url, manifest)


def is_remote_copy(directory: Path) -> bool:
    """Tell whether a directory is what `open_remote` leaves: a dataset without its shards."""
    return (directory / ORIGIN_FILE).is_file()


class ShardCache:
    """Files by content hash, at most so many bytes, the least recently used evicted first.

    Several threads and processes may use one directory: a file is fetched by one of them while
    the others wait, and appears whole. What is being fetched counts towards the bound.
    """

    def __init__(self, directory: Path, *, most_bytes: int) -> None:
        """Use `directory`, which is made when it is needed."""
        self.directory = directory
        self.most_bytes = most_bytes

    def path(self, entry: FileEntry) -> Path:
        """Return where the cache keeps a file."""
        return self.directory / entry.sha256

    def get(self, url: str, entry: FileEntry, retry: Retry) -> Path:
        """Return the file's path; fetch it from `url` first where it is not here.

        Raises:
            ArtifactError: The file is missing or corrupt at the URL.
            StorageError: It can't be read, or the cache is too small for it.
        """
        if entry.size > self.most_bytes:
            raise StorageError(
                f"{url} has {entry.size:,} bytes, more than the shard cache's {self.most_bytes:,}",
                remedy=f"set {CACHE_BYTES_VARIABLE} higher",
            )
        final = self.path(entry)
        lock = self.directory / "locks" / entry.sha256
        with storage_errors(f"write {final}"), _locked(lock):
            if self.touch(final) and hash_file(final) != entry.sha256:
                final.unlink()  # damaged since it was fetched
            if not final.exists():
                part = self._reserve(entry)
                try:
                    _fetch(url, part, entry, retry)
                    part.rename(final)
                finally:
                    part.unlink(missing_ok=True)
        return final

    def touch(self, path: Path) -> bool:
        """Mark a file as used just now; False where it is not in the cache."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _reserve(self, entry: FileEntry) -> Path:
        """Make room and a file of full size that holds it."""
        part = self.directory / f"{entry.sha256}.{os.getpid()}.part"
        with _locked(self.directory / "locks" / "all"):
            found = []
            for path in self.directory.iterdir():
                with suppress(FileNotFoundError):
                    if (
                        path.suffix == ".part"
                        and not Path("/proc", path.stem.split(".")[1]).exists()
                    ):
                        path.unlink()
                    elif path.is_file():
                        found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            used = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if used + entry.size <= self.most_bytes:
                    break
                if path.suffix != ".part":
                    path.unlink(missing_ok=True)
                    used -= size
            with part.open("wb") as file:
                file.truncate(entry.size)
        return part


class RemoteShards:
    """One split's token files behind a URL, mapped from the cache as they are read."""

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        dtype: str,
        *,
        cache: ShardCache | None = None,
        retry: Retry = _RETRY,
    ) -> None:
        """Look up the hashes; fetches nothing.

        Args:
            directory: What `open_remote` left.
            names: The files, in order.
            dtype: Of the tokens.
            cache: Where shards go; by default minigpt's home, bounded by the environment
                variable MINIGPT_SHARD_CACHE_BYTES (20 GiB).
            retry: How failing transfers are tried again.
        """
        url = json.loads((directory / ORIGIN_FILE).read_bytes())["url"]
        files = read_manifest(directory).files
        for name in names:
            if name not in files:
                raise ArtifactError(f"{url}/{name} is not in the dataset's manifest")
        self._files = [(f"{url}/{name}", files[name]) for name in names]
        self._dtype = dtype
        self._retry = retry
        self._cache = cache or ShardCache(
            home() / "cache" / "shards",
            most_bytes=int(os.environ.get(CACHE_BYTES_VARIABLE) or _CACHE_BYTES),
        )
        self._maps: dict[int, npt.NDArray[np.integer]] = {}
        self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._asked: set[int] = set()
        self._fetcher: threading.Thread | None = None

    def __getitem__(self, number: int) -> npt.NDArray[np.integer]:
        """Map a shard, fetched first where it is not in the cache.

        Raises:
            ArtifactError: The shard is missing or corrupt at its URL; names both.
            StorageError: It can't be read.
        """
        url, entry = self._files[number]
        mapped = self._maps.get(number)
        if mapped is not None and self._cache.touch(self._cache.path(entry)):
            return mapped
        path = self._cache.get(url, entry, self._retry)
        mapped = np.memmap(path, self._dtype, mode="r")
        # A map keeps an evicted file's bytes on the disk.
        self._maps = {
            known: array
            for known, array in self._maps.items()
            if self._cache.path(self._files[known][1]).exists()
        }
        self._maps[number] = mapped
        return mapped

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Fetch shards in the background, where the cache has room for more than what is read."""
        for number in numbers:
            entry = self._files[number][1]
            known = number in self._maps or number in self._asked
            if not known and 2 * entry.size <= self._cache.most_bytes:
                self._asked.add(number)
                self._wanted.put(number)
        if self._fetcher is None and not self._wanted.empty():
            self._fetcher = threading.Thread(target=self._fetch_wanted, daemon=True)
            self._fetcher.start()

    def _fetch_wanted(self) -> None:
        while True:
            number = self._wanted.get()
            url, entry = self._files[number]
            with suppress(MinigptError):  # whoever reads the shard meets the error again
                self._cache.get(url, entry, self._retry)
            self._asked.discard(number)


def _fetch(url: str, path: Path, entry: FileEntry | None, retry: Retry) -> None:
    """Copy a URL's bytes to a local file, and compare them with the manifest's entry."""

    def attempt() -> None:
        filesystem, remote = fsspec.core.url_to_fs(url)
        digest = hashlib.sha256()
        # A file that reserves room is written over, not cut down first.
        mode = "r+b" if path.exists() else "wb"
        with filesystem.open(remote, "rb") as source, path.open(mode) as target:
            while block := source.read(_BLOCK):
                digest.update(block)
                target.write(block)
            target.truncate()
        if entry is not None and digest.hexdigest() != entry.sha256:
            raise _CorruptError

    name = url.rsplit("/", 1)[1]
    try:
        retry.run(attempt, permanent=(FileNotFoundError, PermissionError))
    except FileNotFoundError:
        raise ArtifactError(
            f"{name} is missing: there is no {url}", remedy="check the URL or restore the file"
        ) from None
    except _CorruptError:
        raise ArtifactError(
            f"{name} is corrupt: the SHA-256 of {url} is not the manifest's",
            remedy="restore the file from a copy",
        ) from None
    except Exception as error:  # of the network or any file system
        message = " ".join(str(error).split())[:300]
        raise StorageError(
            f"can't read {name} at {url} ({type(error).__name__}): {message}",
            remedy="check the URL, the credentials and the network",
        ) from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between threads and processes; the system lets go of it however they end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
