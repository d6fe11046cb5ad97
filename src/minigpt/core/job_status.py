"""What a running job tells the queue above it: how much work it would lose if evicted now.

The queue names a file in MINIGPT_JOB_STATUS; the job replaces it whenever its answer changes. A
job that says nothing is taken to lose everything since its start.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from minigpt.core.storage import write_atomic

STATUS_VARIABLE = "MINIGPT_JOB_STATUS"


@dataclass(frozen=True)
class JobStatus:
    """A job's own word; times in seconds since the epoch."""

    saved_at: float
    """Up to when its work is on disk."""
    safe_at: float | None = None
    """When the next save will be done; None where it does not know."""

    def unsaved_seconds(self, now: float) -> float:
        """Return the work that an eviction at `now` would lose."""
        return max(0.0, now - self.saved_at)

    def safe_in(self, now: float) -> float | None:
        """Return the seconds until an eviction loses next to nothing, None if unknown."""
        if self.safe_at is None or self.safe_at < now - 60:  # an old promise, not kept
            return None
        return max(0.0, self.safe_at - now)


def report_saved(*, safe_to_evict_in: float | None = None) -> None:
    """Say that everything up to now is saved, and in how many seconds it will be again.

    Does nothing where no queue started this process.

    Raises:
        StorageError: The file can't be written.
    """
    path = os.environ.get(STATUS_VARIABLE)
    if not path:
        return
    now = time.time()
    safe_at = None if safe_to_evict_in is None else now + safe_to_evict_in
    write_atomic(Path(path), json.dumps(asdict(JobStatus(now, safe_at))).encode())


def read_status(path: Path) -> JobStatus | None:
    """Return a job's word, None where it has said nothing that can be read."""
    try:
        content = json.loads(path.read_bytes())
        safe_at = content.get("safe_at")
        return JobStatus(float(content["saved_at"]), None if safe_at is None else float(safe_at))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
