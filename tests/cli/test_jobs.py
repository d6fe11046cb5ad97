"""`minigpt jobs` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minigpt.cli.main import run

JOB = """
name: hello
command: [sh, -c, "echo line one; sleep 1; echo rank $RANK of $WORLD_SIZE"]
workers: 2
resources: {cpus: 0.5, memory_gib: 0.5}
"""
QUEUE = "nodes: {here: {cpus: 2, memory_gib: 4}}\npoll_seconds: 0.1\nlease_seconds: 1\n"


def minigpt(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minigpt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "queue.yaml").write_text(QUEUE)
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    monkeypatch.setenv("MINIGPT_JOBS_URL", url)
    monkeypatch.chdir(tmp_path)
    return url


def test_a_jobs_whole_life(url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["jobs", "submit", "job.yaml", "--set", "priority=2"]) == 0
    assert capfd.readouterr().out == "job 1 queued\n"
    assert run(["jobs", "logs", "1"]) == 2
    assert "job 1 is queued and has not run yet" in capfd.readouterr().err
    assert run(["jobs", "nodes"]) == 0
    assert "no scheduler has served" in capfd.readouterr().out
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "minigpt", "jobs", "run", "queue.yaml"], stderr=subprocess.DEVNULL
    )
    try:
        followed = minigpt("jobs", "logs", "1", "--follow")
        assert sorted(followed.stdout.splitlines()) == [
            "[0] line one",
            "[0] rank 0 of 2",
            "[1] line one",
            "[1] rank 1 of 2",
        ]
        assert run(["jobs", "nodes", "--json"]) == 0
        nodes = json.loads(capfd.readouterr().out)
        assert nodes["scheduler"] and nodes["nodes"][0]["free"]["cpus"] == 2
        assert nodes["nodes"][0]["isolation"]
    finally:
        scheduler.send_signal(signal.SIGTERM)
        assert scheduler.wait(30) == 0
    assert run(["jobs", "logs", "1", "--rank", "1"]) == 0
    assert capfd.readouterr().out == "line one\nrank 1 of 2\n"
    assert run(["jobs", "show", "1", "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["state"] == "succeeded" and shown["config"]["workdir"] == str(tmp_path)
    assert [attempt["outcome"] for attempt in shown["attempts"]] == ["succeeded"]
    assert run(["jobs", "show", "1"]) == 0
    assert "2 x (0.5 cores, 0.5 GiB, 0 GPUs), priority 2" in capfd.readouterr().out
    assert run(["jobs", "list"]) == 0
    assert capfd.readouterr().out == "no jobs\n"
    assert run(["jobs", "list", "--all"]) == 0
    assert "succeeded" in capfd.readouterr().out


def test_the_scheduler_leaves_jobs_running_and_finds_them_again(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    slow = "command=[sh, -c, 'until [ -e go ]; do sleep 0.1; done; echo done > result']"
    assert run(["jobs", "submit", "job.yaml", "--set", slow, "--set", "workers=1"]) == 0
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "minigpt", "jobs", "run", "queue.yaml"], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while "running" not in capfd.readouterr().out:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        run(["jobs", "list"])
    os.kill(scheduler.pid, signal.SIGTERM)
    assert scheduler.wait(30) == 0
    (tmp_path / "go").touch()
    assert minigpt("jobs", "run", "queue.yaml", "--until-empty").returncode == 0
    capfd.readouterr()
    assert run(["jobs", "show", "1", "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["state"] == "succeeded" and shown["attempt"] == 1
    assert (tmp_path / "result").read_text() == "done\n"


def test_cancel(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    run(["jobs", "submit", "job.yaml"])
    assert run(["jobs", "cancel", "1"]) == 0
    assert "job 1 cancelled" in capfd.readouterr().out
    assert run(["jobs", "run", "queue.yaml", "--until-empty"]) == 0


def test_emit_and_simulate(url: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["jobs", "emit", "job.yaml", "--target", "slurm"]) == 0
    assert "#SBATCH --job-name=hello" in capfd.readouterr().out
    image = ["--site", "image=registry/minigpt:1"]
    assert run(["jobs", "emit", "job.yaml", "--target", "kueue", *image]) == 0
    assert "suspend: true" in capfd.readouterr().out
    assert run(["jobs", "simulate", "--set", "days=5", "--set", "seeds=3", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["simulated"] is True and 0.9 < result["effective"] < 1
    assert run(["jobs", "simulate", "--set", "days=5", "--set", "seeds=3"]) == 0
    assert "effective training time" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit"], "command is required"),
        (["submit", "job.yaml", "--set", "workers=0"], "workers = 0"),
        (["submit", "job.yaml", "--set", "nmae=x"], "did you mean 'name'"),
        (["submit", "job.yaml", "--set", "team=A B"], "team = 'A B'"),
        (["show", "7"], "no job 7 in this queue"),
        (["list", "--queue", "mysql://x"], "mysql is not supported"),
        (["run", "--set", "lease_seconds=1"], "must be at least 4 x poll_seconds"),
        (["simulate", "--set", "gpus=0"], "gpus = 0"),
    ],
)
def test_bad_input_is_one_line(
    url: str, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["jobs", *arguments]) == 2
    errors = capfd.readouterr().err
    assert message in errors and errors.count("\n") == 1
