"""A job's output, as it stands or as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from minigpt.cluster.attempt import log_path
from minigpt.cluster.records import ENDED, Attempt
from minigpt.cluster.store import JobStore
from minigpt.core.errors import JobError

_POLL_SECONDS = 0.3


def read_logs(
    store: JobStore, job: int, *, number: int | None = None, rank: int | None = None, follow: bool
) -> Iterator[str]:
    """Yield lines of an attempt's output, those of several workers marked by rank.

    Args:
        store: The queue.
        job: The job.
        number: The attempt; None is the last one and, when following, those after it.
        rank: One worker only; None is all.
        follow: Go on until the job, or the given attempt, has ended.

    Raises:
        JobError: No such job, attempt or rank, or nothing has run yet.
    """
    offsets: dict[Path, int] = {}
    shown = number
    while True:
        state = store.get(job).state
        attempts = store.attempts(job)
        if not attempts and not follow:
            raise JobError(f"job {job} is {state} and has not run yet", remedy="use --follow")
        if attempts:
            shown = shown or attempts[-1].number
            for attempt in attempts:
                if attempt.number == number or (number is None and attempt.number >= shown):
                    yield from _new_lines(attempt, rank, offsets)
            if number is not None and number > attempts[-1].number:
                raise JobError(
                    f"job {job} has no attempt {number}", remedy=f"it has {len(attempts)}"
                )
        over = state in ENDED or (number is not None and attempts[number - 1].ended_at is not None)
        if over or not follow:
            return
        time.sleep(_POLL_SECONDS)


def _new_lines(attempt: Attempt, rank: int | None, offsets: dict[Path, int]) -> Iterator[str]:
    workers = len(attempt.placement)
    if rank is not None and not 0 <= rank < workers:
        raise JobError(f"job {attempt.job} has no rank {rank}", remedy=f"it has 0 to {workers - 1}")
    for each in range(workers) if rank is None else [rank]:
        path = log_path(attempt.directory, each)
        try:
            with path.open("rb") as file:
                file.seek(offsets.get(path, 0))
                content = file.read()
        except FileNotFoundError:
            continue
        # A line that is still being written waits for its end, unless the attempt is over.
        whole = content if attempt.ended_at else content[: content.rfind(b"\n") + 1]
        offsets[path] = offsets.get(path, 0) + len(whole)
        prefix = f"[{each}] " if workers > 1 and rank is None else ""
        for line in whole.decode(errors="replace").splitlines():
            yield prefix + line
