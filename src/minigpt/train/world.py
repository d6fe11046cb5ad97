"""What the ranks of a run tell each other besides tensors: votes, and small facts.

Over the CPU (gloo) whatever the device, so that a decision never waits for a stream. One process
has no process group: it is then alone with its vote.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

SUPERVISED_VARIABLE = "MINIGPT_SUPERVISED"

_POLL_SECONDS = 0.05


class World:
    """The ranks of this run. Every method but `is_first` is for all ranks at the same point."""

    def __init__(self) -> None:
        """Join the default process group, where there is one."""
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what a run leaves."""
        return self.rank == 0

    def vote(self, *values: int) -> tuple[int, ...]:
        """Return the largest of each value over the ranks."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tuple(tensor.tolist())

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return every rank's values (all of one length), by rank, in float64."""
        own = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return [own.tolist()]
        all_values = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(all_values, own)
        return [tensor.tolist() for tensor in all_values]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return what rank 0 makes; what it raises there is raised everywhere.

        The value is pickled between processes of one run, never read from a file.
        """
        if self.size == 1:
            return make()
        message: list[Any] = [None, None]
        if self.is_first:
            try:
                message[0] = make()
            except Exception as error:  # so that no rank waits for one that has gone
                message[1] = error
        dist.broadcast_object_list(message, src=0)
        if message[1] is not None:
            raise message[1]
        return message[0]


class Meeting:
    """Lets threads of all ranks agree while their main threads may be in a collective.

    It uses the process group's store and never a collective.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._store = dist.distributed_c10d._get_default_store() if world.size > 1 else None

    def call(self, signum: int) -> None:
        """Ask all ranks to come; the first signal stands."""
        if self._store is not None and not self.called():
            self._store.set("minigpt/stop", str(signum))

    def called(self) -> int:
        """Return the signal that some rank asked with, 0 where none has."""
        if self._store is None:
            return 0
        with suppress(RuntimeError):  # the rank that keeps the store has gone
            if self._store.check(["minigpt/stop"]):
                return int(self._store.get("minigpt/stop"))
        return 0

    def exchange(self, name: str, value: int, seconds: float) -> list[int] | None:
        """Return every rank's value under a name; None where one has not come in time."""
        if self._store is None:
            return [value]
        keys = [f"minigpt/{name}/{rank}" for rank in range(self._world.size)]
        with suppress(RuntimeError):
            self._store.set(keys[self._world.rank], str(value))
            deadline = time.monotonic() + seconds
            while not self._store.check(keys):
                if time.monotonic() > deadline:
                    return None
                time.sleep(_POLL_SECONDS)
            return [int(self._store.get(key)) for key in keys]
        return None


def is_rank() -> bool:
    """Tell whether a launcher has made this process one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first_rank() -> bool:
    """Tell whether this process, by its launcher's word, is rank 0; one alone is."""
    return int(os.environ.get("RANK", "0")) == 0


def is_supervised() -> bool:
    """Tell whether a supervisor started this process; it then holds the run's lock for it."""
    return SUPERVISED_VARIABLE in os.environ


def collective_timeout() -> timedelta:
    """Return how long a rank waits for the others: long, because the watchdog is quicker."""
    return timedelta(hours=2)
