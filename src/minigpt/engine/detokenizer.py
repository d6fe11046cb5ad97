"""From tokens to text while they come: no half characters, no part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable


class TextStream:
    """The text of one sequence, released as soon as it is certain.

    Bytes of an unfinished UTF-8 character are held back until the rest arrives; text that may
    be the beginning of a stop string is held back until it is one or can't be one any more.
    What is released, joined, does not depend on how the bytes were cut into pieces.
    """

    def __init__(self, stop: Iterable[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop string was met; nothing is released after it."""

    def push(self, data: bytes, *, final: bool = False, stops: bool = True) -> str:
        """Take in `data` and return the text that is now certain.

        Args:
            data: The bytes of the next tokens.
            final: Nothing follows: release all; an unfinished character becomes U+FFFD.
            stops: Whether this may be part of a stop string; never false after true.
        """
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(data, final)
        if not self._stop or not stops:
            return text
        if (cut := self._find_stop(text)) is not None:
            self.stopped = True
            self._held = ""
            return text[:cut]
        keep = 0 if final else self._undecided(text)
        released = len(text) - keep
        self._held = text[released:]
        return text[:released]

    def _find_stop(self, text: str) -> int | None:
        """Return where the stop string begins that is complete first (of those, the longest)."""
        matches = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        return min(matches)[1] if matches else None

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins some stop string."""
        longest = max(len(s) for s in self._stop) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stop):
                return length
        return 0
