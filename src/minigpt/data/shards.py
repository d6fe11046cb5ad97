"""Tokens on disk: memory-mapped shards of fixed size, and where each document begins.

For each split, `<split>-00000.tokens`, ... hold the concatenated documents as raw little-endian
uint16 (vocabularies up to 65,536) or uint32, each shard but the last exactly `shard_tokens`
long, so that a stream position's shard is a division away. `<split>.offsets` holds
`num_documents + 1` little-endian int64 positions. `index.json` describes both. A stored
document is the end-of-text token followed by its text's tokens; or, where the content is not
text, a conversation as its template renders it, and `<split>.targets` holds a byte for each
token: 1 where a model is to learn to say it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from minigpt.core.artifact import read_manifest, read_versioned
from minigpt.core.config import Config
from minigpt.core.errors import ArtifactError
from minigpt.core.manifest import Manifest
from minigpt.core.storage import is_remote, write_atomic
from minigpt.data.config import Content
from minigpt.data.remote import RemoteShards, is_remote_copy, open_remote

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
INDEX_FILE = "index.json"
FORMAT_VERSION = 1


class SplitIndex(Config):
    """The size of one split."""

    documents: int
    tokens: int
    """End-of-text tokens included."""
    bytes: int
    """Bytes of text in UTF-8."""


class DatasetIndex(Config):
    """The layout of a dataset's token files."""

    format_version: int = FORMAT_VERSION
    dtype: Literal["<u2", "<u4"]
    """Numpy's name for the stored integers."""
    shard_tokens: int
    vocab_size: int
    eos_token_id: int
    content: Content = "text"
    splits: dict[Split, SplitIndex]


