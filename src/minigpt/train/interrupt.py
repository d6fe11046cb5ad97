"""SIGINT and SIGTERM as a wish to stop, which the loop grants where nothing gets lost."""

from __future__ import annotations

import math
import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from minigpt.core.errors import MinigptError
from minigpt.train.world import Meeting

_POLL_SECONDS = 0.2


class TrainingInterruptedError(MinigptError):
    """The run stopped because a signal asked it to; its state is saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message, remedy="run the same command to resume")
        self.exit_code = 128 + signum


class StopRequest:
    """Context in which the first SIGINT or SIGTERM is noted; a second SIGINT aborts at once.

    Python runs signal handlers between two of its instructions only, which may be minutes away
    while the main thread is in a kernel or a collective. A thread of its own therefore learns of
    the signal at once, from the system's wake-up descriptor, and takes over where the main thread
    has not come to an orderly stop in time. Outside the main thread, where Python allows no
    handlers, only other ranks' wish to stop is noted.
    """

    def __init__(
        self,
        patience: Callable[[], float] = lambda: math.inf,
        overdue: Callable[[int], None] = lambda signum: None,
        meeting: Meeting | None = None,
    ) -> None:
        """Prepare; nothing is installed yet.

        Args:
            patience: Seconds that the main thread has for an orderly stop.
            overdue: Called on the thread after that, with the signal; need not return.
            meeting: Where ranks tell each other of a signal that only one of them got.
        """
        self.signum: int | None = None
        self._patience = patience
        self._overdue = overdue
        self._meeting = meeting
        self._previous: dict[int, Any] = {}
        self._previous_descriptor = -1
        self._pipe: tuple[int, int] | None = None
        self._granted = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
            self._previous_descriptor = signal.set_wakeup_fd(
                self._pipe[1], warn_on_full_buffer=False
            )
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.grant()
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_descriptor)
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)
        assert self._thread is not None
        self._thread.join()
        if self._pipe is not None:
            os.close(self._pipe[0])
            os.close(self._pipe[1])

    @property
    def requested(self) -> bool:
        """Whether a signal has asked to stop."""
        return self.signum is not None

    def grant(self) -> None:
        """Say that the main thread has begun to stop in good order."""
        self._granted.set()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum

    def _watch(self) -> None:
        signum = 0
        while not signum:
            signum = self._arrived() or (self._meeting.called() if self._meeting else 0)
            if self._granted.is_set():
                return
        self.signum = self.signum or signum
        if self._meeting is not None:
            self._meeting.call(signum)
        patience = self._patience()
        if not self._granted.wait(None if patience == math.inf else patience):
            self._overdue(signum)

    def _arrived(self) -> int:
        """Wait a moment for a signal's number from the system."""
        if self._pipe is None:
            self._granted.wait(_POLL_SECONDS)
            return 0
        if not select.select([self._pipe[0]], [], [], _POLL_SECONDS)[0]:
            return 0
        known = [n for n in os.read(self._pipe[0], 64) if n in (signal.SIGINT, signal.SIGTERM)]
        return known[0] if known else 0
