"""The S3 server that chaos takes away: real sockets, real requests."""

from __future__ import annotations

import importlib.util
import socket
import threading
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.exceptions import EndpointConnectionError

from minigpt.core.errors import ConfigError
from minigpt.train.chaos_storage import BUCKET, ChaosStorage, Link, check_installed


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection:
            while block := connection.recv(1 << 16):
                connection.sendall(block)

    threading.Thread(target=serve, daemon=True).start()
    yield int(listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def _exchange(connection: socket.socket, content: bytes) -> bytes:
    connection.sendall(content)
    received = b""
    while len(received) < len(content):
        block = connection.recv(1 << 16)
        if not block:
            break
        received += block
    return received


def test_a_link_passes_all_on_until_it_is_cut_and_again_when_mended(echo: int) -> None:
    link = Link(echo)
    address = ("127.0.0.1", link.port)
    first, second = (socket.create_connection(address, timeout=30) for _ in range(2))
    content = bytes(range(256)) * 1000
    assert _exchange(first, content) == content and _exchange(second, b"x") == b"x"
    link.cut()
    try:
        answer = _exchange(first, b"x")
    except OSError:
        answer = b""
    assert answer == b"", "an open connection outlived the cut"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=30)
    link.cut()  # again is nothing
    link.mend()
    with socket.create_connection(address, timeout=30) as third:
        assert _exchange(third, content) == content
    link.cut()
    for connection in (first, second):
        connection.close()


def test_the_server_is_lost_and_comes_back_with_its_objects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = ChaosStorage()
    try:
        for name, value in storage.environment.items():
            monkeypatch.setenv(name, value)
        client: Any = boto3.client("s3")
        client.put_object(Bucket=BUCKET, Key="a", Body=b"kept")
        storage.link.cut()
        with pytest.raises(EndpointConnectionError):
            boto3.client("s3").get_object(Bucket=BUCKET, Key="a")
        storage.link.mend()
        assert boto3.client("s3").get_object(Bucket=BUCKET, Key="a")["Body"].read() == b"kept"
    finally:
        storage.close()
    with pytest.raises(EndpointConnectionError):
        boto3.client("s3").list_objects_v2(Bucket=BUCKET)


def test_without_moto_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "moto" else find(name)
    )
    with pytest.raises(ConfigError, match="needs moto, which is not installed") as caught:
        check_installed()
    assert "moto[s3,server]" in caught.value.remedy
