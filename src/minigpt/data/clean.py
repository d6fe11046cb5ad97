"""Repairs and filters documents one at a time, counting each decision.

`screen` looks at one document alone, so that any number of processes may do it; `Cleaner` sees
them all in the order of the source, which decides what is a duplicate of what.
"""

from __future__ import annotations

import hashlib
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from minigpt.data.config import CleanConfig
from minigpt.data.documents import RawDocument
from minigpt.data.encoding import encodable

_EXAMPLES = 20


@dataclass
class CleaningReport:
    """What happened to the documents of a source; becomes metrics of the manifest."""

    counts: Counter[str] = field(default_factory=Counter)
    """`read`, `kept`, `dropped_*`, and of those read `decoded_*` (from other than UTF-8) and
    `repaired_*` (the text was changed)."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Names of the first documents whose bytes or characters were not sound, by what was done."""

    def count(self, what: str, name: str | None = None) -> None:
        """Count one document, and remember its `name` where people will want to know it."""
        self.counts[what] += 1
        if name is None:
            return
        names = self.examples.setdefault(what, [])
        if len(names) < _EXAMPLES:
            names.append(name)

    def metrics(self) -> dict[str, Any]:
        """Render for the manifest."""
        return {"counts": dict(sorted(self.counts.items())), "examples": self.examples}


@dataclass(frozen=True)
class Screened:
    """A document repaired and judged by itself, before others are known."""

    text: str
    """Repaired; "" where it is dropped."""
    digest: bytes
    """Of its normalised text; empty where it is dropped."""
    notes: tuple[tuple[str, str | None], ...]
    """What to count, and under whose name."""
    characters: int
    """Length of the document as it was read."""
    signature: bytes | None = None
    """Its MinHash (`NearDuplicates.sign`), where it was computed already."""


@dataclass(frozen=True)
class CleanDocument:
    """A document that passed; `digest` identifies its normalised text."""

    text: str
    digest: bytes


class Cleaner:
    """Drops what was seen before, and counts what happened to every document.

    Memory grows by one 16-byte digest (about 100 bytes with the set's overhead) a document.
    """

    def __init__(self, config: CleanConfig, report: CleaningReport) -> None:
        """Start with nothing seen.

        Args:
            config: What to repair and drop.
            report: Receives the counts.
        """
        self._config = config
        self._report = report
        self._seen: set[bytes] = set()

    def clean(self, document: RawDocument) -> CleanDocument | None:
        """Return the repaired document, or None where it is dropped."""
        return self.admit(screen(self._config, document))

    def admit(self, screened: Screened) -> CleanDocument | None:
        """Count a document that was screened; return it, or None where it is dropped."""
        self._report.count("read")
        for what, name in screened.notes:
            self._report.count(what, name)
        if not screened.digest:
            return None
        if screened.digest in self._seen:
            self._report.count("dropped_exact_duplicate")
            return None
        self._seen.add(screened.digest)
        return CleanDocument(screened.text, screened.digest)


def screen(config: CleanConfig, document: RawDocument) -> Screened:
    """Repair a document's encoding, and drop it where it is too short or repetitive."""
    notes: list[tuple[str, str | None]] = []
    characters = len(document.text)
    if document.how == "binary":
        return Screened("", b"", (("dropped_binary", document.name),), characters)
    if document.how != "utf-8":
        notes.append((f"decoded_{document.how}", document.name))
    text = _repair(config, document, notes)
    if reason := _fault(config, text):
        notes.append((reason, None))
        return Screened("", b"", tuple(notes), characters)
    return Screened(text, text_digest(text), tuple(notes), characters)


def _repair(config: CleanConfig, document: RawDocument, notes: list[tuple[str, str | None]]) -> str:
    text = encodable(document.text)
    if text is not document.text:
        notes.append(("repaired_surrogates", document.name))
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if config.fix_mojibake and not document.code and not text.isascii():
        fixed = fix_mojibake(text)
        if fixed != text:
            notes.append(("repaired_mojibake", document.name))
        text = fixed
    return text.removeprefix("\ufeff")


def _fault(config: CleanConfig, text: str) -> str | None:
    if "\0" in text:
        return "dropped_binary"
    if len(text.strip()) < config.min_characters:
        return "dropped_short"
    if duplicate_line_share(text) > config.max_duplicate_lines:
        return "dropped_repeated_lines"
    raw = text.encode()
    if len(raw) > config.max_compression * len(zlib.compress(raw, 1)):
        return "dropped_repetitive"
    return None


def fix_mojibake(text: str) -> str:
    """Undo text decoded with the wrong encoding, and nothing else.

    Of ftfy's fixes only those of encodings run: straightening quotes, splitting ligatures or
    narrowing characters would change what an author wrote. Source code should not come here:
    a mojibake literal in a program is usually meant, and one changed byte can break it.
    """
    import ftfy

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )
    fixed: str = ftfy.fix_text(text, config)
    return fixed


def duplicate_line_share(text: str) -> float:
    """Return the share of a text's characters in lines that appeared before in it.

    After the repetition filters of Gopher (Rae et al., 2021, appendix A1).
    """
    seen: set[str] = set()
    total = repeated = 0
    for line in text.splitlines():
        stripped = line.strip()
        total += len(stripped)
        if stripped in seen:
            repeated += len(stripped)
        else:
            seen.add(stripped)
    return repeated / total if total else 1.0


def text_digest(text: str) -> bytes:
    """Return the 128-bit identity of a text: Unicode forms and white space do not count."""
    normalised = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.blake2b(normalised.encode(), digest_size=16).digest()
