"""Cleaned documents on disk between the passes over them."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

_HEADER = struct.Struct("<QI?")  # sort key of the split, bytes of text, forced to validation
_BUFFER = 1 << 20


class SpooledDocument(NamedTuple):
    """A cleaned document."""

    text: bytes
    """UTF-8."""
    key: int
    """64 bits of the text's hash with the seed: decides split and sampling."""
    forced_val: bool
    """Whether it came from the validation source."""


class Spool:
    """An append-only file of documents that is read several times in order.

    The file has no name, so that the system frees it however this process ends.
    """

    def __init__(self, directory: Path) -> None:
        """Open an unnamed file in `directory`, which needs room for the cleaned corpus."""
        self._file = tempfile.TemporaryFile(dir=directory, buffering=_BUFFER)  # noqa: SIM115
        self.documents = 0
        self.bytes = 0
        self.forced_val_documents = 0
        self.lowest_key = 1 << 64
        self.highest_key = -1

    def append(self, document: SpooledDocument) -> None:
        """Write one document at the end."""
        header = _HEADER.pack(document.key, len(document.text), document.forced_val)
        self._file.write(header)
        self._file.write(document.text)
        self.documents += 1
        self.bytes += len(document.text)
        self.forced_val_documents += document.forced_val
        self.lowest_key = min(self.lowest_key, document.key)
        self.highest_key = max(self.highest_key, document.key)

    def __iter__(self) -> Iterator[SpooledDocument]:
        """Read from the start; one reader at a time, and no appending meanwhile."""
        self._file.seek(0)
        while header := self._file.read(_HEADER.size):
            key, length, forced = _HEADER.unpack(header)
            yield SpooledDocument(self._file.read(length), key, forced)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
