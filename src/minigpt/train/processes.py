"""Ranks of one world on this machine, for proofs and measurements: real processes over gloo.

A training run's processes come from torchrun; these are started, used and ended by one caller.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from minigpt.core.errors import TrainingError
from minigpt.train.config import MeshConfig
from minigpt.train.mesh import Mesh


class Ranks:
    """Processes in one process group, which run the same function again and again.

    Example:
        with Ranks(4) as ranks:
            results = ranks.run(module_level_function, argument)
    """

    def __init__(self, size: int, *, threads: int = 1, timeout: float = 300) -> None:
        """Start the processes and let them join one group.

        Args:
            size: World size.
            threads: Of torch, in each.
            timeout: Seconds that a call, or a collective within it, may take.
        """
        self._timeout = timeout
        self._store = tempfile.TemporaryDirectory(prefix="minigpt-ranks-")
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            store = Path(self._store.name) / "store"
            arguments = (theirs, store, rank, size, threads, timeout)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a module-level function on every rank at once and return what each returned.

        Raises:
            TrainingError: A rank raised, died or took too long; the processes are ended.
        """
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        while len(results) < len(self._pipes):
            open_pipes = [p for rank, p in enumerate(self._pipes) if rank not in results]
            ready = wait(open_pipes, timeout=self._timeout)
            if not ready:
                self.close()
                raise TrainingError(f"no answer of the ranks within {self._timeout:.0f} s")
            for answered in ready:
                rank = self._pipes.index(answered)  # type: ignore[arg-type]
                results[rank] = self._receive(rank)
        return [results[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._store.cleanup()

    def _receive(self, rank: int) -> Any:
        try:
            failed, result = self._pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            failed, result = True, "died"
        if failed:
            self.close()  # the others may wait in a collective for this one
            raise TrainingError(f"rank {rank}: {result}")
        return result


@cache
def mesh_of(config: MeshConfig) -> Mesh:
    """Return this rank's mesh, laid out once: its groups cost sockets and threads for good."""
    return Mesh(config)


def _serve(
    pipe: Connection, store: Path, rank: int, size: int, threads: int, timeout: float
) -> None:
    torch.set_num_threads(threads)
    if size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:  # the caller is gone
            return
        try:
            pipe.send((False, function(*arguments)))
        except Exception:
            pipe.send((True, traceback.format_exc()))
