"""Trying again what may fail for a moment: exponential backoff with jitter."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Retry:
    """How often and how patiently to try.

    Before attempt n + 1 it waits a random time between half and the whole of
    `min(most_seconds, first_seconds * 2**(n - 1))`, so that many clients that failed together do
    not come back together.
    """

    attempts: int = 6
    first_seconds: float = 0.25
    most_seconds: float = 20.0
    sleep: Callable[[float], None] = time.sleep
    """What waits; tests put a clock of their own here."""
    jitter: random.Random = field(default_factory=random.Random)

    def run(self, action: Callable[[], T], *, permanent: tuple[type[Exception], ...] = ()) -> T:
        """Return what `action` returns, trying again where it raises an error.

        Args:
            action: What to do; must be safe to repeat.
            permanent: Errors that trying again can't mend: raised at once.

        Raises:
            Exception: The last attempt's error.
        """
        for attempt in range(1, self.attempts):
            try:
                return action()
            except permanent:
                raise
            except Exception:
                wait = min(self.most_seconds, self.first_seconds * 2 ** (attempt - 1))
                self.sleep(wait * self.jitter.uniform(0.5, 1.0))
        return action()
