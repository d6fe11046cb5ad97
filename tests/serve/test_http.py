"""Disconnects, body limits, request ids."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from tests.serve.conftest import ServerProcess

LONG: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 500, "ignore_eos": True}


def cache_usage(server: ServerProcess) -> float:
    return server.metric("vllm:kv_cache_usage_perc")


def aborted(server: ServerProcess) -> float:
    return server.metric("vllm:request_success_total", finished_reason="abort")


def send_raw(server: ServerProcess, body: dict[str, Any]) -> socket.socket:
    """Send a request on a socket of our own, so that we can drop it at any moment."""
    parts = urlsplit(server.url)
    assert parts.hostname is not None
    connection = socket.create_connection((parts.hostname, parts.port or 0), timeout=20)
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_aborts_and_frees_the_blocks(server: ServerProcess, stream: bool) -> None:
    before = aborted(server)
    connection = send_raw(server, LONG | {"n": 8, "stream": stream})
    server.wait_until(lambda: cache_usage(server) > 0)
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    server.wait_until(lambda: aborted(server) == before + 8, seconds=5)
    server.wait_until(lambda: cache_usage(server) == 0, seconds=2)
    assert server.metric("vllm:num_requests_running") == 0


def test_disconnect_while_waiting_for_the_batch(server: ServerProcess) -> None:
    before = aborted(server)
    # The engine runs 32 sequences at most: the second request waits, and leaves first.
    first = send_raw(server, LONG | {"n": 32})
    server.wait_until(lambda: server.metric("vllm:num_requests_running") == 32)
    second = send_raw(server, LONG | {"n": 4})
    server.wait_until(lambda: server.metric("vllm:num_requests_waiting") == 4)
    second.close()
    server.wait_until(lambda: server.metric("vllm:num_requests_waiting") == 0, seconds=5)
    first.close()
    server.wait_until(lambda: cache_usage(server) == 0, seconds=5)
    assert aborted(server) == before + 36


def test_slow_reader_gets_everything(server: ServerProcess) -> None:
    connection = send_raw(server, LONG | {"n": 16, "stream": True, "max_tokens": 300})
    server.wait_until(lambda: server.metric("vllm:num_requests_running") > 0)
    server.wait_until(lambda: server.metric("vllm:num_requests_running") == 0)
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        received += connection.recv(65536)
    connection.close()
    chunks = [
        json.loads(line.removeprefix("data: "))
        for line in received.decode().splitlines()
        if line.startswith("data: {")
    ]
    reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
    assert sum(reason is not None for reason in reasons) == 16
    assert received.count(b"data: [DONE]") == 1


def test_body_over_the_limit(server: ServerProcess) -> None:
    content = json.dumps({"model": "tiny", "prompt": "x" * (9 << 20)}).encode()
    declared = server.http.post("/v1/completions", content=content)
    assert declared.status_code == 413
    assert declared.json()["error"]["code"] == "body_too_large"
    pieces = (content[start : start + 65536] for start in range(0, len(content), 65536))
    chunked = server.http.post("/v1/completions", content=pieces)
    assert chunked.status_code == 413


def test_disconnect_in_the_middle_of_a_body(server: ServerProcess) -> None:
    parts = urlsplit(server.url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=20)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    connection.close()
    gone = lambda: server.metric("http_requests_total", status="499") > 0  # noqa: E731
    server.wait_until(gone)
    assert "Traceback" not in server.errors


@pytest.mark.parametrize("given", ["", "with space", "x" * 200, "new\u00e4"])
def test_unfit_request_ids_are_replaced(server: ServerProcess, given: str) -> None:
    headers = {"X-Request-Id": given.encode("latin-1")}
    answer = server.http.get("/v1/models", headers=headers)  # type: ignore[arg-type]
    assert len(answer.headers["x-request-id"]) == 32


def test_labels_hold_route_templates_only(server: ServerProcess) -> None:
    server.http.get("/v1/models/some-name")
    server.http.get("/some/random/path")
    text = server.http.get("/metrics").text
    assert 'handler="/v1/models/{name:path}"' in text
    assert "random" not in text
    assert "some-name" not in text
