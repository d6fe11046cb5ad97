"""An S3 server on this machine that chaos can lose for a while: moto, behind a link it cuts.

The server is a process of its own and keeps its objects, as S3 does; what goes is the way there.
"""

from __future__ import annotations

import http.client
import importlib.util
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

from minigpt.core.errors import ConfigError, TrainingError
from minigpt.train.supervise import free_port

BUCKET = "chaos"
_HOST = "127.0.0.1"
_START_SECONDS = 120.0
_POLL_SECONDS = 0.05
_BLOCK_BYTES = 1 << 16


def check_installed() -> None:
    """Refuse where there is no server to start, or nothing that could reach it.

    Raises:
        ConfigError: Naming what is missing.
    """
    missing = [name for name in ("moto", "flask", "s3fs") if not importlib.util.find_spec(name)]
    if missing:
        raise ConfigError(
            f"the fault `lost-s3` needs {missing[0]}, which is not installed",
            remedy="pip install 'moto[s3,server]' s3fs, or leave that fault out",
        )


class ChaosStorage:
    """A running server with an empty bucket, and the link to it."""

    def __init__(self) -> None:
        """Start the server and open the link.

        Raises:
            TrainingError: The server does not come up.
        """
        server_port = free_port()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", _HOST, "-p", str(server_port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._make_bucket(server_port)
        except BaseException:
            self._server.kill()
            self._server.wait()
            raise
        self.link = Link(server_port)
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{_HOST}:{self.link.port}",
            "AWS_ACCESS_KEY_ID": "chaos",
            "AWS_SECRET_ACCESS_KEY": "chaos",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # s3fs tries five times by itself
        }
        """What a run needs to find it."""

    def close(self) -> None:
        """End server and link."""
        self.link.cut()
        self._server.kill()
        self._server.wait()

    def _make_bucket(self, port: int) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while self._server.poll() is None and time.monotonic() < deadline:
            with suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(_HOST, port, timeout=_START_SECONDS)
                connection.request("PUT", f"/{BUCKET}")
                if connection.getresponse().status == http.client.OK:
                    return
            time.sleep(_POLL_SECONDS)
        raise TrainingError(
            f"moto did not start to serve S3 within {_START_SECONDS:g} s",
            remedy=f"see what `{sys.executable} -m moto.server` says",
        )


class Link:
    """Passes TCP connections on to a port of this machine, until it is cut."""

    def __init__(self, target: int) -> None:
        """Open it on a port of its own, which it keeps."""
        self._target = target
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.port = 0
        self.mend()

    def mend(self) -> None:
        """Open it, again on the same port."""
        listener = socket.create_server((_HOST, self.port))
        self.port = int(listener.getsockname()[1])
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """Refuse new connections and break those there are, in the middle of what they carry."""
        with self._lock:
            listener, self._listener = self._listener, None
            doomed = [*self._open, *([listener] if listener is not None else [])]
            self._open.clear()
        for connection in doomed:
            with suppress(OSError):  # wakes the thread that waits on it
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # it was cut
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((_HOST, self._target))
                with self._lock:
                    is_open = self._listener is listener
                    if is_open:
                        self._open |= {client, server}
                if not is_open:
                    client.close()
                    server.close()
                    return
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(_BLOCK_BYTES):
                sink.sendall(block)
        with self._lock:
            self._open -= {source, sink}
        for connection in (source, sink):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
