"""Rank 0's side of a tensor parallel engine: the processes of the other ranks, and what runs them.

The engine's process is rank 0: it schedules, computes its part of the model and samples. Each other
rank is a process that it starts, tells what to compute (`parallel_wire`) and meets in the sums
of every layer (`parallel_group`). None outlives it, and it does not go on without one of them.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from minigpt.core.errors import MinigptError, ModelError
from minigpt.engine.config import EngineConfig
from minigpt.engine.parallel_group import RankGroup, device_of
from minigpt.engine.parallel_wire import (
    Begin,
    DropWeights,
    Leave,
    LoadWeights,
    RankSpec,
    Refused,
    ToRank,
    decode_from_rank,
    encode,
)
from minigpt.engine.threads import PROCESS_ENVIRONMENT
from minigpt.model.config import ModelConfig
from minigpt.model.sharding import Shard

_LEAVE_SECONDS = 5.0
_DEATH_SECONDS = 0.5
"""How long after an exchange has failed to look for a rank that has ended."""


class RankError(MinigptError):
    """A process of a tensor parallel engine is gone or silent, and the engine is lost with it."""

    exit_code = 1


class Ranks:
    """The processes of ranks 1 and up; `start` makes them.

    Their standard input is a pipe on which nothing is written: its end, however this process ends,
    is theirs too.
    """

    def __init__(self, config: EngineConfig, model: ModelConfig) -> None:
        self.config = config
        self.model = model
        """The whole model's architecture."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._sending = threading.Lock()
        self._numbers = itertools.count(1)
        self._lost: str | None = None

    @classmethod
    def start(cls, config: EngineConfig, model: ModelConfig, path: Path) -> Ranks:
        """Start the processes; each begins to load its part of a model.

        Args:
            config: With its numerics settled.
            model: The architecture of what is at `path`; `check_ranks` accepts it.
            path: A local directory.
        """
        ranks = cls(config, model)
        try:
            for rank in range(1, config.tensor_parallel_size):
                ranks._start(rank, path)
        except BaseException:
            ranks.close()
            raise
        return ranks

    def wait_loaded(self) -> None:
        """Wait until each rank has loaded what it was last told to.

        Raises:
            ModelError: One can't; the message names it.
            RankError: One has ended.
        """
        refused: list[str] = []
        for rank, pipe in enumerate(self._pipes, start=1):
            try:
                answer = decode_from_rank(pipe.recv_bytes())
            except (EOFError, OSError):
                raise self.lose(f"rank {rank} ended while loading") from None
            if isinstance(answer, Refused):
                refused.append(f"rank {rank}: {answer.message}")
        if refused:
            raise ModelError(refused[0])

    def begin(self, num_blocks: int) -> RankGroup:
        """Have all ranks make their KV caches and meet; returns rank 0's side of the group."""
        size, timeout = (
            self.config.tensor_parallel_size,
            self.config.tensor_parallel_timeout_seconds,
        )
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        self.send(Begin(port=port, num_blocks=num_blocks))
        device = device_of(self.config, rank=0)
        try:
            return RankGroup(Shard(0, size), device, port, timeout, listener=listener)
        except RuntimeError as error:
            raise self.lose(f"the ranks did not meet: {error}") from None

    def load(self, path: Path) -> int:
        """Have all ranks load a model beside those that serve; errors as `wait_loaded`.

        Returns:
            What the model is called from now on; the one that they began with is 0.
        """
        number = next(self._numbers)
        self.send(LoadWeights(model=number, path=str(path)))
        try:
            self.wait_loaded()
        except ModelError:
            self.send(DropWeights(model=number))
            raise
        return number

    def send(self, message: ToRank) -> None:
        """Tell all ranks something; any thread may, and all ranks hear it in the same order.

        Raises:
            RankError: A rank is gone, or does not take in what it is told.
        """
        data = encode(message)
        with self._sending:
            self.check()
            for rank, pipe in enumerate(self._pipes, start=1):
                try:
                    pipe.send_bytes(data)
                except OSError as error:
                    raise self.lose(f"rank {rank} takes nothing in: {error}") from None

    @property
    def lost(self) -> bool:
        """Whether a rank has ended: nothing can be computed any more."""
        return self._lost is not None or any(p.poll() is not None for p in self._processes)

    def check(self) -> None:
        """Raise RankError if a rank has ended."""
        if self.lost:
            raise self.lose("a rank ended")

    def lose(self, reason: str) -> RankError:
        """End what is left of the ranks and return what to raise; the first reason is kept."""
        if self._lost is None:
            deadline = time.monotonic() + _DEATH_SECONDS
            while not self.lost and time.monotonic() < deadline:
                time.sleep(0.01)
            ends = (
                f"rank {rank} {_describe_exit(process.returncode)}"
                for rank, process in enumerate(self._processes, start=1)
                if process.poll() is not None
            )
            self._lost = "; ".join(ends) or reason
            self._kill()
        return RankError(f"the tensor parallel engine is lost: {self._lost}")

    def close(self) -> None:
        """End the processes. Idempotent."""
        if self._lost is None:
            self._lost = "the engine was closed"
            for pipe in self._pipes:
                try:
                    pipe.send_bytes(encode(Leave()))
                except OSError:
                    continue
            for process in self._processes:
                try:
                    process.wait(_LEAVE_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        for pipe in self._pipes:
            pipe.close()

    def _start(self, rank: int, path: Path) -> None:
        ours, theirs = socket.socketpair()
        timeout = struct.pack("ll", int(self.config.tensor_parallel_timeout_seconds) + 1, 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        with theirs:
            spec = RankSpec(
                rank=rank,
                model_path=str(path),
                config=self.config.model_dump_json(),
                socket=theirs.fileno(),
                parent_pid=os.getpid(),
                dies_with_thread=threading.current_thread() is threading.main_thread(),
            )
            command = [sys.executable, "-m", "minigpt.engine.parallel_worker"]
            self._pipes.append(Connection(ours.detach()))
            self._processes.append(
                subprocess.Popen(
                    [*command, msgspec.json.encode(spec).decode()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(spec.socket,),
                    env=PROCESS_ENVIRONMENT | os.environ,
                )
            )


def _describe_exit(exit_code: int) -> str:
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"
