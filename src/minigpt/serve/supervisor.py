"""Keeps one engine process alive: starts it, watches it, starts another when it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import msgspec
import zmq
import zmq.asyncio

from minigpt.api.requests import Ready
from minigpt.core.errors import MinigptError, RequestError
from minigpt.core.telemetry import get_logger
from minigpt.engine.threads import PROCESS_ENVIRONMENT
from minigpt.serve.config import ServeConfig
from minigpt.serve.engine_client import EngineClient
from minigpt.serve.health import ProgressMonitor
from minigpt.serve.metrics import ServeMetrics
from minigpt.serve.wire import (
    EngineSpec,
    StartFailure,
    Stop,
    ToEngine,
    decode_from_engine,
    encode_to_engine,
    unbounded,
)

State = Literal["starting", "ready", "restarting", "stopped"]
Status = State | Literal["stalled"]

_STABLE_SECONDS = 60.0
_STOP_SECONDS = 3.0
_STALL_POLL_SECONDS = 0.25
_MAX_SOCKET_PATH = 100


class EngineError(MinigptError):
    """The engine process can't be started."""

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EngineProcess:
    """One engine process with its two sockets; never reused."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        context: zmq.Context[zmq.Socket[bytes]],
        requests: zmq.Socket[bytes],
        outputs: zmq.asyncio.Socket,
        directory: Path,
    ) -> None:
        self._process = process
        self._directory = directory
        self._context = context
        self._requests = requests
        self.outputs = outputs

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @classmethod
    @contextlib.asynccontextmanager
    async def launch(
        cls, config: ServeConfig, model_path: str, adapters: dict[str, str]
    ) -> AsyncIterator[EngineProcess]:
        """Start a process that loads the model; when the block ends, so has the process.

        The sockets lie in a private directory, which is removed as soon as both are connected.
        """
        directory = Path(_private_directory())
        context = zmq.Context()
        requests = context.socket(zmq.PUSH)
        outputs = zmq.asyncio.Socket(context, zmq.PULL)
        addresses = [f"ipc://{directory / name}" for name in ("requests", "outputs")]
        for socket, address in ((requests, addresses[0]), (outputs, addresses[1])):
            unbounded(socket, linger_ms=0)
            socket.bind(address)
        spec = EngineSpec(
            model_path=model_path,
            config=config.engine.model_dump_json(),
            requests_address=addresses[0],
            outputs_address=addresses[1],
            parent_pid=os.getpid(),
            log_level=config.log_level,
            adapters=adapters,
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "minigpt.serve.engine_process",
            msgspec.json.encode(spec).decode(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr,
            env=PROCESS_ENVIRONMENT | os.environ,
        )
        engine = cls(process, context, requests, outputs, directory)
        try:
            yield engine
        finally:
            await engine._end()
            requests.close()
            outputs.close()
            context.term()
            engine.hide_sockets()

    def hide_sockets(self) -> None:
        """Remove the sockets' paths: connections stay, and even kill -9 leaves no file behind."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def send(self, message: ToEngine) -> None:
        """Queue a message; one to a dead engine is dropped, the supervisor deals with that."""
        with contextlib.suppress(zmq.Again):
            self._requests.send(encode_to_engine(message), flags=zmq.NOBLOCK)

    async def wait(self) -> int:
        """Wait for the process to end and return its exit code; -N is signal N."""
        return await self._process.wait()

    def kill(self) -> None:
        """End the process at once, even a stopped one."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def _end(self) -> None:
        if self._process.returncode is None:
            self.send(Stop())
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
            except TimeoutError:
                self.kill()
        await self._process.wait()


class Supervisor:
    """Runs engine processes one after another and connects the client to them.

    Args:
        config: Timeouts, backoff, and the engine's own configuration.
        model_path: What the engine loads.
        client: Gets each engine process.
        monitor: Says when the engine process is stalled.
        metrics: Counts restarts.
    """

    def __init__(
        self,
        config: ServeConfig,
        model_path: str,
        client: EngineClient,
        monitor: ProgressMonitor,
        metrics: ServeMetrics,
    ) -> None:
        self._config = config
        self.model_path = model_path
        """What the next engine process loads."""
        self.adapters: dict[str, str] = {}
        """Paths of the adapters that it loads too, by name."""
        self._client = client
        self._monitor = monitor
        self._metrics = metrics
        self._log = get_logger("supervisor")
        self._start_seconds = 0.0
        self.state: State = "starting"
        self.first_ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        """What the first engine process said once it had loaded the model."""

    def status(self) -> Status:
        """Return the state, by progress: an engine that lives but does not move is stalled."""
        if self.state == "ready" and self._monitor.overdue_seconds() > 0:
            return "stalled"
        return self.state

    def retry_after_seconds(self) -> int:
        """Estimate when a refused request should come again: a start takes what it last took."""
        return 1 if self.state == "ready" else max(1, math.ceil(self._start_seconds))

    async def run(self) -> None:
        """Keep an engine process alive until cancelled.

        Raises:
            EngineError: The first engine process could not start. Later ones are tried for
                ever, with growing waits.
        """
        failures = 0
        try:
            while True:
                began = time.monotonic()
                await self._run_one()
                stable = time.monotonic() - began > _STABLE_SECONDS
                failures = 0 if stable else failures + 1
                delay = min(
                    self._config.restart_backoff_seconds * 2 ** max(failures - 1, 0),
                    self._config.restart_backoff_max_seconds,
                )
                self._metrics.engine_restarts.inc()
                self._log.warning("restarting the engine", delay_seconds=delay)
                await asyncio.sleep(delay)
        finally:
            self.state = "stopped"

    async def _run_one(self) -> None:
        """Run one engine process to its end."""
        async with EngineProcess.launch(self._config, self.model_path, self.adapters) as engine:
            try:
                await self._start(engine)
                reason = await self._watch(engine)
            except EngineError as error:
                if not self.first_ready.done():
                    raise
                reason = str(error)
            finally:
                if self.state == "ready":
                    self.state = "restarting"
                self._client.disconnect(
                    RequestError(
                        "the engine process died; it is being restarted",
                        status=503,
                        code="engine_died",
                        remedy="send the request again",
                    )
                )
        self._log.error("engine lost", reason=reason)

    async def _start(self, engine: EngineProcess) -> None:
        began = time.monotonic()
        receiving = asyncio.ensure_future(engine.outputs.recv())
        dying = asyncio.ensure_future(engine.wait())
        try:
            await asyncio.wait(
                (receiving, dying),
                timeout=self._config.start_timeout_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            # Its last words may arrive just after the news of its death.
            await asyncio.wait((receiving,), timeout=0.1 if dying.done() else 0)
            if not receiving.done():
                raise EngineError(self._no_start(dying.result() if dying.done() else None))
            messages = decode_from_engine(receiving.result())
        finally:
            receiving.cancel()
            dying.cancel()
        engine.hide_sockets()
        first = messages[0]
        if isinstance(first, StartFailure):
            raise EngineError(first.message, exit_code=first.exit_code)
        assert isinstance(first, Ready), first
        self._start_seconds = time.monotonic() - began
        self._client.connect(engine.send, first)
        self._client.deliver(messages[1:])
        self.state = "ready"
        self._log.info("engine ready", pid=engine.pid, load_seconds=round(first.load_seconds, 3))
        if not self.first_ready.done():
            self.first_ready.set_result(first)

    def _no_start(self, exit_code: int | None) -> str:
        if exit_code is None:
            return f"the engine was not ready within {self._config.start_timeout_seconds:g} s"
        return f"the engine process ended while loading: {_describe_exit(exit_code)}"

    async def _watch(self, engine: EngineProcess) -> str:
        """Pass on what the engine sends until it is dead or must be killed; return why."""
        receiving = asyncio.ensure_future(self._receive(engine))
        dying = asyncio.ensure_future(engine.wait())
        stalling = asyncio.ensure_future(self._wait_for_stall())
        tasks = (receiving, dying, stalling)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                receiving.result()
            if dying.done():
                await self._receive_rest(engine)
                return _describe_exit(dying.result())
            engine.kill()
            return f"no step ended within {stalling.result():.1f} s: killed"
        finally:
            for task in tasks:
                task.cancel()

    async def _receive(self, engine: EngineProcess) -> None:
        while True:
            self._client.deliver(decode_from_engine(await engine.outputs.recv()))

    async def _receive_rest(self, engine: EngineProcess) -> None:
        """Pass on what the dead engine had still sent."""
        while await engine.outputs.poll(0):
            self._client.deliver(decode_from_engine(await engine.outputs.recv()))

    async def _wait_for_stall(self) -> float:
        while (overdue := self._monitor.overdue_seconds()) < self._config.stall_kill_seconds:
            await asyncio.sleep(_STALL_POLL_SECONDS)
        return overdue + self._monitor.allowed_seconds()


def _private_directory() -> str:
    """Make a directory that only this user can enter, with a path short enough for a socket."""
    directory = tempfile.mkdtemp(prefix="minigpt-")
    if len(directory) > _MAX_SOCKET_PATH - len("/requests"):
        shutil.rmtree(directory)
        directory = tempfile.mkdtemp(prefix="minigpt-", dir="/tmp")
    return directory


def _describe_exit(exit_code: int) -> str:
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"
