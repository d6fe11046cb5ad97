"""Raw documents, one at a time, from wherever the config says; never a whole corpus in memory."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import IO

from minigpt.core.storage import storage_errors
from minigpt.data.config import SourceConfig
from minigpt.data.documents import RawDocument, cut_stream, cut_text
from minigpt.data.encoding import declared_encoding, decode, encodable, wide_encoding
from minigpt.data.files import SourceFile, find_files
from minigpt.data.records import read_huggingface, read_jsonl, read_parquet

_BLOCK = 1 << 20
_CODE_NAME = re.compile(
    r".*\.(?:bash|c|cc|cpp|cs|css|cu|cuh|cxx|go|h|hh|hpp|html|ini|ipynb|java|js|json|jsx|jl|kt|lua"
    r"|m|mjs|php|pl|proto|ps1|py|pyi|pyx|r|rb|rs|scala|sh|sql|swift|toml|ts|tsx|xml|yaml|yml|zig)",
    re.IGNORECASE | re.DOTALL,
)


def read_documents(
    config: SourceConfig, *, max_document_bytes: int, files: Sequence[SourceFile] | None = None
) -> Iterator[RawDocument]:
    """Stream a source's documents in a fixed order.

    Args:
        config: What to read.
        max_document_bytes: Longer texts are cut at line ends into documents of at most this size.
        files: Those of the source's files (`find_files`) that are to be read; by default all.

    Raises:
        DataError: Nothing is found, or a file is malformed (named with its line) or lacks the
            text field.
        StorageError: A file can't be read.
    """
    if config.kind in ("text", "pystdlib"):
        for file in find_files(config) if files is None else files:
            with storage_errors(f"read {file.path}"):
                yield from _read_text(file, config.separator, max_document_bytes)
        return
    for document in _read_records(config, files):
        if len(document.text) * 4 <= max_document_bytes:  # no character takes more than 4 bytes
            yield document
            continue
        pieces = cut_text(encodable(document.text).encode(), max_document_bytes)
        for number, piece in enumerate(pieces):
            yield replace(document, name=_piece_name(document.name, number), text=piece.decode())


def total_bytes(config: SourceConfig) -> int | None:
    """Return how many bytes of text a source holds, or None where only reading would tell."""
    if config.kind not in ("text", "pystdlib"):
        return None
    return sum(file.size for file in find_files(config))


def _read_records(
    config: SourceConfig, files: Sequence[SourceFile] | None
) -> Iterator[RawDocument]:
    if config.kind == "huggingface":
        yield from read_huggingface(config)
        return
    read = read_jsonl if config.kind == "jsonl" else read_parquet
    for file in find_files(config) if files is None else files:
        with storage_errors(f"read {file.path}"):
            yield from read(file, config.text_field)


def _read_text(file: SourceFile, separator: str | None, limit: int) -> Iterator[RawDocument]:
    path = file.path
    code = _CODE_NAME.fullmatch(path) is not None
    with file.filesystem.open(path, "rb") as raw:
        head = raw.read(_BLOCK)
        blocks: Iterable[bytes] = _blocks(raw, head)
        wide = wide_encoding(head)
        if wide:
            blocks = _transcode(blocks, wide)
        declared = declared_encoding(head) if path.endswith((".py", ".pyi")) else None
        pieces = cut_stream(blocks, separator.encode() if separator else None, limit)
        for number, piece in enumerate(pieces):
            text, how = decode(piece, declared=declared)
            name = _piece_name(path, number)
            yield RawDocument(name, text, "utf-16" if wide and how == "utf-8" else how, code)


def _blocks(raw: IO[bytes], head: bytes) -> Iterator[bytes]:
    while head:
        yield head
        head = raw.read(_BLOCK)


def _transcode(blocks: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    """Turn UTF-16 or UTF-32 into UTF-8, so that cutting need know only one encoding."""
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    for block in blocks:
        yield decoder.decode(block).encode("utf-8", "replace")
    yield decoder.decode(b"", final=True).encode("utf-8", "replace")


def _piece_name(name: str, number: int) -> str:
    return f"{name}#{number}" if number else name
