"""What becomes of clients and server when the engine process dies or hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import openai
import psutil
import pytest

if TYPE_CHECKING:
    from tests.serve.conftest import ServerProcess, StartServer

LONG: dict[str, Any] = {
    "model": "tiny", "prompt": "hello", "max_tokens": 500, "extra_body": {"ignore_eos": True},
}  # fmt: skip
BRIEF: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 2}


@pytest.fixture(scope="module")
def fragile(start_server: StartServer) -> ServerProcess:
    """A server whose engine may be harmed; it takes a hung step for dead soon."""
    return start_server(
        "--served-model-name=tiny",
        "--set=stall_floor_seconds=1",
        "--set=stall_kill_seconds=1.5",
        "--set=restart_backoff_seconds=0.1",
        "--set=restart_backoff_max_seconds=0.2",
    )


@pytest.fixture(autouse=True)
def _recovered(fragile: ServerProcess) -> None:
    fragile.wait_ready()


def test_killed_engine_fails_its_streams_and_comes_back(fragile: ServerProcess) -> None:
    client = fragile.client()
    engine = fragile.engine_pid()
    restarts = fragile.metric("minigpt:engine_restarts_total")
    stream = client.completions.create(stream=True, n=4, **LONG)
    next(iter(stream))
    os.kill(engine, signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(openai.APIError, match="engine process died"):
        list(stream)
    assert time.monotonic() - killed < 3
    assert fragile.http.get("/health").status_code == 503
    assert fragile.http.get("/ready").json() == {"status": "restarting"}
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(**BRIEF)
    assert refused.value.status_code == 503
    assert refused.value.response.headers["retry-after"]
    fragile.wait_ready()
    assert fragile.engine_pid() != engine
    assert not psutil.pid_exists(engine)
    assert client.completions.create(**BRIEF).choices[0].finish_reason == "length"
    assert fragile.metric("minigpt:engine_restarts_total") == restarts + 1
    assert fragile.metric("vllm:request_success_total", finished_reason="error") >= 4


def test_request_without_a_token_yet_gets_503(fragile: ServerProcess) -> None:
    engine = fragile.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    client = fragile.client()
    errors: list[openai.APIStatusError] = []

    def ask() -> None:
        with pytest.raises(openai.APIStatusError) as refused:
            client.completions.create(stream=True, **LONG)
        errors.append(refused.value)

    asking = threading.Thread(target=ask)
    asking.start()
    fragile.wait_until(lambda: fragile.metric("vllm:request_params_n_count") > 0)
    os.kill(engine, signal.SIGKILL)
    asking.join(timeout=10)
    assert [error.status_code for error in errors] == [503]


def test_the_clients_own_retries_outlast_a_restart(fragile: ServerProcess) -> None:
    client = fragile.client(max_retries=8)
    os.kill(fragile.engine_pid(), signal.SIGKILL)
    assert client.completions.create(**BRIEF).choices[0].finish_reason == "length"


def test_hung_engine_is_seen_and_replaced(fragile: ServerProcess) -> None:
    engine = fragile.engine_pid()
    client = fragile.client()
    # Its steps have to be known, or the first one is granted two minutes.
    client.completions.create(**BRIEF)
    stream = client.completions.create(stream=True, **LONG)
    next(iter(stream))
    os.kill(engine, signal.SIGSTOP)
    assert fragile.http.get("/health").json() == {"status": "ready"}
    fragile.wait_until(lambda: fragile.http.get("/health").json() == {"status": "stalled"})
    assert fragile.http.get("/ready").status_code == 503
    with pytest.raises(openai.APIError, match="engine process died"):
        list(stream)
    fragile.wait_ready()
    assert not psutil.pid_exists(engine)
    assert client.completions.create(**BRIEF).choices[0].finish_reason == "length"


def test_a_stopped_engine_without_work_is_no_stall(fragile: ServerProcess) -> None:
    engine = fragile.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    time.sleep(1.3)
    assert fragile.http.get("/health").status_code == 200
    os.kill(engine, signal.SIGCONT)
    fragile.client().completions.create(**BRIEF)
    assert fragile.engine_pid() == engine
