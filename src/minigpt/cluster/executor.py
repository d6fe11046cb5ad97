"""What a scheduler needs of the place where jobs run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from minigpt.cluster.attempt import AttemptResult
from minigpt.cluster.config import JobConfig
from minigpt.cluster.records import Attempt
from minigpt.cluster.timeline import Node
from minigpt.core.job_status import JobStatus


@dataclass(frozen=True)
class Observation:
    """How an attempt stands."""

    state: Literal["alive", "ended", "lost", "never began"]
    """alive: it runs, or is about to; lost: it ran and is gone without a result; never began: it
    did not run and, from this observation on, can't."""
    result: AttemptResult | None = None
    """Where it has ended."""
    status: JobStatus | None = None
    """The job's own word, where it gave one."""


class Executor(Protocol):
    """Runs attempts. Every method may be called again after the scheduler was killed and restarted.

    `start` and `stop` return at once. An attempt runs at most once, however many schedulers call
    `start` for it. Observing an attempt that was "lost" or "never began" leaves no process of it.
    """

    @property
    def isolation(self) -> str:
        """Say how jobs are kept apart, in a line."""
        ...

    def nodes(self) -> Sequence[Node]:
        """Return the nodes that are up."""
        ...

    def start(self, attempt: Attempt, config: JobConfig) -> None:
        """Begin an attempt on the nodes of its placement."""
        ...

    def observe(self, attempt: Attempt) -> Observation:
        """Look at an attempt, of this scheduler or an earlier one."""
        ...

    def stop(self, attempt: Attempt) -> None:
        """Ask an attempt to end: SIGTERM, its grace period, SIGKILL. May be asked repeatedly."""
        ...

    def kill(self, attempt: Attempt) -> None:
        """End an attempt that did not end with its grace period."""
        ...

    def close(self) -> None:
        """Let go of connections; jobs run on."""
        ...
