"""The processes of a run, for what they must decide together: all succeed or all fail alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from minigpt.core.errors import MinigptError

T = TypeVar("T")


class Ranks:
    """This process among the others of a group, or alone.

    Every rank must make the same calls in the same order; where a rank is gone, the others get a
    RuntimeError at once, or after the group's timeout.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Take the ranks of `group`; None is this process alone."""
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of_the_world(cls, *, timeout: timedelta) -> Ranks:
        """Take all ranks, in a new gloo group; alone where there is no process group.

        A group of its own lets messages pass in a background thread while the main thread is in
        the middle of other collectives.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(dist.new_group(backend="gloo", timeout=timeout))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def is_first_on_host(self) -> bool:
        """Whether this is the first process of its machine, by torchrun's LOCAL_RANK."""
        return self.group is None or int(os.environ.get("LOCAL_RANK", self.rank)) == 0

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

    def on_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0; return its result, or raise its error, on all."""
        found = self.together(lambda: action() if self.is_first else None)
        return self.gather(found)[0]  # type: ignore[return-value]
