"""`minigpt serve --preflight` as a user meets it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.cli.main import run


def test_preflight_says_what_serving_takes(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["serve", str(tiny_model), "--preflight", "--set", "engine.dtype=float32"]
    assert run([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert plan["max_concurrent_tokens"] == 32 * 512
    assert run(arguments) == 0
    text = capsys.readouterr().out
    assert f"{plan['weight_bytes']:,} bytes" in text
    assert "16,384 at most: 32.0 contexts of 512" in text
    half = [*arguments, "--set", "engine.tensor_parallel_size=2"]
    assert run([*half, "--json"]) == 0
    part = json.loads(capsys.readouterr().out)
    assert part["kv_bytes_per_token"] * 2 == plan["kv_bytes_per_token"]
    assert plan["weight_bytes"] / 2 < part["weight_bytes"] < 0.51 * plan["weight_bytes"]
    assert run(half) == 0
    assert "on each of 2 ranks" in capsys.readouterr().out
    assert run([*arguments, "--set", "engine.tensor_parallel_size=4"]) == 2
    assert "its num_kv_heads = 2 (one of 1, 2)" in capsys.readouterr().err


def test_preflight_refuses_with_the_shortfall(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = 1 << 60
    assert run(["serve", str(tiny_model), "--preflight", "--set", f"engine.kv_cache_bytes={size}"])
    assert "short by" in capsys.readouterr().err


def test_preflight_loads_no_torch(tiny_model: Path) -> None:
    code = (
        "import sys\n"
        "from minigpt.cli.main import run\n"
        f"assert run(['serve', {str(tiny_model)!r}, '--preflight']) == 0\n"
        "heavy = {'torch', 'uvicorn', 'fastapi', 'mlflow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1, "seconds of work"
