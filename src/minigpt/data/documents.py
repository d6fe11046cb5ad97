"""A document as it was read, and how long texts are cut into several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from minigpt.data.encoding import How


@dataclass(frozen=True)
class RawDocument:
    """A text before cleaning."""

    name: str
    """Where it came from: a path, with a number where a file holds several."""
    text: str
    """"" where the bytes are not text."""
    how: How = "utf-8"
    """How the bytes were decoded."""
    code: bool = False
    """Whether the name says that it is source code."""


def cut_stream(blocks: Iterable[bytes], separator: bytes | None, limit: int) -> Iterator[bytes]:
    """Cut a stream of UTF-8 into documents, holding about one at a time.

    Args:
        blocks: The bytes, some at a time.
        separator: What parts documents; it belongs to none. None is one document a stream.
        limit: Longer documents are cut as by `cut_text`.
    """
    buffer = b""
    for block in blocks:
        buffer += block
        if separator:
            *whole, buffer = buffer.split(separator)
            for document in whole:
                yield from cut_text(document, limit)
        # What stays behind is longer than the limit by less than a separator's length, so that
        # a separator across two blocks is still found.
        *pieces, buffer = cut_text(buffer, limit, slack=len(separator or b""))
        yield from pieces
    if buffer:
        yield from cut_text(buffer, limit)


def cut_text(text: bytes, limit: int, *, slack: int = 0) -> Iterator[bytes]:
    """Cut UTF-8 text into pieces of at most `limit` bytes, the last of `limit + slack`.

    Cuts fall after line ends, or between characters where a line is longer than the limit.
    """
    start = 0
    while len(text) - start > limit + slack:
        end = text.rfind(b"\n", start, start + limit) + 1
        if not end:
            end = start + limit
            while end > start + limit - 3 and text[end] & 0xC0 == 0x80:
                end -= 1
        yield text[start:end]
        start = end
    yield text[start:]
