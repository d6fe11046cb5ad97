"""Evaluation, compression and the registry, as a user drives them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minigpt.cli.main import run

GATE = "min_documents: 5\nthresholds: {bits_per_byte: {max: LIMIT}}\n"
FAST = ["--set", "bootstrap_samples=100"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def use_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT_HOME", str(home))
    monkeypatch.delenv("MINIGPT_REGISTRY_URI", raising=False)


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gate") / "gate.yaml"
    path.write_text(GATE.replace("LIMIT", "100"))
    return path


@pytest.fixture(scope="module")
def report(
    tiny_model: Path, tiny_dataset: Path, gate: Path, home: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """The report of a real process of its own: what is measured are the bytes on the disk."""
    out = tmp_path_factory.mktemp("report") / "report"
    arguments = ["evaluate", tiny_model, "--data", tiny_dataset, "--out", out, "--gate", gate]
    done = subprocess.run(
        [sys.executable, "-m", "minigpt", *map(str, arguments), *FAST],
        capture_output=True, text=True, timeout=120, env=os.environ | {"MINIGPT_HOME": str(home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "bits_per_byte" in done.stdout and "gate: pass" in done.stdout
    return out


def minigpt(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    """Run in this process; return the exit code, the JSON printed if any, and the error line."""
    code = run([str(argument) for argument in arguments])
    out, error = capsys.readouterr()
    return code, json.loads(out) if out.startswith("{") else out, error


def test_a_failed_gate_ends_with_one_and_keeps_the_report(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate.yaml"
    gate.write_text(GATE.replace("LIMIT", "1"))
    code, found, error = minigpt(
        capsys, "evaluate", tiny_model, "--data", tiny_dataset, "--out", tmp_path / "report",
        "--gate", gate, "--json", *FAST,
    )  # fmt: skip
    assert code == 1
    assert found["verdict"]["verdict"] == "fail"
    assert found["verdict"]["rules"][0]["limit"] == 1
    assert error.startswith("minigpt: gate") and error.count("\n") == 1
    assert (tmp_path / "report" / "manifest.json").is_file()


def test_compress_reports_what_it_measured(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    code, found, _ = minigpt(
        capsys, "compress", tiny_model, "--data", tiny_dataset, "--out", tmp_path / "int8",
        "--json", "--set", "speed_tokens=4", "--set", "speed_repeats=2",
        "--set", "max_documents=4", *FAST,
    )  # fmt: skip
    assert code == 0
    assert found["after"]["disk_bytes"] < found["before"]["disk_bytes"]
    assert found["basis"]["decode_tokens_per_second"].startswith("measured")
    assert found["report"] == str(tmp_path / "int8-report")
    assert (tmp_path / "int8-report" / "manifest.json").is_file()


def test_int4_is_exported_for_minigpt_alone_and_evaluated_as_served(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    code, found, _ = minigpt(
        capsys, "compress", tiny_model, "--data", tiny_dataset, "--out", tmp_path / "int4",
        "--method", "int4", "--json", "--set", "group_size=64", "--set", "speed_tokens=4",
        "--set", "speed_repeats=2", "--set", "max_documents=4", *FAST,
    )  # fmt: skip
    assert code == 0
    assert (found["method"], found["group_size"]) == ("int4", 64)
    assert found["worth_it"] == (found["speedup"]["low"] > 1) and len(found["runners"]) == 2
    code, _, error = minigpt(
        capsys, "compress", tiny_model, "--data", tiny_dataset, "--out", tmp_path / "int8",
        "--set", "group_size=64",
    )  # fmt: skip
    assert code == 2 and "group_size = 64 with method = int8" in error
    code, found, _ = minigpt(
        capsys, "models", "export", tmp_path / "int4", "--out", tmp_path / "out", "--json"
    )
    assert code == 0 and found["readable_by"] == "minigpt"
    reports = []
    for name in ("int4", "out"):
        code, found, error = minigpt(
            capsys, "evaluate", tmp_path / name, "--data", tiny_dataset, "--json",
            "--out", tmp_path / f"{name}-evaluation", *FAST,
        )  # fmt: skip
        assert code == 0, error
        reports.append(found["metrics"]["bits_per_byte"])
    assert reports[0] == reports[1]


def test_from_registration_to_champion_and_back_out(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tiny_dataset: Path,
    report: Path,
    gate: Path,
    tmp_path: Path,
) -> None:
    register = ["models", "register", tiny_model, "--name", "tiny"]
    assert minigpt(capsys, *register)[0] == 0
    code, _, error = minigpt(capsys, "models", "promote", "tiny")
    assert code == 1 and "no gate has judged tiny/1" in error
    code, found, _ = minigpt(capsys, *register, "--report", report, "--json")
    assert code == 0 and found["version"] == 1 and found["verdict"] == "pass"
    code, found, _ = minigpt(capsys, "models", "promote", "tiny", "--why", "first", "--json")
    assert code == 0 and found["changed"] and found["from_version"] is None
    assert "already" in minigpt(capsys, "models", "promote", "tiny/1")[1]
    assert "tiny  champion: 1" in minigpt(capsys, "models", "list")[1]
    _, found, _ = minigpt(capsys, "models", "list", "tiny", "--json")
    assert [version["uri"] for version in found["versions"]] == [str(tiny_model)]
    _, found, _ = minigpt(capsys, "models", "show", "champion", "--json")
    assert found["aliases"] == ["champion"] and found["code"]["version"]
    assert "gate      pass" in minigpt(capsys, "models", "show", "tiny@champion")[1]
    _, found, _ = minigpt(capsys, "models", "history", "tiny", "--json")
    assert [change["why"] for change in found["changes"]] == ["first"]
    assert "nothing -> 1" in minigpt(capsys, "models", "history", "tiny")[1]

    # The champion is a model and a baseline wherever one is asked for.
    gate_file = tmp_path / "gate.yaml"
    gate_file.write_text(gate.read_text() + "regressions: {bits_per_byte: {relative: 0.01}}\n")
    code, found, _ = minigpt(
        capsys, "evaluate", "champion", "--data", tiny_dataset, "--out", tmp_path / "again",
        "--gate", gate_file, "--baseline", "champion", "--json", *FAST,
    )  # fmt: skip
    assert code == 0
    assert found["verdict"]["baseline_uri"] == str(report)
    assert found["verdict"]["rules"][1]["value"] == 0.0

    code, found, _ = minigpt(capsys, "models", "export", "champion", "--out", tmp_path / "hf",
                             "--max-shard-size", "100KB", "--json")  # fmt: skip
    assert code == 0 and "model.safetensors.index.json" in found["files"]
    code, found, _ = minigpt(
        capsys, "models", "import", tmp_path / "hf", "--out", tmp_path / "in", "--json"
    )
    assert code == 0
    tensors = [
        json.loads((path / "manifest.json").read_text())["tensors"]
        for path in (tiny_model, tmp_path / "in")
    ]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize(("choice", "code"), [("skip", 0), ("insufficient", 1)])
def test_a_gate_whose_baseline_is_not_there_yet(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tiny_dataset: Path,
    gate: Path,
    tmp_path: Path,
    choice: str,
    code: int,
) -> None:
    rules = tmp_path / "gate.yaml"
    rules.write_text(
        gate.read_text() + "regressions: {bits_per_byte: {relative: 0.01}}\n"
        f"baseline: nobody@champion\nwithout_baseline: {choice}\n"
    )
    found, _, error = minigpt(
        capsys, "evaluate", tiny_model, "--data", tiny_dataset, "--out", tmp_path / "report",
        "--gate", rules, *FAST,
    )  # fmt: skip
    assert found == code
    assert "no baseline: no model 'nobody'" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "MODEL", "--data", "MODEL", "--out", "OUT"], "but a dataset is needed"),
        (["evaluate", "MODEL", "--data", "DATA", "--out", "MODEL"], "exists"),
        (["evaluate", "nobody", "--data", "DATA", "--out", "OUT"], "no model 'nobody'"),
        (["evaluate", "a/b/c", "--data", "DATA", "--out", "OUT"], "neither a path that exists"),
        (["evaluate", "MODEL", "--data", "DATA", "--out", "OUT", "--set", "sampels=1"],
         "did you mean 'samples'"),
        (["evaluate", "MODEL", "--data", "DATA", "--out", "OUT", "--baseline", "x"],
         "no use without a gate"),
        (["evaluate", "MODEL", "--data", "DATA", "--out", "OUT", "--gate", "none.yaml"],
         "no such config file"),
        (["evaluate", "MODEL", "--data", "DATA", "--out", "OUT", "--tasks", "none.yaml"],
         "no task file at none.yaml"),
        (["compress", "MODEL", "--data", "DATA", "--out", "OUT", "--method", "int3"],
         "method = 'int3'"),
        (["compress", "MODEL", "--data", "DATA", "--out", "MODEL"], "exists"),
        (["models", "register", "DATA", "--name", "x"], "but a model is needed"),
        (["models", "show", "x@champion"], "no model 'x'"),
        (["models", "export", "MODEL", "--out", "OUT", "--max-shard-size", "big"], "is no size"),
        (["models", "import", "none", "--out", "OUT"], "config.json is missing"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    tiny_model: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    places = {"MODEL": tiny_model, "DATA": tiny_dataset, "OUT": tmp_path / "out"}
    code, out, error = minigpt(capsys, *[places.get(each, each) for each in arguments])
    assert code == 2 and out == ""
    assert message in error and error.startswith("minigpt: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
