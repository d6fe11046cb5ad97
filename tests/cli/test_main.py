"""The command line as a user meets it: real processes, exit codes, one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.cli.main import COMMANDS
from minigpt.core.artifact import create_artifact


def minigpt(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minigpt", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def test_version_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['minigpt', '--version']\n"
        "from minigpt.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'typer', 'pydantic', 'rich', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("minigpt ")


def test_help_lists_every_command_without_importing_torch() -> None:
    code = (
        "import sys; from minigpt.cli.main import run; code = run(['--help'])\n"
        "assert 'torch' not in sys.modules and code == 0, code"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name in COMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_and_imports_no_torch_for_it(command: str) -> None:
    code = (
        f"import sys; from minigpt.cli.main import run; code = run([{command!r}, '--help'])\n"
        "assert 'torch' not in sys.modules and code == 0, code"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage: minigpt " + command in result.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "No such command 'trian'"),
        (["artifact", "verify"], "Missing argument"),
        (["artifact", "verify", "/nowhere"], "no artifact at /nowhere"),
        (["artifact", "show", "x", "--jsn"], "No such option"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(arguments: list[str], expected: str) -> None:
    result = minigpt(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("minigpt: ")
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr


def test_artifact_commands_speak_to_people_and_machines(tmp_path: Path) -> None:
    with create_artifact(tmp_path / "data", kind="dataset") as parent:
        (parent.path / "tokens").write_bytes(b"abc")
    assert parent.artifact is not None
    with create_artifact(tmp_path / "m", kind="model", parents=[parent.artifact]) as draft:
        (draft.path / "weights").write_bytes(b"abc")
        draft.metrics["loss"] = {"val": 1.25}
    path = str(tmp_path / "m")
    assert json.loads(minigpt("artifact", "verify", path, "--json").stdout)["ok"]
    assert "loss.val = 1.25" in minigpt("artifact", "show", path).stdout
    lineage = json.loads(minigpt("artifact", "lineage", path, "--json").stdout)
    assert [p["kind"] for p in lineage["parents"]] == ["dataset"]
    assert "dataset" in minigpt("artifact", "lineage", path).stdout
    (tmp_path / "m" / "weights").write_bytes(b"abd")
    result = minigpt("artifact", "verify", path)
    assert result.returncode == 2
    assert "weights is corrupt" in result.stderr


def test_doctor_reports_the_machine() -> None:
    result = minigpt("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["ok"] else 1)
    names = {finding["name"] for finding in report["findings"]}
    assert {"cores", "instructions", "memory", "gpu", "compiler", "kernels", "disk"} <= names
    assert "torch" in report["libraries"]
    assert minigpt("doctor").stdout.count("\n") > 10


def test_chat_without_a_server_says_how_to_start_one() -> None:
    result = minigpt("chat", "hello", "--url", "http://127.0.0.1:9")
    assert result.returncode == 2
    assert "no server answers at http://127.0.0.1:9 (start one with" in result.stderr


def test_completion_script_is_printed_for_bash() -> None:
    result = minigpt(_MINIGPT_COMPLETE="complete_bash", COMP_WORDS="minigpt art", COMP_CWORD="1")
    assert "artifact" in result.stdout
    nested = minigpt(
        _MINIGPT_COMPLETE="complete_bash", COMP_WORDS="minigpt artifact ver", COMP_CWORD="2"
    )
    assert "verify" in nested.stdout
