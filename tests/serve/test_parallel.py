"""`minigpt serve` with several processes for one model, and what `kill -9` of any of them does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from tests.serve.conftest import ServerProcess, StartServer

BODY: dict[str, Any] = {"model": "tiny", "prompt": "hello", "temperature": 0, "ignore_eos": True}
_PARALLEL = ("--set=engine.tensor_parallel_size=2", "--served-model-name=tiny")
_FAST = ("--set=restart_backoff_seconds=0.05",)


@pytest.fixture(scope="module")
def parallel(start_server: StartServer) -> Iterator[ServerProcess]:
    server = start_server(*_PARALLEL, *_FAST)
    yield server
    server.close()


def worker_of(server: ServerProcess) -> psutil.Process:
    """Rank 1's process."""
    (worker,) = psutil.Process(server.engine_pid()).children()
    return worker


class Stream:
    """A long answer that is read in a thread."""

    def __init__(self, server: ServerProcess) -> None:
        self.events: list[str] = []
        self.began = threading.Event()
        self._server = server
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self.began.wait(30)

    def _read(self) -> None:
        body = BODY | {"max_tokens": 500, "n": 4, "stream": True}
        with self._server.http.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                self.events.append(line)
                self.began.set()

    def error(self) -> str:
        """Wait for the end and return the code of the error that it ended with."""
        self._thread.join(60)
        assert not self._thread.is_alive()
        last = [event for event in self.events if event][-1]
        assert "data: [DONE]" not in self.events
        return str(json.loads(last.removeprefix("data: "))["error"]["code"])


def test_answers_are_those_of_one_process(server: ServerProcess, parallel: ServerProcess) -> None:
    body = BODY | {"max_tokens": 60, "n": 2, "logprobs": 2}
    answers = [
        one.http.post("/v1/completions", json=body).json()["choices"] for one in (server, parallel)
    ]
    assert [choice["text"] for choice in answers[0]] == [choice["text"] for choice in answers[1]]
    assert parallel.endpoint["tensor_parallel_size"] == 2
    assert worker_of(parallel).is_running()


def test_a_killed_rank_costs_its_streams_a_clear_error(parallel: ServerProcess) -> None:
    stream = Stream(parallel)
    engine, worker = psutil.Process(parallel.engine_pid()), worker_of(parallel)
    worker.kill()
    assert stream.error() == "engine_died"
    psutil.wait_procs([engine, worker], timeout=20)
    parallel.wait_ready()
    assert worker_of(parallel).pid != worker.pid
    assert parallel.http.post("/v1/completions", json=BODY).status_code == 200
    assert "rank 1 was killed by SIGKILL" in parallel.errors


def test_a_rank_that_dies_while_nothing_runs_is_replaced(parallel: ServerProcess) -> None:
    worker = worker_of(parallel)
    restarts = parallel.metric("minigpt:engine_restarts_total")
    worker.kill()
    parallel.wait_until(lambda: parallel.metric("minigpt:engine_restarts_total") > restarts)
    parallel.wait_ready()
    assert parallel.http.post("/v1/completions", json=BODY).status_code == 200


def test_a_killed_engine_leaves_no_rank_behind(parallel: ServerProcess) -> None:
    """Not even a stopped one."""
    worker = worker_of(parallel)
    worker.suspend()
    psutil.Process(parallel.engine_pid()).kill()
    _, alive = psutil.wait_procs([worker], timeout=20)
    assert not alive
    parallel.wait_ready()
    assert parallel.http.post("/v1/completions", json=BODY).status_code == 200


@pytest.mark.soak
def test_a_stopped_rank_is_replaced(start_server: StartServer) -> None:
    server = start_server(
        *_PARALLEL, *_FAST, "--set=engine.tensor_parallel_timeout_seconds=3",
        "--set=stall_floor_seconds=60", "--set=first_step_seconds=60",
    )  # fmt: skip
    stream = Stream(server)
    worker = worker_of(server)
    worker.suspend()
    assert stream.error() == "engine_died"
    _, alive = psutil.wait_procs([worker], timeout=20)
    assert not alive
    server.wait_ready()
    assert server.http.post("/v1/completions", json=BODY).status_code == 200
    everyone = psutil.Process(server.process.pid).children(recursive=True)
    assert server.stop() == 0
    _, alive = psutil.wait_procs(everyone, timeout=20)
    assert not alive
    assert list(Path(server.directory).glob("minigpt-*")) == []


def test_weights_are_swapped(parallel: ServerProcess, tiny_model: Path) -> None:
    before = parallel.http.post("/v1/completions", json=BODY).json()["choices"][0]["text"]
    answer = parallel.http.post("/admin/swap", json={"model": str(tiny_model)}, timeout=60)
    assert answer.status_code == 200
    after = parallel.http.post("/v1/completions", json=BODY).json()["choices"][0]["text"]
    assert after == before


def test_a_number_that_does_not_divide_is_refused(tiny_model: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "minigpt", "serve", str(tiny_model), "--port=0"]
    done = subprocess.run(
        [*command, "--set=engine.tensor_parallel_size=4"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert (
        "tensor_parallel_size = 4: the model can't be cut so, its num_kv_heads = 2" in done.stderr
    )
