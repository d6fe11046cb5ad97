"""The API process from start to end: bind, start the engine, answer, drain, exit.

This process never imports torch; what is heavy is imported while the engine process loads.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import prometheus_client
import uvicorn
import uvloop

from minigpt.api.requests import Ready
from minigpt.core.clock import SystemClock
from minigpt.core.errors import ConfigError, ModelError, RequestError
from minigpt.core.telemetry import configure_logging, get_logger
from minigpt.serve.collector import spare_what_is_loaded
from minigpt.serve.config import ServeConfig
from minigpt.serve.engine_client import EngineClient
from minigpt.serve.health import ProgressMonitor
from minigpt.serve.metrics import ServeMetrics
from minigpt.serve.supervisor import Supervisor

if TYPE_CHECKING:
    from minigpt.serve.service import Service

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_CLOSE_SECONDS = 5
"""After the drain, how long a client may take to read what is left for it."""


@dataclass(frozen=True)
class Endpoint:
    """A server that is ready, for whoever waits for it."""

    url: str
    """Where it listens, without a path."""
    model: str
    context_length: int
    kv_capacity_tokens: int
    """Tokens that the KV cache holds."""
    tensor_parallel_size: int
    """Processes that compute the model together."""
    load_seconds: float
    """What the engine needed to load the model."""
    start_seconds: float
    """From the call of `serve` to ready."""


def serve(
    config: ServeConfig,
    model_path: str | Path,
    served_model_name: str | None = None,
    *,
    on_ready: Callable[[Endpoint], None] | None = None,
) -> None:
    """Serve a model until SIGTERM or SIGINT, then drain.

    Args:
        config: Address, limits, timeouts, engine.
        model_path: A model artifact or a Hugging Face directory.
        served_model_name: What clients call the model; default: the directory's name.
        on_ready: Called once, when requests are answered.

    Raises:
        ConfigError: The address can't be bound, or the engine's configuration can't be met.
        ModelError: No model there.
        DataError: No usable tokenizer there.
        EngineError: The engine process can't start.
    """
    began = time.monotonic()
    configure_logging(json=config.log_format == "json", level=config.log_level)
    path = Path(model_path)
    if not path.is_dir():
        raise ModelError(f"no model directory at {path}", remedy="check the path")
    name = served_model_name or path.resolve().name
    # Creation times would double the number of series.
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    with bind(config.host, config.port) as listener:
        server = _ApiServer(config, path, name, listener, began, on_ready)
        uvloop.run(server.run())


@contextlib.contextmanager
def bind(host: str, port: int) -> Iterator[socket.socket]:
    """Listen on an address, so that a port in use is known before anything is started.

    Raises:
        ConfigError: No such host, the port is in use, or may not be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(
            f"host = {host!r}: {error.strerror}", remedy="give an address of this machine"
        ) from None
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(2048)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {port} on {host} is in use",
                    remedy="stop what listens there or choose another port with --port",
                ) from None
            raise ConfigError(f"can't listen on {host} port {port}: {error.strerror}") from None
        yield listener


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handling: draining is ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _ApiServer:
    """Everything that lives in the API process."""

    def __init__(
        self,
        config: ServeConfig,
        path: Path,
        name: str,
        listener: socket.socket,
        began: float,
        on_ready: Callable[[Endpoint], None] | None,
    ) -> None:
        self._config = config
        self._path = path
        self._name = name
        self._listener = listener
        self._began = began
        self._on_ready = on_ready
        self._log = get_logger("serve")
        self._monitor = ProgressMonitor(
            SystemClock(),
            factor=config.stall_factor,
            floor_seconds=config.stall_floor_seconds,
            first_step_seconds=config.first_step_seconds,
        )
        self._metrics = ServeMetrics(name)
        self._client = EngineClient(self._metrics, self._monitor, SystemClock())

    async def run(self) -> None:
        """Serve until a signal; raise what keeps the engine from starting."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, stop.set)
        supervisor = Supervisor(
            self._config, str(self._path), self._client, self._monitor, self._metrics
        )
        supervising = asyncio.create_task(supervisor.run())
        try:
            # The engine process is on its way before this one imports what it needs.
            await asyncio.sleep(0)
            service = self._build_service()
            async with self._http(service, supervisor):
                await self._until_stopped(stop, supervising, supervisor)
                if stop.is_set():
                    await self._drain(service, stop)
        finally:
            supervising.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await supervising
            if self._client.replay_log is not None:
                self._client.replay_log.close()
        self._log.info("stopped")

    def _build_service(self) -> Service:
        from minigpt.data.chat_template import ChatTemplate
        from minigpt.data.tokenizer import Tokenizer
        from minigpt.serve.service import Service

        tokenizer = Tokenizer.load(self._path)
        if (path := self._config.replay_log) is not None:
            from minigpt.serve.replay_log import ReplayLog

            self._client.replay_log = ReplayLog(
                path,
                self._config.replay_log_bytes,
                model=self._name,
                tokenizer=tokenizer.fingerprint,
                seed=self._config.engine.seed,
            )
        return Service(self._name, tokenizer, ChatTemplate(tokenizer), self._client)

    @contextlib.asynccontextmanager
    async def _http(self, service: Service, supervisor: Supervisor) -> AsyncIterator[None]:
        """Answer HTTP while the block runs; at its end let running responses finish."""
        from minigpt.serve.admin import Admin
        from minigpt.serve.app import create_app

        _forward_logs()
        admin = Admin(self._client, supervisor, self._name)
        server = _Uvicorn(
            uvicorn.Config(
                create_app(self._config, service, supervisor, self._metrics, admin),
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=self._config.keep_alive_seconds,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
            )
        )
        spare_what_is_loaded()
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await serving

    async def _until_stopped(
        self, stop: asyncio.Event, supervising: asyncio.Task[None], supervisor: Supervisor
    ) -> None:
        """Announce readiness, then wait for a signal; raise the engine's failure to start."""
        stopping = asyncio.ensure_future(stop.wait())
        ready = supervisor.first_ready
        try:
            await asyncio.wait((supervising, ready, stopping), return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                self._announce(ready.result())
                await asyncio.wait((supervising, stopping), return_when=asyncio.FIRST_COMPLETED)
            if supervising.done():
                supervising.result()
        finally:
            stopping.cancel()

    def _announce(self, ready: Ready) -> None:
        host, port = self._listener.getsockname()[:2]
        endpoint = Endpoint(
            url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}",
            model=self._name,
            context_length=ready.context_length,
            kv_capacity_tokens=ready.kv_blocks_total * ready.block_size,
            tensor_parallel_size=self._config.engine.tensor_parallel_size,
            load_seconds=ready.load_seconds,
            start_seconds=time.monotonic() - self._began,
        )
        self._log.info("ready", url=endpoint.url, start_seconds=round(endpoint.start_seconds, 3))
        if self._on_ready is not None:
            self._on_ready(endpoint)

    async def _drain(self, service: Service, stop: asyncio.Event) -> None:
        """Refuse what is new, let what runs go on within the grace, then end it with an error.

        A second signal ends the grace.
        """
        service.draining = True
        self._log.info("draining", in_flight=self._client.in_flight)
        stop.clear()
        deadline = time.monotonic() + self._config.grace_seconds
        while self._client.in_flight and time.monotonic() < deadline and not stop.is_set():
            await asyncio.sleep(0.05)
        self._client.fail_all(
            RequestError("the server is shutting down", status=503, code="shutting_down")
        )


class _ForwardHandler(logging.Handler):
    """Hands a library's log records to the structured log."""

    def emit(self, record: logging.LogRecord) -> None:
        log = get_logger(record.name)
        log.log(record.levelno, record.getMessage(), exc_info=record.exc_info or None)


def _forward_logs() -> None:
    """Send uvicorn's warnings where all other log lines go."""
    logger = logging.getLogger("uvicorn")
    logger.handlers = [_ForwardHandler()]
    logger.setLevel(logging.WARNING)
    logger.propagate = False
