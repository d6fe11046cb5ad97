"""An operator changes a real server while it streams: weights, adapters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.engine.swapping import make_adapter, other_model

if TYPE_CHECKING:
    from tests.serve.conftest import ServerProcess, StartServer

PROMPTS = [f"The old river {number} followed" for number in range(3)]


@pytest.fixture(scope="module")
def other(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other_model(tiny_model, tmp_path_factory.mktemp("other") / "model", seed=1)


def body(prompt: str, model: str = "tiny", tokens: int = 24) -> dict[str, Any]:
    return {
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True,
    }  # fmt: skip


def complete(server: ServerProcess, prompt: str, model: str = "tiny", tokens: int = 24) -> str:
    answer = server.http.post("/v1/completions", json=body(prompt, model, tokens))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def stream(server: ServerProcess, prompt: str, began: threading.Semaphore) -> tuple[str, set[str]]:
    """Return a whole stream's text and fingerprints; it must end as it should."""
    text, events = "", 0
    fingerprints: set[str] = set()
    request = body(prompt, tokens=300) | {"stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=request, timeout=60) as answer:
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                return text, fingerprints
            if line:
                chunk = json.loads(line.removeprefix("data: "))
                text += chunk["choices"][0]["text"]
                fingerprints.add(chunk["system_fingerprint"])
                events += 1
                if events == 2:
                    began.release()
    raise AssertionError("the stream was dropped")


def root(server: ServerProcess) -> str:
    return str(server.http.get("/v1/models/tiny").json()["root"])


def test_a_swap_drops_no_stream_and_mixes_no_answer(
    server: ServerProcess, start_server: StartServer, other: Path
) -> None:
    fresh = start_server("--served-model-name=tiny", model=other)
    old = [complete(server, prompt, tokens=300) for prompt in PROMPTS]
    new = [complete(fresh, prompt) for prompt in PROMPTS]
    swapped = start_server("--served-model-name=tiny")
    first, began = root(swapped), threading.Semaphore(0)
    with ThreadPoolExecutor() as pool:
        streams = [pool.submit(stream, swapped, prompt, began) for prompt in PROMPTS]
        for _ in PROMPTS:
            assert began.acquire(timeout=30)
        answer = swapped.http.post("/admin/swap", json={"model": str(other)})
        assert answer.status_code == 200, answer.text
        assert answer.json() == {"model": str(other), "root": root(fresh)}
        assert [complete(swapped, prompt) for prompt in PROMPTS] == new
        found = [each.result(timeout=60) for each in streams]
    assert [text for text, _ in found] == old
    assert {f for _, fingerprints in found for f in fingerprints} == {f"fp_{first[:10]}"}
    assert root(swapped) == root(fresh) != first
    last = swapped.http.post("/v1/completions", json=body("x")).json()
    assert last["system_fingerprint"] == f"fp_{root(fresh)[:10]}"
    # An engine process that is started anew serves the new weights too.
    os.kill(swapped.engine_pid(), signal.SIGKILL)
    swapped.wait_until(lambda: swapped.metric("minigpt:engine_restarts_total") == 1)
    swapped.wait_ready()
    assert [complete(swapped, prompt) for prompt in PROMPTS] == new


def test_a_swap_that_is_refused_changes_nothing(
    server: ServerProcess, tiny_model: Path, tmp_path: Path
) -> None:
    before = root(server), complete(server, "hello")
    wide = other_model(tiny_model, tmp_path / "wide", 1, vocab_size=300)
    answer = server.http.post("/admin/swap", json={"model": str(wide)})
    assert answer.status_code == 400
    assert "vocab_size = 300, the served model 257" in answer.json()["error"]["message"]
    answer = server.http.post("/admin/swap", json={"model": str(tmp_path / "nowhere")})
    assert answer.status_code == 400 and "no model at" in answer.json()["error"]["message"]
    assert server.http.post("/admin/swap", json={}).json()["error"]["param"] == "model"
    assert (root(server), complete(server, "hello")) == before


def test_only_this_machine_may_administer(start_server: StartServer) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; names the outer interface
        except OSError:
            pytest.skip("no network interface but the loopback")
        address = probe.getsockname()[0]
    server = start_server("--served-model-name=tiny", "--host=0.0.0.0")
    url = f"http://{address}:{server.url.rpartition(':')[2]}"
    assert httpx.get(f"{url}/v1/models").status_code == 200
    for route, sent in (
        ("/admin/swap", {"model": "x"}),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "x"}),
        ("/v1/unload_lora_adapter", {"lora_name": "x"}),
    ):
        refused = httpx.post(url + route, json=sent)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_local")


def test_adapters_are_models_of_their_own(
    start_server: StartServer, tiny_model: Path, tmp_path: Path
) -> None:
    server = start_server("--served-model-name=tiny")
    plain = complete(server, PROMPTS[0])
    paths = {
        name: make_adapter(tiny_model, tmp_path / name, seed) for seed, name in enumerate("ab")
    }
    for name, path in paths.items():
        sent = {"lora_name": name, "lora_path": str(path)}
        answer = server.http.post("/v1/load_lora_adapter", json=sent)
        assert answer.status_code == 200, answer.text
    again = server.http.post(
        "/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": str(paths["b"])}
    )
    assert again.status_code == 400 and "is loaded" in again.json()["error"]["message"]
    taken = {"lora_name": "tiny", "lora_path": str(paths["a"])}
    assert server.http.post("/v1/load_lora_adapter", json=taken).status_code == 400
    listed = {m["id"]: m["parent"] for m in server.http.get("/v1/models").json()["data"]}
    assert listed == {"tiny": None, "a": "tiny", "b": "tiny"}
    with ThreadPoolExecutor() as pool:
        names = ["tiny", "a", "b"] * 2
        found = list(pool.map(lambda name: complete(server, PROMPTS[0], name), names))
    assert found[:3] == found[3:] and found[0] == plain
    assert len(set(found)) == 3
    marks = {
        name: server.http.post("/v1/completions", json=body("x", name)).json()
        for name in ("tiny", "a")
    }
    assert marks["a"]["model"] == "a"
    assert marks["a"]["system_fingerprint"].startswith(marks["tiny"]["system_fingerprint"] + "_")
    shutil.rmtree(paths["b"])
    os.kill(server.engine_pid(), signal.SIGKILL)
    server.wait_until(lambda: server.metric("minigpt:engine_restarts_total") == 1)
    server.wait_ready()
    assert complete(server, PROMPTS[0], "a") == found[1]
    lost = server.http.post("/v1/completions", json=body("x", "b"))
    assert lost.status_code == 404  # its files are gone, and the log says so
    assert any(line.get("event") == "adapter lost" for line in server.log)
    gone = server.http.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
    assert gone.status_code == 200, gone.text
    assert server.http.post("/v1/completions", json=body("x", "a")).status_code == 404
    assert server.http.post("/v1/unload_lora_adapter", json={"lora_name": "a"}).status_code == 404
