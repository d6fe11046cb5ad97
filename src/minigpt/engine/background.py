"""An engine in a thread of its own: any thread hands requests over and gets deltas back."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from minigpt.api.requests import Delta, Request
from minigpt.core.errors import MinigptError, RequestError
from minigpt.engine.engine import Engine

_CLOSED_POLL_SECONDS = 0.5

Sink = Callable[[Delta | MinigptError], None]
"""Takes what comes for one request, in the engine's thread; an error is the last that comes."""


Action = Callable[[Engine], None]
"""Something to do with the engine between two steps, in its thread; must not raise."""

T = TypeVar("T")


class EngineThread:
    """Steps an engine while it has work and sleeps otherwise.

    What several callers hand over shares batches. The thread ends with `close`, or with the
    program.

    Args:
        engine: Owned by the thread from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[tuple[Request, Sink] | Action | str | None] = (
            queue.SimpleQueue()
        )
        self._sinks: dict[str, tuple[Sink, int]] = {}
        """Where each request's deltas go, and how many of its sequences are unfinished."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Hand a request over.

        Raises:
            RequestError: Closed, or the engine's thread has failed.
        """
        if self._closed:
            raise RequestError("the engine is closed", status=503)
        self._inbox.put((request, sink))
        if self._closed:  # it ended meanwhile: nobody else may take this in
            self._fail_all(RequestError("the engine is closed", status=503))

    def abort(self, request_id: str) -> None:
        """Drop a request; its sink is not called any more. Unknown ids are ignored."""
        self._inbox.put(request_id)

    def call(self, work: Callable[[Engine], T]) -> T:
        """Do something with the engine between two steps, and return or raise what it does.

        Raises:
            RequestError: Closed, or the engine's thread has failed.
        """
        done: Future[T] = Future()

        def act(engine: Engine) -> None:
            try:
                done.set_result(work(engine))
            except Exception as error:
                done.set_exception(error)

        if self._closed:
            raise RequestError("the engine is closed", status=503)
        self._inbox.put(act)
        while not done.done() and not self._closed:
            wait([done], timeout=_CLOSED_POLL_SECONDS)
        if not done.done():
            raise RequestError("the engine is closed", status=503)
        return done.result()

    def close(self) -> None:
        """End the thread; what is unfinished gets an error. Idempotent."""
        self._closed = True
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        reason = "the engine was closed"
        try:
            while self._take_in():
                for delta in self._engine.step():
                    self._deliver(delta)
        except Exception as error:
            reason = f"the engine failed: {type(error).__name__}: {error}"
            raise
        finally:
            self._closed = True
            self._fail_all(RequestError(reason, status=503))

    def _take_in(self) -> bool:
        """Take in what has arrived, waiting if there is nothing to do; False to end."""
        while not (self._engine.has_work and self._inbox.empty()):
            message = self._inbox.get()
            if message is None:
                return False
            if isinstance(message, str):
                self._sinks.pop(message, None)
                self._engine.abort(message)
                continue
            if callable(message):
                message(self._engine)
                continue
            request, sink = message
            try:
                self._engine.add(request)
            except MinigptError as error:
                sink(error)
            else:
                self._sinks[request.id] = (sink, request.n)
        return True

    def _deliver(self, delta: Delta) -> None:
        if delta.request_id not in self._sinks:  # aborted
            return
        sink, unfinished = self._sinks[delta.request_id]
        if delta.finish_reason is not None:
            unfinished -= 1
            self._sinks[delta.request_id] = (sink, unfinished)
            if not unfinished:
                del self._sinks[delta.request_id]
        sink(delta)

    def _fail_all(self, error: RequestError) -> None:
        """Tell all that nothing more comes, also those who were never taken in."""
        while self._sinks:
            self._sinks.popitem()[1][0](error)
        with contextlib.suppress(queue.Empty):
            while True:
                message = self._inbox.get_nowait()
                if isinstance(message, tuple):
                    message[1](error)
