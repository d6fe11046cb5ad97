"""Real servers in processes of their own, and what tests ask of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

START_SECONDS = 60.0


class ServerProcess:
    """`minigpt serve` as an operator starts it, on a port of the system's choice."""

    def __init__(self, model: Path, directory: Path, *arguments: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._errors = directory / "stderr"
        command = [sys.executable, "-m", "minigpt", "serve", str(model), "--json"]
        defaults = ["--port=0", "--set=engine.dtype=float32", "--set=engine.threads=1"]
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*command, *defaults, *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"TMPDIR": str(directory), "OMP_NUM_THREADS": "1"},
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"no ready line; stderr:\n{self.errors}"
        self.endpoint: dict[str, Any] = json.loads(line)
        self.url: str = self.endpoint["url"]
        self.http = httpx.Client(base_url=self.url, timeout=30)

    @property
    def errors(self) -> str:
        """Everything on standard error so far."""
        return self._errors.read_text()

    @property
    def log(self) -> list[dict[str, Any]]:
        """The log lines so far; one still being written is left out."""
        whole = self.errors.rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def logged(self, request_id: str) -> list[dict[str, Any]]:
        """Wait for a request's log line, which comes after its answer; return all it has."""

        def lines() -> list[dict[str, Any]]:
            return [line for line in self.log if line.get("request_id") == request_id]

        self.wait_until(lambda: bool(lines()))
        return lines()

    def engine_pid(self) -> int:
        """Return the engine's process id; there must be one."""
        (engine,) = psutil.Process(self.process.pid).children()
        return int(engine.pid)

    def client(self, **options: Any) -> openai.OpenAI:
        """Return the public client, without retries."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", **({"max_retries": 0} | options)
        )

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of one series; 0 where it does not exist yet."""
        for line in self.http.get("/metrics").text.splitlines():
            match = re.fullmatch(r"([a-zA-Z0-9_:]+)(?:\{(.*)\})? (\S+)", line)
            if match is None or match[1] != name:
                continue
            found = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            if labels.items() <= found.items():
                return float(match[3])
        return 0.0

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20.0) -> float:
        """Wait for a condition and return how long it took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, f"not within {seconds} s:\n{self.errors}"
            time.sleep(0.01)
        return time.monotonic() - began

    def wait_ready(self, seconds: float = START_SECONDS) -> float:
        """Wait until the server takes requests."""
        return self.wait_until(lambda: self.http.get("/ready").status_code == 200, seconds)

    def stop(self) -> int:
        """Ask the server to end and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=40)

    def close(self) -> None:
        """End everything, whatever state it is in."""
        self.http.close()
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.terminate()
                self.process.wait(timeout=10)
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


StartServer = Callable[..., ServerProcess]


@pytest.fixture(scope="session")
def start_server(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartServer]:
    """Start servers of the tiny model; they end with the session."""
    servers: list[ServerProcess] = []

    def start(*arguments: str, model: Path = tiny_model) -> ServerProcess:
        server = ServerProcess(model, tmp_path_factory.mktemp("server"), *arguments)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def server(start_server: StartServer) -> ServerProcess:
    """A server that no test harms."""
    return start_server("--served-model-name=tiny")


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> openai.OpenAI:
    """The public client of `server`."""
    return server.client()
