"""Bytes of unknown encoding to text, never failing and always saying how."""

from __future__ import annotations

import codecs
import re
from typing import Literal, NamedTuple

# Well-formed sequences of two to four bytes, roughly: enough to tell UTF-8 from the rest.
_MULTIBYTE = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)

How = Literal["utf-8", "utf-16", "declared", "replaced", "windows-1252", "binary"]

_WIDE_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with UTF-16's mark, so it must come first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# PEP 263: in one of the first two lines, which must be comments.
_DECLARATION = re.compile(
    rb"\A(?:[ \t\f]*(?:#[^\r\n]*)?(?:\r\n|\r|\n))?[ \t\f]*#[^\r\n]*?coding[:=][ \t]*([-\w.]+)"
)


class Decoded(NamedTuple):
    """Text, and how it was won from the bytes."""

    text: str
    how: How


def wide_encoding(head: bytes) -> str | None:
    """Return "utf-16" or "utf-32" where a byte order mark says so."""
    return next((name for mark, name in _WIDE_MARKS if head.startswith(mark)), None)


def declared_encoding(head: bytes) -> str | None:
    """Return the encoding that a Python source file declares (PEP 263), if Python knows it."""
    match = _DECLARATION.match(head.removeprefix(codecs.BOM_UTF8))
    if not match:
        return None
    name = match[1].decode("ascii", "replace")
    try:
        return codecs.lookup(name).name
    except LookupError:
        return None


def decode(data: bytes, *, declared: str | None = None) -> Decoded:
    """Turn bytes into text.

    UTF-8 first; then the declared encoding. Of what is left, bytes with NULs are binary; text
    that is mostly UTF-8 keeps it, with U+FFFD for what is broken; anything else is read as
    Windows-1252, which superset of Latin-1 gives each byte a character.

    Args:
        data: The bytes, with or without a byte order mark.
        declared: An encoding that the file names itself.

    Returns:
        The text without byte order mark ("" where binary), and how it was decoded.
    """
    if b"\0" in data:
        return Decoded("", "binary")
    try:
        return Decoded(data.decode("utf-8-sig"), "utf-8")
    except UnicodeDecodeError:
        pass
    if declared and declared != "utf-8":
        try:
            return Decoded(data.decode(declared), "declared")
        except (UnicodeDecodeError, LookupError):
            pass
    lenient = data.decode("utf-8-sig", "replace")
    broken = lenient.count("\ufffd")
    intact = sum(map(len, _MULTIBYTE.findall(data)))
    if intact > 4 * broken:
        return Decoded(lenient, "replaced")
    import ftfy.bad_codecs  # registers the encoding that leaves no byte undefined

    ftfy.bad_codecs.ok()
    return Decoded(data.decode("sloppy-windows-1252"), "windows-1252")


def encodable(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
