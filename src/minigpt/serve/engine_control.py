"""What an operator asks of a running engine, carried on between its steps."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from minigpt.api.requests import Ready
from minigpt.core.errors import MinigptError, RequestError
from minigpt.core.telemetry import get_logger
from minigpt.serve.wire import Control, ControlDone, LoadAdapter, SwapWeights


class ControlledEngine(Protocol):
    """What can be changed about a running engine; `minigpt.engine.engine.Engine` is one."""

    def swap(self, path: str | Path) -> Future[Ready]:
        """See `Engine.swap`."""
        ...

    def load_adapter(self, name: str, path: str | Path) -> Ready:
        """See `Engine.load_adapter`."""
        ...

    def unload_adapter(self, name: str) -> Ready:
        """See `Engine.unload_adapter`."""
        ...


class Controls:
    """Begins what is asked and reports what has ended.

    Args:
        engine: Stepped by the same thread.
    """

    def __init__(self, engine: ControlledEngine) -> None:
        self._engine = engine
        self._done: list[ControlDone] = []
        self._swaps: list[tuple[str, Future[Ready]]] = []

    def begin(self, message: Control) -> None:
        """Do what can be done at once; `finished` says how it went."""
        try:
            if isinstance(message, SwapWeights):
                self._swaps.append((message.id, self._engine.swap(message.path)))
                return
            if isinstance(message, LoadAdapter):
                ready = self._engine.load_adapter(message.name, message.path)
            else:
                ready = self._engine.unload_adapter(message.name)
        except Exception as error:
            self._done.append(_failure(message.id, error))
        else:
            self._done.append(ControlDone(id=message.id, ready=ready))

    def finished(self) -> list[ControlDone]:
        """Return how what has ended since the last call went."""
        done, self._done = self._done, []
        for name, swap in self._swaps:
            if swap.done():
                error = swap.exception()
                done.append(
                    ControlDone(id=name, ready=swap.result())
                    if error is None
                    else _failure(name, error)
                )
        self._swaps = [(name, swap) for name, swap in self._swaps if not swap.done()]
        return done


def load_adapters(engine: ControlledEngine, adapters: dict[str, str]) -> None:
    """Bring back what a lost engine process had; what can't be is logged and missing."""
    for name, path in adapters.items():
        try:
            engine.load_adapter(name, path)
        except MinigptError as error:
            get_logger("engine").error("adapter lost", adapter=name, reason=str(error))


def _failure(name: str, error: BaseException) -> ControlDone:
    if isinstance(error, RequestError):
        return ControlDone(id=name, error=str(error), status=error.status, code=error.code)
    if isinstance(error, MinigptError):
        return ControlDone(id=name, error=str(error), status=400, code="refused")
    get_logger("engine").error("control failed", exc_info=error)
    return ControlDone(id=name, error=f"{type(error).__name__}: {error}", status=500)
