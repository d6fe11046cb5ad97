"""The whole loop, small: every stage a real process, ending with an answer from a server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from minigpt.cli.quickstart import bundled
from minigpt.core.artifact import lineage, open_artifact
from minigpt.core.errors import ConfigError


def quickstart(directory: Path, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "minigpt",
            "quickstart",
            "--tiny",
            "--json",
            f"--directory={directory}",
        ],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"MINIGPT_HOME": str(home)},
    )


def test_the_loop_turns_ends_by_itself_and_goes_on_where_it_was(tmp_path: Path) -> None:
    directory, home = tmp_path / "run", tmp_path / "home"
    first = quickstart(directory, home)
    assert first.returncode == 0, first.stderr[-2000:]
    result = json.loads(first.stdout)
    assert result["answer"]
    assert result["tokens"] == 96
    assert result["ttft_seconds"] > 0
    assert result["tokens_per_second"] > 0
    assert not [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if str(directory) in " ".join(process.info["cmdline"] or [])
    ]
    tree = lineage(open_artifact(directory / "int8-evaluation"))
    kinds = {(a.parent.kind, a.artifact is not None) for a in tree.ancestors}
    assert kinds == {("model", True), ("dataset", True)}

    again = quickstart(directory, home)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stderr.count("is there already") == 4
    assert json.loads(again.stdout)["answer"] == result["answer"]


def test_recipes_are_found_beside_the_package() -> None:
    assert Path(bundled("recipes/tiny.yaml")).is_file()
    with pytest.raises(ConfigError, match=r"recipes/none\.yaml is not beside the package"):
        bundled("recipes/none.yaml")
