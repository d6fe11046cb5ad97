"""Answers of a real server, killed without warning, are reproduced from its log."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.engine.swapping import make_adapter, other_model

from minigpt.api.requests import Request, SamplingParams
from minigpt.cli.main import run
from minigpt.compress.config import CompressConfig
from minigpt.compress.quantize import quantize
from minigpt.core.errors import MinigptError
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.kernels import library
from minigpt.serve.replay import _fingerprint, find_answers, replay
from minigpt.serve.replay_log import ReplayLog

if TYPE_CHECKING:
    from tests.serve.conftest import StartServer

SAMPLED: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "temperature": 0.9}
BODIES: dict[str, dict[str, Any]] = {
    "greedy": SAMPLED | {"prompt": "The old river", "temperature": 0},
    "drawn": SAMPLED | {"prompt": "The old river", "top_p": 0.9, "n": 2},
    "several": SAMPLED | {"prompt": ["a quiet town", "The old river followed"], "seed": 4},
    "shaped": SAMPLED | {"prompt": "hello", "logit_bias": {"101": 5}, "stop": ["ee"]},
    "choice": SAMPLED | {"prompt": "hello", "structured_outputs": {"choice": ["yes", "no"]}},
    "adapter": SAMPLED | {"prompt": "The old river", "model": "sql"},
}


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapter") / "sql", 3)


@pytest.fixture(scope="module")
def answered(
    start_server: StartServer, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A log, and the responses that it must reproduce."""
    log = tmp_path_factory.mktemp("log") / "replay.jsonl"
    server = start_server("--served-model-name=tiny", f"--set=replay_log={log}")
    load = {"lora_name": "sql", "lora_path": str(adapter)}
    assert server.http.post("/v1/load_lora_adapter", json=load).status_code == 200

    def ask(body: dict[str, Any]) -> dict[str, Any]:
        answer = server.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    with ThreadPoolExecutor() as pool:  # side by side, so that they share batches
        found = dict(zip(BODIES, pool.map(ask, BODIES.values()), strict=True))
    server.wait_until(lambda: all(a["id"] in log.read_text() for a in found.values()))
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.wait(timeout=20)
    return log, found


def replayed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = run(["replay", *arguments, "--json"])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if printed.out else {"error": printed.err}


@pytest.mark.parametrize("name", BODIES)
def test_an_answer_is_reproduced(
    name: str,
    answered: tuple[Path, dict[str, dict[str, Any]]],
    tiny_model: Path,
    adapter: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log, responses = answered
    given = ["--adapter", str(adapter)] if name == "adapter" else []
    options = ["--log", str(log), "--model", str(tiny_model), *given]
    code, found = replayed(capsys, responses[name]["id"], *options)
    assert code == 0, found
    assert found["identical"] and found["notes"] == []
    expected = [choice["text"] for choice in responses[name]["choices"]]
    assert [answer["text"] for answer in found["answers"]] == expected


def test_what_is_missing_or_another_is_said(
    answered: tuple[Path, dict[str, dict[str, Any]]],
    tiny_model: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log, responses = answered
    name, own = responses["greedy"]["id"], str(tiny_model)
    other = other_model(tiny_model, tmp_path / "other", seed=1)
    strange = make_adapter(tiny_model, tmp_path / "strange", 8)
    adapted = responses["adapter"]["id"]
    for arguments, message in (
        ((name, "--model", str(other)), "the weights of"),
        (("cmpl-0", "--model", own), "has no answer of id 'cmpl-0'"),
        ((adapted, "--model", own), "with the adapter 'sql'"),
        ((adapted, "--model", own, "--adapter", str(strange)), "strange is"),
    ):
        code, found = replayed(capsys, *arguments, "--log", str(log))
        assert code == 2 and message in found["error"], found


def test_an_answer_that_was_another_is_found_out(
    answered: tuple[Path, dict[str, dict[str, Any]]],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The comparison can fail: the logged seed is not the one that was drawn with."""
    log, responses = answered
    forged = tmp_path / "log"
    lines = []
    for line in log.read_text().splitlines():
        tree = json.loads(line)
        if tree["kind"] == "answer":
            tree["request"]["sampling"]["seed"] += 1
        else:
            tree["environment"]["torch"] = "1.0"
        lines.append(json.dumps(tree))
    forged.write_text("\n".join(lines) + "\n")
    options = ["--log", str(forged), "--model", str(tiny_model)]
    code, found = replayed(capsys, responses["drawn"]["id"], *options)
    assert code == 1 and not found["identical"]
    assert "tokens" in found["answers"][0]["difference"]
    assert found["notes"][0].startswith("torch was '1.0', is ")
    assert run(["replay", responses["drawn"]["id"], *options]) == 1
    assert "differs: " in capsys.readouterr().out


@pytest.mark.skipif(library.loaded() is None, reason="no kernels here")
@pytest.mark.parametrize(("bits", "cache"), [(8, "auto"), (16, "auto"), (16, "int8")])
def test_what_the_kernels_round_to_is_replayed(
    bits: int, cache: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = quantize(tiny_model, tmp_path / "small", CompressConfig(method="int4")).path
    settings: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "threads": 1}
    settings |= {"activation_bits": bits, "kv_cache_dtype": cache}
    engine = Engine.load(small, EngineConfig.model_validate(settings))
    log = ReplayLog(
        tmp_path / "log", 1 << 20, model="small", tokenizer=_fingerprint(engine), seed=0
    )
    sampling = SamplingParams(max_tokens=30, temperature=0.9, ignore_eos=True)
    asked = Request(id="r", prompt_token_ids=list(b"The old river"), sampling=sampling)
    engine.add(log.begin(asked, engine.ready()))
    while engine.has_work:
        for delta in engine.step():
            log.observe(delta)
    log.close()
    logged = find_answers(tmp_path / "log", "r")
    config = json.loads(logged[0][1].config)
    assert config["activation_bits"] == bits
    assert config["kv_cache_dtype"] == ("bfloat16" if cache == "auto" else cache)
    (found,), notes = replay(logged, small, None)
    assert found.identical and notes == []
    if (bits, cache) != (16, "auto"):  # never by another format instead
        absent = library.Absence("there is no compiler", "install one")
        monkeypatch.setattr(library, "find", lambda: absent)
        with pytest.raises(MinigptError, match="torch serves here: there is no compiler"):
            replay(logged, small, None)
