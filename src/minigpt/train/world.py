"""The ranks of a run, for what they tell each other besides tensors: votes, facts, failures.

Over the CPU (gloo) whatever the device, so that a decision never waits for a stream. One process
has no process group: it is then alone with its vote.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from minigpt.core.errors import MinigptError

SUPERVISED_VARIABLE = "MINIGPT_SUPERVISED"

T = TypeVar("T")

_POLL_SECONDS = 0.05


class World:
    """This process among all ranks of a run, or alone.

    Every method is for all ranks at the same point; where a rank is gone, the others get a
    RuntimeError at once, or after the group's timeout. What ranks send each other is pickled
    between processes of one run, never read from a file.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Take the ranks of `group`; None is this process alone."""
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def joined(cls) -> World:
        """Take all ranks, in the default process group; alone where there is none."""
        return cls(dist.group.WORLD if _has_others() else None)

    @classmethod
    def apart(cls, *, timeout: timedelta) -> World:
        """Take all ranks, in a new gloo group; alone where there is no process group.

        A group of its own lets messages pass in a background thread while the main thread is in
        the middle of other collectives.
        """
        return cls(dist.new_group(backend="gloo", timeout=timeout) if _has_others() else None)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what a run leaves."""
        return self.rank == 0

    @property
    def is_first_on_host(self) -> bool:
        """Whether this is the first process of its machine, by torchrun's LOCAL_RANK."""
        return self.group is None or int(os.environ.get("LOCAL_RANK", self.rank)) == 0

    def vote(self, *values: int) -> tuple[int, ...]:
        """Return the largest of each value over the ranks."""
        if self.group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tuple(tensor.tolist())

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of the ranks."""
        if self.group is None:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; return this rank's result, or raise the first error on all.

        Only a `MinigptError` is shared; anything else is a bug and ends this process.
        """
        result: T | None = None
        error: MinigptError | None = None
        try:
            result = action()
        except MinigptError as raised:
            error = raised
        for failed in self.gather(error):
            if failed is not None:
                raise failed
        return result  # type: ignore[return-value]

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what rank 0 makes; what it raises there is raised everywhere."""
        if self.group is None:
            return make()
        message: list[Any] = [None, None]
        if self.is_first:
            try:
                message[0] = make()
            except Exception as error:  # so that no rank waits for one that has gone
                message[1] = error
        dist.broadcast_object_list(message, group=self.group, group_src=0)
        if message[1] is not None:
            raise message[1]
        return message[0]  # type: ignore[no-any-return]


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


def _has_others() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
