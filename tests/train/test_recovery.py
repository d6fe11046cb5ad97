"""Real ranks that are killed, stopped, blocked and spoiled, and the bits that come out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigpt.core.config import to_yaml
from minigpt.train.account import account_for
from minigpt.train.chaos_storage import BUCKET, ChaosStorage
from minigpt.train.config import TrainConfig
from minigpt.train.metrics import read_metrics
from minigpt.train.run import read_final

ConfigFactory = Callable[..., TrainConfig]
BASE = {"backoff_seconds": 0.1, "restarts_per_hour": 20, "check_every": 0}


def _start(
    config: TrainConfig, run_dir: Path, faults: str = "", **environment: str
) -> subprocess.Popen[str]:
    recipe = run_dir.with_name(f"{run_dir.name}.yaml")
    recipe.write_text(to_yaml(config))
    command = [sys.executable, "-m", "minigpt", "train", str(recipe), "--run-dir", str(run_dir)]
    return subprocess.Popen(
        [*command, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MINIGPT_FAULTS": faults} | environment,
    )


def _finish(process: subprocess.Popen[str]) -> str:
    try:
        _, errors = process.communicate(timeout=600)  # seven starts on a busy machine
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return errors


def _events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir / "events.jsonl") if line["kind"] == kind]


def _bits(run_dir: Path) -> dict[str, Any]:
    final = read_final(run_dir)
    lines = list(read_metrics(run_dir / "metrics.jsonl"))
    return {
        "losses": [(line["step"], line["loss_hex"], line["grad_norm"]) for line in lines],
        "weights": final["weights_sha256"],
        "validation": [
            (line["step"], line["bits_per_byte"]) for line in _events(run_dir, "validation")
        ],
    }


def _logged(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _wait(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def recipe(tiny_dataset: Path) -> ConfigFactory:
    def make(*, ranks: int = 2, **recovery: Any) -> TrainConfig:
        tree = {
            "name": "test",
            "data": str(tiny_dataset),
            "size": 2,
            "model": {"hidden_size": 32, "head_dim": 16},
            "steps": 24,
            "batch": {"sequence_length": 64, "tokens_per_step": 1024, "micro_batch_size": 4},
            "validation": {"every": 8, "tokens": 1024, "sample_tokens": 4},
            "checkpoint": {"every": 4},
            "trackers": {"mlflow": False},
            "precision": "float32",
            "compile": False,
            "threads": 1,
            "mesh": {"dp": ranks},
            "recovery": BASE | recovery,
        }
        return TrainConfig.model_validate(tree)

    return make


@pytest.fixture(scope="module")
def whole(recipe: ConfigFactory, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The bits of the unbroken run with two ranks."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    _finish(_start(recipe(), run_dir))
    return _bits(run_dir)


@pytest.mark.timeout(900)
def test_kill_9_of_any_rank_anywhere_changes_no_bit(
    recipe: ConfigFactory, whole: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    kills = [(1, 5, "forward"), (0, 9, "backward"), (1, 13, "reduce")]
    kills += [(1, 15, "validate"), (0, 19, "save"), (1, 22, "update")]
    faults = ";".join(f"kill:rank={r},step={s},phase={p}" for r, s, p in kills)
    began = time.time()
    errors = _finish(_start(recipe(), run, faults))
    wall = time.time() - began
    assert _bits(run) == whole
    failures = _events(run, "failure")
    assert [(f["ranks"], f["phase"]) for f in failures] == [([r], p) for r, _, p in kills]
    assert all(failure["cause"] == "killed by SIGKILL" for failure in failures)
    assert "rank 1: killed by SIGKILL (in forward of step 6)" in errors
    assert len(_events(run, "recovered")) == len(kills)
    account = account_for(run, price_per_device_hour=3.6)
    assert account["failures"] == len(kills) and account["sessions"] == len(kills) + 1
    assert abs(account["unaccounted"]) < 0.01
    # The outer clock also sees processes that start up and wind down, which takes seconds where
    # the machine is busy; what lies between is accounted for.
    assert 0.9 * wall - 1.5 <= sum(account["seconds"].values()) <= wall + 0.1
    assert account["seconds"]["lost_work"] > 0 and account["seconds"]["restart"] > 1
    assert account["cost"]["total"] == pytest.approx(account["device_hours"] * 3.6)


def test_a_stopped_and_a_blocked_rank_are_named_and_replaced(
    recipe: ConfigFactory, whole: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    faults = "stop:rank=1,step=5,phase=forward;hang:rank=0,step=13,phase=backward"
    _finish(_start(recipe(hang_seconds=5.0, hang_factor=2.0), run, faults))
    assert _bits(run) == whole
    first, second = (_events(run, "hang"))[:2]
    assert first["ranks"] == [1] and first["states"]["1"] == "T"
    assert second["ranks"] == [0] and second["states"]["0"] != "T"
    assert "faults.py" in second["stacks"]["0"]  # where it is blocked
    assert second["stacks"]["1"] and "faults.py" not in second["stacks"]["1"]


def test_spoiled_numbers_on_one_rank_leave_no_trace(
    recipe: ConfigFactory, whole: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    faults = (
        "nan:rank=1,step=6,phase=reduce,micro_batch=1;flip:rank=1,step=10;"
        "slow:rank=0,step=17,seconds=0.3,times=6"
    )
    _finish(_start(recipe(check_every=2, straggler_ratio=2.0), run, faults))
    assert _bits(run) == whole
    anomaly = _events(run, "anomaly")[0]
    assert (anomaly["step"], anomaly["verdict"], anomaly["action"]) == (7, "not_finite", "retry")
    assert anomaly["ranks"] == [1]
    assert _events(run, "divergence")[0]["ranks"] == [0, 1]
    assert _events(run, "rollback")[0]["to"] == 8
    assert [0] in [line["ranks"] for line in _events(run, "straggler")]
    assert not _events(run, "failure")


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_the_last_step_though_a_rank_is_blocked_in_c(
    recipe: ConfigFactory, whole: dict[str, Any], tmp_path: Path, ranks: int
) -> None:
    run, config = tmp_path / "run", recipe(ranks=ranks, grace_seconds=20.0)
    blocked = f"hang:rank={ranks - 1},step=6,phase=backward"
    process = _start(config, run, blocked)
    _wait(lambda: _logged(run) >= 6, process)
    time.sleep(1.0)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert time.monotonic() - began < 20
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert saved[-1] == "step-00000006"
    assert _events(run, "session_end")[-1]["status"] == "interrupted"
    _finish(_start(config, run, blocked))
    if ranks == 2:
        assert _bits(run) == whole
    assert [step for step, *_ in _bits(run)["losses"]] == list(range(1, 25))


def test_a_rank_that_gets_the_signal_alone_stops_all(
    recipe: ConfigFactory, whole: dict[str, Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = _start(recipe(), run, "term:rank=1,step=6,phase=forward")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143, errors
    assert "saved" in errors.strip().splitlines()[-1]
    _finish(_start(recipe(), run))
    assert _bits(run) == whole


def test_the_budget_ends_a_run_that_fails_again_and_again(
    recipe: ConfigFactory, tmp_path: Path
) -> None:
    faults = "kill:rank=1,step=2,phase=forward;kill:rank=1,step=3,phase=forward"
    process = _start(recipe(restarts_per_hour=1), tmp_path / "run", faults)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    last = errors.strip().splitlines()[-1]
    assert "rank 1: killed by SIGKILL" in last and "restarts_per_hour = 1" in last


def test_an_error_that_a_restart_cannot_mend_is_told_once(
    recipe: ConfigFactory, tmp_path: Path
) -> None:
    config = recipe().replace(batch=recipe().batch.replace(tokens_per_step=64 * 4 * 3))
    process = _start(config, tmp_path / "run")
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "is not a multiple of data ranks" in errors.strip().splitlines()[-1]
    assert "restarting" not in errors


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_rank_killed_while_s3_is_lost_waits_for_it(
    recipe: ConfigFactory, whole: dict[str, Any], tmp_path: Path
) -> None:
    storage, run = ChaosStorage(), tmp_path / "run"
    try:
        checkpoint = {"every": 4, "url": f"s3://{BUCKET}/run"}
        config = TrainConfig.model_validate(recipe().model_dump() | {"checkpoint": checkpoint})
        faults = "slow:rank=0,seconds=0.25,times=1000;kill:rank=1,step=10,phase=backward"
        process = _start(config, run, faults, **storage.environment)
        _wait(lambda: bool(_events(run, "checkpoint")), process)
        storage.link.cut()
        _wait(lambda: len(_events(run, "failure")) > 1, process)
        storage.link.mend()
        _finish(process)
    finally:
        storage.close()
    assert _bits(run) == whole
    killed, *lost = _events(run, "failure")
    assert killed["cause"] == "killed by SIGKILL"
    assert lost and all("s3://chaos/run" in failure["cause"] for failure in lost)
    assert _events(run, "save_missed")[0]["step"] == 8
    assert _events(run, "session")[-1]["step"] == 4  # all that was safe when it was killed


@pytest.mark.soak
def test_storage_that_was_never_there_ends_the_run_at_once(
    recipe: ConfigFactory, tmp_path: Path, free_port: int
) -> None:
    checkpoint = {"every": 4, "url": "s3://nowhere/run"}
    config = TrainConfig.model_validate(recipe().model_dump() | {"checkpoint": checkpoint})
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nobody",
        "AWS_MAX_ATTEMPTS": "1",
    }
    process = _start(config, tmp_path / "run", **environment)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "s3://nowhere/run" in errors.strip().splitlines()[-1]
    assert "restarting" not in errors


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_under_torchrun_a_killed_rank_is_restarted_by_the_agent(
    recipe: ConfigFactory, whole: dict[str, Any], tmp_path: Path
) -> None:
    run, path = tmp_path / "run", tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe()))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", "3", "--standalone", "-m", "minigpt", "train", str(path)]
    done = subprocess.run(
        [*launcher, "--run-dir", str(run), "--json"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "MINIGPT_FAULTS": "kill:rank=1,step=9,phase=backward"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1])["steps"] == 24
    assert _bits(run) == whole
