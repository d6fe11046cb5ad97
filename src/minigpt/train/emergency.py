"""Saving the last finished step while the main thread is somewhere in the next one.

Parameters change only inside the update, which holds a lock; at any other moment they are those
of the last finished step, and any thread may write them down.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from minigpt.core.errors import MinigptError
from minigpt.train.world import Meeting

DEFAULT_GRACE_SECONDS = 30.0
_PATIENCE_SHARE = 0.25
_SAVE_RESERVE = 2.0
_ROUNDS = 8
_POLL_SECONDS = 0.01


def patience_seconds(grace: float | None, save_seconds: float | None) -> float:
    """Return how long a run may look for an orderly stop before it saves where it stands.

    A quarter of the grace, or less where two saves would not fit into the rest.
    """
    grace = DEFAULT_GRACE_SECONDS if grace is None else grace
    return max(0.0, min(_PATIENCE_SHARE * grace, grace - _SAVE_RESERVE * (save_seconds or 0.0)))


class EmergencySave:
    """Ends the process with the last finished step saved, wherever its main thread is."""

    def __init__(
        self,
        lock: threading.Lock,
        meeting: Meeting,
        *,
        step: Callable[[], int],
        save: Callable[[int], None],
        seconds: float,
    ) -> None:
        """Prepare.

        Args:
            lock: Held by the main thread while parameters and position change.
            meeting: The ranks' threads.
            step: Returns the number of finished steps.
            save: Saves the run's state as it is and records the signal; the lock is held.
            seconds: Most time to wait for other ranks or for the lock.
        """
        self._lock = lock
        self._meeting = meeting
        self._step = step
        self._save = save
        self._seconds = seconds

    def __call__(self, signum: int) -> None:
        """Save and exit with the signal's code; 1 where it could not be saved."""
        code = 1
        with suppress(Exception):  # nobody is there to catch it, and the process must end
            if self._settle():
                code = 128 + signum
                self._write(signum)
        os._exit(code)

    def _settle(self) -> bool:
        """Take the lock at a step that all ranks have finished; the lock is kept.

        A rank that has finished one step less waits for its main thread: what that still needs
        from the others, they have sent, for they could not have gone on without it.
        """
        if not self._lock.acquire(timeout=self._seconds):
            return False
        for round_number in range(_ROUNDS):
            steps = self._meeting.exchange(f"step-{round_number}", self._step(), self._seconds)
            if steps is None or len(set(steps)) == 1:
                return True  # alone, because the others are gone or stuck: save what is here
            if self._step() < max(steps) and not self._catch_up(max(steps)):
                return False
        return False

    def _catch_up(self, step: int) -> bool:
        self._lock.release()
        deadline = time.monotonic() + self._seconds
        while self._step() < step and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return self._lock.acquire(timeout=self._seconds)

    def _write(self, signum: int) -> None:
        try:
            self._save(signum)
        except MinigptError as error:
            print(f"minigpt: {error}", file=sys.stderr, flush=True)
            os._exit(error.exit_code)
        finally:
            # The rank that writes is the last to leave: the others must not take it along.
            self._meeting.exchange("saved", 1, self._seconds)
