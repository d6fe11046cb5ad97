"""HTTP below the routes: request ids, body limits, errors in OpenAI's form, event streams."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt.api.openai_responses import STREAM_END, encode, encode_event, error_body
from minigpt.core.errors import RequestError
from minigpt.core.telemetry import get_logger
from minigpt.serve.engine_client import Generation, Update
from minigpt.serve.metrics import ServeMetrics
from minigpt.serve.render import Renderer
from minigpt.serve.service import Job

_CLIENT_CLOSED = 499
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_INTERNAL_ERROR = "internal error; the log has it under this request's id"


class JsonResponse(Response):
    """A body that is already encoded."""

    media_type = "application/json"


def error_response(error: RequestError, retry_after_seconds: int = 1) -> Response:
    """Render an error; 503 tells when to come again."""
    headers = {"Retry-After": str(retry_after_seconds)} if error.status == 503 else None
    return JsonResponse(encode(error_body(error)), status_code=error.status, headers=headers)


def check_loopback(request: Request) -> None:
    """Let only this machine through.

    Raises:
        RequestError: Status 403, the client is elsewhere.
    """
    client = request.client
    if client is None or not ipaddress.ip_address(client.host).is_loopback:
        raise RequestError(
            f"{request.url.path} is for clients on the server's own machine",
            status=403,
            code="not_local",
            remedy="call it there, by 127.0.0.1",
        )


async def read_body(request: Request, limit: int) -> bytes:
    """Read the whole body.

    Raises:
        RequestError: Status 413, as soon as it is known to be longer than `limit` bytes.
    """
    too_long = RequestError(
        f"the body is longer than {limit} bytes",
        status=413,
        code="body_too_large",
        remedy="send less, or raise max_body_bytes",
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise too_long
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_long
    return bytes(body)


class GenerationResponse(Response):
    """Answers with a generation, whole or as server-sent events, and aborts it if nobody listens.

    The status is settled by the first update: what fails before it is an HTTP error, what fails
    after it ends the stream with an error event and without `[DONE]`.

    Args:
        job: Just submitted; its end, however it comes, is this response's to bring about.
        renderer: Of the same job.
        stream: Events, or one object.
        include_usage: End the stream with a chunk of usage.
    """

    def __init__(self, job: Job, renderer: Renderer, *, stream: bool, include_usage: bool) -> None:
        super().__init__(media_type="text/event-stream" if stream else "application/json")
        self._job = job
        self._generation = job.generation
        self._renderer = renderer
        self._stream = stream
        self._include_usage = include_usage
        self.headers["Cache-Control"] = "no-store"
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything.

        Raises:
            RequestError: Nothing was sent yet; the application's handler renders it.
        """
        generation = self._generation
        try:
            async with _cancel_on_disconnect(receive, generation):
                await (self._send_events(send) if self._stream else self._send_whole(send))
        finally:
            generation.cancel()
            usage = self._renderer.usage
            scope["minigpt.log"] = {
                "id": self._job.id,
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
            }

    async def _send_whole(self, send: Send) -> None:
        updates: list[Update] = []
        async for more in self._generation:
            updates += more
        if self._generation.cancelled:
            return
        body = encode(self._renderer.whole(updates))
        self.headers["content-length"] = str(len(body))
        await self._start(send)
        await send({"type": "http.response.body", "body": body})

    async def _send_events(self, send: Send) -> None:
        started = False
        try:
            async for updates in self._generation:
                events = b"".join(map(encode_event, self._renderer.chunks(updates)))
                if not started:
                    await self._start(send)
                    started = True
                await send({"type": "http.response.body", "body": events, "more_body": True})
        except RequestError as error:
            if not started:
                raise
            await send({"type": "http.response.body", "body": encode_event(error_body(error))})
            return
        if self._generation.cancelled:
            return
        end = encode_event(self._renderer.usage_chunk()) if self._include_usage else b""
        await send({"type": "http.response.body", "body": end + STREAM_END})

    async def _start(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )


@asynccontextmanager
async def _cancel_on_disconnect(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Cancel the generation when the client goes away while the block runs."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


class RequestMiddleware:
    """Gives each request an id, a log line, metrics, and an error body if all else fails.

    A client's own `X-Request-Id` is taken over; the answer carries the id either way.
    """

    def __init__(self, app: ASGIApp, metrics: ServeMetrics) -> None:
        self._app = app
        self._metrics = metrics
        self._log = get_logger("http")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        began = time.perf_counter()
        status = 0
        complete = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:  # while its body was read: nothing to answer, nobody to tell
            pass
        except Exception:
            self._log.exception("request failed", request_id=request_id)
            await self._send_failure(status, scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - began
            self._record(scope, request_id, status if complete else _CLIENT_CLOSED, seconds)

    async def _send_failure(self, status: int, scope: Scope, receive: Receive, send: Send) -> None:
        error = RequestError(_INTERNAL_ERROR, status=500, code="internal_error")
        if status == 0:
            await error_response(error)(scope, receive, send)
        else:
            await send({"type": "http.response.body", "body": encode_event(error_body(error))})

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        # The route's template, never the path itself: labels must stay few.
        handler = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if handler != "none" else "none"
        self._metrics.http_requests.labels(method, handler, str(status)).inc()
        self._metrics.http_seconds.labels(method, handler).observe(seconds)
        log = self._log.debug if handler in _QUIET else self._log.info
        fields: dict[str, Any] = scope.get("minigpt.log", {})
        log(
            "request",
            request_id=request_id,
            method=scope["method"],
            path=handler,
            status=status,
            seconds=round(seconds, 4),
            **fields,
        )


_QUIET = frozenset({"/health", "/ready", "/metrics"})