def token_dtype(vocab_size: int) -> Literal["<u2", "<u4"]:
    """Return the narrowest stored type that holds every id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


class ShardWriter:
    """Appends documents to one split's files; holds one document in memory at a time.

    Example:
        with ShardWriter(directory, "train", dtype="<u2", shard_tokens=1 << 25) as writer:
            writer.append(tokens, num_bytes=len(text))
    """

    def __init__(self, directory: Path, split: Split, *, dtype: str, shard_tokens: int) -> None:
        """Open the offsets file; shards are opened as they fill."""
        self._directory = directory
        self._split = split
        self._dtype = np.dtype(dtype)
        self._shard_tokens = shard_tokens
        self._shard: BinaryIO | None = None
        self._documents = 0
        self._tokens = 0
        self._bytes = 0
        self._offsets = (directory / f"{split}.offsets").open("wb")
        self._offsets.write(np.int64(0).astype("<i8").tobytes())

    def append(self, tokens: Sequence[int] | npt.NDArray[np.integer], *, num_bytes: int) -> None:
        """Store one document.

        Args:
            tokens: Its ids, the leading end-of-text token included.
            num_bytes: Length of its text in UTF-8.
        """
        remaining = np.asarray(tokens, self._dtype)
        self._documents += 1
        self._bytes += num_bytes
        while len(remaining):
            room = self._shard_tokens - self._tokens % self._shard_tokens
            self._open_shard().write(remaining[:room].tobytes())
            self._tokens += len(remaining[:room])
            remaining = remaining[room:]
        self._offsets.write(np.int64(self._tokens).astype("<i8").tobytes())

    def close(self) -> SplitIndex:
        """Flush everything and return the split's size."""
        self._offsets.close()
        if self._shard is not None:
            self._shard.close()
        return SplitIndex(documents=self._documents, tokens=self._tokens, bytes=self._bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open_shard(self) -> BinaryIO:
        number, used = divmod(self._tokens, self._shard_tokens)
        if self._shard is None or used == 0:
            if self._shard is not None:
                self._shard.close()
            self._shard = (self._directory / _shard_name(self._split, number)).open("wb")
        return self._shard


def write_index(directory: Path, index: DatasetIndex) -> None:
    """Write `index.json`, which makes the token files readable as a dataset."""
    text = json.dumps(index.model_dump(mode="json"), indent=1, sort_keys=True)
    write_atomic(directory / INDEX_FILE, text.encode())


class Shards(Protocol):
    """The token files of one split."""

    def __getitem__(self, number: int) -> npt.NDArray[np.integer]:
        """Map shard `number`; fetches it first where it is not here."""
        ...

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Begin to fetch shards that will be needed soon; returns at once, never fails."""
        ...


class _LocalShards(list[npt.NDArray[np.integer]]):
    def prefetch(self, numbers: Iterable[int]) -> None:
        pass


class TokenDataset:
    """One split of a dataset artifact, memory-mapped and read-only.

    Nothing is read until it is asked for; finding a document takes O(1). Safe to share between
    threads and, where it is local, forked processes. Open a local artifact with `open_artifact`
    first where its bytes must be verified.
    """

    def __init__(self, directory: Path, split: Split, index: DatasetIndex) -> None:
        """Map the files; use `open` instead."""
        self.directory = directory
        self.split = split
        self.index = index
        size = index.splits[split]
        self.num_documents: int = size.documents
        self.num_tokens: int = size.tokens
        self.num_bytes: int = size.bytes
        self._offsets = _map(directory / f"{split}.offsets", "<i8", size.documents + 1)
        step = index.shard_tokens
        names = [_shard_name(split, number) for number in range(-(-size.tokens // step))]
        self._shards: Shards
        if is_remote_copy(directory):
            self._shards = RemoteShards(directory, names, index.dtype)
        else:
            self._shards = _LocalShards(
                _map(directory / name, index.dtype, min(step, size.tokens - number * step))
                for number, name in enumerate(names)
            )
        self._targets: npt.NDArray[np.integer] | None = None
        if index.content != "text":
            self._targets = _map(directory / targets_name(split), "u1", size.tokens)

    @classmethod
    def open(cls, artifact_dir: str | Path, split: Split) -> TokenDataset:
        """Open one split of a dataset.

        Args:
            artifact_dir: The dataset artifact's local directory, or any fsspec URL of one.
            split: `train` or `val`; a split without documents opens as empty.

        Raises:
            ArtifactError: No dataset there, from a newer version, or a file of the wrong size.
            StorageError: The URL can't be read.
        """
        remote = is_remote(artifact_dir)
        directory = open_remote(str(artifact_dir)).path if remote else Path(artifact_dir)
        index = read_index(directory)
        if split not in index.splits:
            raise ArtifactError(f"dataset {directory} has no split {split!r}, only train and val")
        return cls(directory, split, index)

    @property
    def content(self) -> Content:
        """What a document is."""
        return self.index.content

    @property
    def is_remote(self) -> bool:
        """Whether its shards are fetched from a URL."""
        return isinstance(self._shards, RemoteShards)

    @property
    def tokenizer_dir(self) -> Path:
        """The directory of the tokenizer that made these tokens."""
        return self.directory / "tokenizer"

    @cached_property
    def manifest(self) -> Manifest:
        """The dataset artifact's manifest."""
        return read_manifest(self.directory)

    @property
    def fingerprint(self) -> str:
        """A hash of the dataset's files: equal for a dataset that was prepared again alike."""
        return files_fingerprint(self.manifest)

    @property
    def tokenizer_fingerprint(self) -> str:
        """A hash of the tokenizer's files."""
        return files_fingerprint(self.manifest, prefix="tokenizer/")

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Stream position of each document's first token, (num_documents + 1,)."""
        return self._offsets

    def document(self, i: int) -> npt.NDArray[np.integer]:
        """Return document `i`'s tokens, the leading end-of-text token included."""
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        return self.tokens(int(self._offsets[i]), int(self._offsets[i + 1]))

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.integer]:
        """Return tokens [start, stop) of the stream: a view, or a copy across shards."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of {self.num_tokens}")
        if start == stop:
            return np.empty(0, self.index.dtype)
        step = self.index.shard_tokens
        first, last = start // step, (stop - 1) // step
        if first == last:
            return self._shards[first][start - first * step : stop - first * step]
        parts = [
            self._shards[n][max(start - n * step, 0) : min(stop - n * step, step)]
            for n in range(first, last + 1)
        ]
        return np.concatenate(parts)

    def prefetch(self, positions: npt.ArrayLike) -> None:
        """Say which stream positions will be read soon."""
        inside = np.minimum(np.asarray(positions), self.num_tokens - 1)
        self._shards.prefetch(np.unique(inside // self.index.shard_tokens).tolist())

    def target_mask(self, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """Tell which tokens in [start, stop) are to be predicted; None where all are."""
        return None if self._targets is None else self._targets[start:stop].astype(np.bool_)

    def document_of(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the document that holds each stream position, any shape."""
        found = np.searchsorted(self._offsets, np.asarray(positions), side="right") - 1
        return np.asarray(found, np.int64)


def files_fingerprint(manifest: Manifest, *, prefix: str = "") -> str:
    """Hash the names and contents of an artifact's files, or of those that begin with `prefix`."""
    files = {
        name: entry.sha256 for name, entry in manifest.files.items() if name.startswith(prefix)
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def read_index(directory: Path) -> DatasetIndex:
    """Read a dataset's `index.json`.

    Raises:
        ArtifactError: It is missing, malformed or from a newer version.
    """
    missing = ArtifactError(
        f"no dataset at {directory}: {INDEX_FILE} is missing",
        remedy="make one with `minigpt data prepare`",
    )
    source = directory / INDEX_FILE
    return read_versioned(source, DatasetIndex, newest=FORMAT_VERSION, missing=missing)


def targets_name(split: Split) -> str:
    """Return the name of the file that marks a split's targets."""
    return f"{split}.targets"


def _shard_name(split: Split, number: int) -> str:
    return f"{split}-{number:05d}.tokens"


def _map(path: Path, dtype: str, length: int) -> npt.NDArray[np.int64]:
    expected = length * np.dtype(dtype).itemsize
    try:
        size = path.stat().st_size
    except OSError:
        raise ArtifactError(f"{path} is missing", remedy="restore the dataset") from None
    if size != expected:
        raise ArtifactError(
            f"{path} is truncated or changed: {size} bytes, {INDEX_FILE} says {expected}",
            remedy="restore the dataset from a copy or prepare it anew",
        )
    return np.memmap(path, dtype, mode="r", shape=(length,))
