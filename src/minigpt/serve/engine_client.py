"""The API process's side of the engine: hands requests over, brings answers back.

Everything here runs on the event loop's thread and never blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Self

import msgspec

from minigpt.api.requests import Abort, Delta, EngineStats, FinishReason, Ready, Request
from minigpt.core.clock import Clock
from minigpt.core.errors import RequestError
from minigpt.serve.health import ProgressMonitor
from minigpt.serve.metrics import SequenceTimes, ServeMetrics
from minigpt.serve.replay_log import ReplayLog
from minigpt.serve.wire import Control, ControlDone, FromEngine, ToEngine

Update = tuple[int, Delta]
"""A choice's number among all choices of a generation, and what it gained."""


class Generation:
    """The answers to a list of requests, as an asynchronous iterator of updates.

    Request r's sequence i is choice r * n + i. Each item holds, for each choice that moved
    since the last item, one update: a slow reader gets fewer and longer ones. The iterator ends
    when every choice has finished, or early after `cancel`; it raises RequestError when the
    engine fails or dies.
    """

    def __init__(self, client: EngineClient, requests: Sequence[Request]) -> None:
        self._client = client
        self.requests = tuple(requests)
        self.num_choices = sum(request.n for request in requests)
        self.cancelled = False
        self._unfinished = self.num_choices
        self._pending: dict[int, Delta] = {}
        self._error: RequestError | None = None
        self.weights = ""
        """Digest of what computes it, known with the first update."""
        self._wake = asyncio.Event()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt_token_ids) for request in self.requests)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Update]:
        while not (self._pending or self._error or self.cancelled or not self._unfinished):
            self._wake.clear()
            await self._wake.wait()
        if self.cancelled:
            raise StopAsyncIteration
        if self._pending:
            updates = sorted(self._pending.items())
            self._pending.clear()
            return updates
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Drop what is unfinished, here and in the engine; the iterator ends. Idempotent."""
        if self._unfinished and not self._error and not self.cancelled:
            self._client.abort(self)
        self.cancelled = True
        self._wake.set()

    def deliver(self, choice: int, delta: Delta) -> None:
        """Take in what the engine sent. Called by the client alone."""
        if delta.finish_reason in ("error", "abort"):
            self._client.abort(self)
            reason = delta.error or "the engine dropped the request"
            self.fail(RequestError(reason, status=delta.error_status))
            return
        self.weights = delta.weights or self.weights
        before = self._pending.get(choice)
        self._pending[choice] = delta if before is None else _merge(before, delta)
        self._unfinished -= delta.finish_reason is not None
        self._wake.set()

    def fail(self, error: RequestError) -> None:
        """End the iterator with `error`, after what has already come."""
        self._error = error
        self._wake.set()


class _Route:
    """Where a request's deltas go, and when they came."""

    __slots__ = ("first_choice", "generation", "times", "unfinished")

    def __init__(self, generation: Generation, first_choice: int, n: int, now: float) -> None:
        self.generation = generation
        self.first_choice = first_choice
        self.times = [SequenceTimes(now) for _ in range(n)]
        self.unfinished = set(range(n))


class EngineClient:
    """Routes between generations and whichever engine process is alive.

    Args:
        metrics: Told of every request, delta and finish.
        monitor: Told when the engine has work and when it moves.
        clock: Times the deltas.
    """

    def __init__(self, metrics: ServeMetrics, monitor: ProgressMonitor, clock: Clock) -> None:
        self._metrics = metrics
        self._monitor = monitor
        self._clock = clock
        self._send: Callable[[ToEngine], None] | None = None
        self._routes: dict[str, _Route] = {}
        self._controls: dict[str, asyncio.Future[Ready]] = {}
        self.replay_log: ReplayLog | None = None
        """Told of every request, delta and failure, where answers are logged."""
        self.ready: Ready | None = None
        """What the engine said of itself; None while there is none."""

    @property
    def in_flight(self) -> int:
        """Requests handed over and not finished."""
        return len(self._routes)

    def connect(self, send: Callable[[ToEngine], None], ready: Ready) -> None:
        """Begin to use an engine process that has loaded its model."""
        assert not self._routes
        self._monitor.reset()
        self._metrics.engine_started(ready)
        self._send, self.ready = send, ready

    def disconnect(self, error: RequestError) -> None:
        """Give up the engine process: everything in flight ends with `error`."""
        self._send, self.ready = None, None
        self._metrics.engine_stopped()
        self.fail_all(error)
        for waiting in self._controls.values():
            if not waiting.done():
                waiting.set_exception(error)
        self._controls.clear()

    def fail_all(self, error: RequestError) -> None:
        """End everything in flight with `error`, in the engine too where there is one."""
        for request_id, route in list(self._routes.items()):
            self._drop(request_id, route, "error")
            route.generation.fail(error)

    def submit(self, requests: Sequence[Request]) -> Generation:
        """Hand requests to the engine.

        Raises:
            RequestError: Status 503, no engine process is ready.
        """
        if self._send is None or self.ready is None:
            raise RequestError("no engine is ready", status=503, code="engine_not_ready")
        if self.replay_log is not None:
            requests = [self.replay_log.begin(request, self.ready) for request in requests]
        if not self._routes:
            self._monitor.work_began()
        generation = Generation(self, requests)
        now, first_choice = self._clock.monotonic(), 0
        for request in requests:
            self._routes[request.id] = _Route(generation, first_choice, request.n, now)
            first_choice += request.n
            self._metrics.observe_request(request)
            self._send(request)
        return generation

    async def control(self, message: Control) -> Ready:
        """Have the engine do something besides answering; returns what it says afterwards.

        Raises:
            RequestError: It refuses, with its own status; or status 503, no engine is ready.
        """
        if self._send is None:
            raise RequestError("no engine is ready", status=503, code="engine_not_ready")
        done: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._controls[message.id] = done
        self._send(message)
        return await done

    def abort(self, generation: Generation) -> None:
        """Drop all that is unfinished of a generation."""
        for request in generation.requests:
            if (route := self._routes.get(request.id)) is not None:
                self._drop(request.id, route, "abort")

    def deliver(self, messages: Iterable[FromEngine]) -> None:
        """Take in what one step of the engine brought."""
        now = self._clock.monotonic()
        for message in messages:
            if isinstance(message, Delta):
                self._deliver_delta(message, now)
            elif isinstance(message, EngineStats):
                new_step = self._monitor.step_finished(message)
                self._metrics.observe_stats(message, new_step=new_step)
            elif isinstance(message, ControlDone):
                self._end_control(message)

    def _deliver_delta(self, delta: Delta, now: float) -> None:
        route = self._routes.get(delta.request_id)
        if route is None:  # aborted while the step ran
            return
        if self.replay_log is not None:
            self.replay_log.observe(delta)
        times = route.times[delta.index]
        self._metrics.observe_delta(delta, times, now)
        if delta.finish_reason is not None:
            self._metrics.observe_finish(delta.finish_reason, times, now)
            route.unfinished.discard(delta.index)
            if not route.unfinished:
                self._forget(delta.request_id)
        route.generation.deliver(route.first_choice + delta.index, delta)

    def _end_control(self, message: ControlDone) -> None:
        if message.ready is not None:
            self.ready = message.ready
        waiting = self._controls.pop(message.id, None)
        if waiting is None or waiting.done():  # whoever asked has gone
            return
        if message.ready is not None:
            waiting.set_result(message.ready)
        else:
            waiting.set_exception(
                RequestError(message.error, status=message.status, code=message.code)
            )

    def _drop(self, request_id: str, route: _Route, reason: FinishReason) -> None:
        now = self._clock.monotonic()
        for index in route.unfinished:
            self._metrics.observe_finish(reason, route.times[index], now)
        if self.replay_log is not None:
            self.replay_log.drop(request_id)
        self._forget(request_id)
        if self._send is not None:
            self._send(Abort(id=request_id))

    def _forget(self, request_id: str) -> None:
        del self._routes[request_id]
        if not self._routes:
            self._monitor.work_ended()


def _merge(first: Delta, second: Delta) -> Delta:
    """Join two successive deltas of a sequence."""
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = [*(first.logprobs or ()), *(second.logprobs or ())]
    return msgspec.structs.replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        text=first.text + second.text,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs,
    )
