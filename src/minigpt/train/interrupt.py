"""SIGINT and SIGTERM as a wish to stop, which the loop grants where nothing gets lost."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from minigpt.core.errors import MinigptError


class TrainingInterruptedError(MinigptError):
    """The run stopped because a signal asked it to; its state is saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message, remedy="run the same command to resume")
        self.exit_code = 128 + signum


class StopRequest:
    """Context in which the first SIGINT or SIGTERM is noted; a second SIGINT aborts at once.

    Outside the main thread, where Python allows no handlers, it never asks to stop.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @property
    def requested(self) -> bool:
        """Whether a signal has asked to stop."""
        return self.signum is not None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum
