"""Repairs and filters documents one at a time, counting each decision."""

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
class CleanDocument:
    """A document that passed; `digest` identifies its normalised text."""

    text: str
    digest: bytes


class Cleaner:
    """Repairs encodings, then drops what is too short, repetitive or seen before.

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
        report = self._report
        report.count("read")
        if document.how == "binary":
            report.count("dropped_binary", document.name)
            return None
        if document.how != "utf-8":
            report.count(f"decoded_{document.how}", document.name)
        text = self._repair(document)
        if reason := self._fault(text):
            report.count(reason)
            return None
        digest = text_digest(text)
        if digest in self._seen:
            report.count("dropped_exact_duplicate")
            return None
        self._seen.add(digest)
        return CleanDocument(text, digest)

    def _repair(self, document: RawDocument) -> str:
        text = encodable(document.text)
        if text is not document.text:
            self._report.count("repaired_surrogates", document.name)
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if self._config.fix_mojibake and not document.code and not text.isascii():
            fixed = fix_mojibake(text)
            if fixed != text:
                self._report.count("repaired_mojibake", document.name)
            text = fixed
        return text.removeprefix("\ufeff")

    def _fault(self, text: str) -> str | None:
        config = self._config
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
