"""The server's life: start, bad starts, drain, death of the API process, neighbours."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

if TYPE_CHECKING:
    from tests.serve.conftest import ServerProcess, StartServer

STREAM: dict[str, Any] = {
    "model": "tiny", "prompt": "hello", "temperature": 0, "stream": True, "ignore_eos": True,
}  # fmt: skip


def serve_to_end(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `minigpt serve` where it is expected to end by itself."""
    command = [sys.executable, "-m", "minigpt", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_ready_line_tells_what_is_served(server: ServerProcess) -> None:
    assert server.endpoint["model"] == "tiny"
    assert server.endpoint["context_length"] == 512
    assert server.endpoint["kv_capacity_tokens"] >= 512
    assert server.url.startswith("http://127.0.0.1:")


def test_api_process_never_loads_torch(server: ServerProcess) -> None:
    server.http.get("/v1/models")
    loaded = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in loaded
    assert "libtorch" in Path(f"/proc/{server.engine_pid()}/maps").read_text()


def test_modules_of_the_api_process_do_not_import_torch() -> None:
    code = (
        "import sys, minigpt.serve.run, minigpt.serve.app, minigpt.serve.config, "
        "minigpt.data.tokenizer, minigpt.cli.serve; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_logs_are_json_with_request_ids_and_without_prompts(server: ServerProcess) -> None:
    body = {"model": "tiny", "prompt": "a secret prompt", "max_tokens": 2}
    headers = {"X-Request-Id": "my-request-7"}
    answer = server.http.post("/v1/completions", json=body, headers=headers)
    assert answer.headers["x-request-id"] == "my-request-7"
    (line,) = server.logged("my-request-7")
    assert line["status"] == 200
    assert line["path"] == "/v1/completions"
    assert line["prompt_tokens"] == 16
    assert line["completion_tokens"] == 2
    assert "secret" not in server.errors


def test_two_servers_do_not_collide(server: ServerProcess, start_server: StartServer) -> None:
    second = start_server("--served-model-name=second")
    assert second.url != server.url
    body = {"prompt": "hello", "max_tokens": 8, "temperature": 0}
    texts = {
        one.http.post("/v1/completions", json=body | {"model": name}).json()["choices"][0]["text"]
        for one, name in ((server, "tiny"), (second, "second"))
    }
    assert len(texts) == 1
    assert server.engine_pid() != second.engine_pid()
    assert second.stop() == 0
    assert server.http.get("/ready").status_code == 200


def test_sigterm_finishes_running_streams(start_server: StartServer) -> None:
    server = start_server("--served-model-name=tiny")
    engine = server.engine_pid()
    events: list[str] = []
    began = threading.Event()

    def read() -> None:
        with server.http.stream(
            "POST", "/v1/completions", json=STREAM | {"max_tokens": 400, "n": 2}
        ) as answer:
            for line in answer.iter_lines():
                events.append(line)
                began.set()

    reading = threading.Thread(target=read)
    reading.start()
    assert began.wait(20)
    server.process.send_signal(signal.SIGTERM)
    server.wait_until(lambda: server.http.get("/ready").json() == {"status": "draining"})
    refused = server.http.post("/v1/completions", json=STREAM)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert int(refused.headers["retry-after"]) >= 1
    assert server.process.wait(timeout=40) == 0
    reading.join(timeout=10)
    chunks = [json.loads(e.removeprefix("data: ")) for e in events if e.startswith("data: {")]
    reasons = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
    assert [reason for reason in reasons if reason] == ["length", "length"]
    assert "data: [DONE]" in events
    assert not psutil.pid_exists(engine)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=2)


def test_the_grace_ends_with_an_error_not_a_hang(start_server: StartServer) -> None:
    server = start_server("--served-model-name=tiny", "--set=grace_seconds=0.1")
    engine = server.engine_pid()
    with server.http.stream(
        "POST", "/v1/completions", json=STREAM | {"max_tokens": 500, "n": 32}
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert server.process.wait(timeout=10) == 0
    assert time.monotonic() - began < 8
    assert not psutil.pid_exists(engine)


def test_a_signal_during_the_start_ends_it(tiny_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "minigpt", "serve", str(tiny_model), f"--port={port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}"
        transport = httpx.HTTPTransport(retries=10)
        with httpx.Client(base_url=url, transport=transport, timeout=20) as http:
            assert http.get("/health").json() == {"status": "starting"}
            assert http.get("/ready").status_code == 503
            refused = http.post("/v1/completions", json={"model": tiny_model.name, "prompt": "a"})
            assert refused.json()["error"]["code"] == "engine_not_ready"
            assert refused.headers["retry-after"]
            (engine,) = psutil.Process(process.pid).children()
        process.terminate()
        assert process.wait(timeout=10) == 0
    assert not engine.is_running()


def test_engine_dies_with_its_api_process(start_server: StartServer) -> None:
    server = start_server("--served-model-name=tiny")
    engine = psutil.Process(server.engine_pid())
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait()
    began = time.monotonic()
    while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - began < 5, "the engine outlives its parent"
        time.sleep(0.02)
    assert not list(server.directory.glob("minigpt-*"))


def test_port_in_use(server: ServerProcess, tiny_model: Path) -> None:
    port = server.url.rsplit(":", 1)[1]
    ended = serve_to_end(str(tiny_model), "--port", port)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert f"port {port} on 127.0.0.1 is in use" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "engine.max_seqs=3"), "did you mean 'max_num_seqs'"),
        (("--port", "99999"), "port = 99999"),
        (("--host", "no.such.host.invalid"), "host = 'no.such.host.invalid'"),
        (("--set", "engine.kv_cache_bytes=1000"), "KV cache"),
    ],
)
def test_bad_configuration(tiny_model: Path, arguments: tuple[str, ...], said: str) -> None:
    ended = serve_to_end(str(tiny_model), "--port", "0", *arguments)
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert said in last
    assert "Traceback" not in ended.stderr


def test_model_without_weights(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(tiny_model, broken)
    (broken / "model.safetensors").unlink()
    (broken / "manifest.json").unlink()
    ended = serve_to_end(str(broken), "--port", "0")
    assert ended.returncode == 2
    assert str(broken) in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_broken_chat_template(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(tiny_model, broken)
    (broken / "manifest.json").unlink()
    (broken / "chat_template.jinja").write_text("{% for m in messages %}")
    ended = serve_to_end(str(broken), "--port", "0")
    assert ended.returncode == 2
    assert "chat template is not valid" in ended.stderr.splitlines()[-1]


def test_neither_a_path_nor_registered() -> None:
    ended = serve_to_end("no-such-model")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "no-such-model" in ended.stderr
