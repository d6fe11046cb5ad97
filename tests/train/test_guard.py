"""Runs whose numbers go bad: tried again, skipped, rolled back, stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.train.runs import events_of, exact_result, logged_steps, signal_when

from minigpt.core.artifact import Artifact, open_artifact
from minigpt.core.errors import TrainingError
from minigpt.data.skip_list import SKIP_FILE, SkipList
from minigpt.train.checkpoint import CheckpointStore
from minigpt.train.config import TrainConfig
from minigpt.train.interrupt import TrainingInterruptedError
from minigpt.train.metrics import read_metrics
from minigpt.train.run import train

ConfigFactory = Callable[..., TrainConfig]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    run, config = tmp_path / "run", make_config(recovery={"on_anomaly": "stop"})
    with pytest.raises(TrainingInterruptedError):
        clock = signal_when(lambda: logged_steps(run) >= 6, signal.SIGTERM)
        train(config, dataset, run, clock=clock)
    store = CheckpointStore(run / "checkpoints", keep=2)
    found = store.load_latest()
    assert found is not None
    found.model["model.norm.weight"][0] = float("inf")
    store.path(6).rename(tmp_path / "before")
    store.save(found.state, model=found.model, optimizer=found.optimizer, parents=[dataset])
    with pytest.raises(TrainingError, match=r"step 7: loss is nan.*next_sample.*48"):
        train(config, dataset, run)
    assert store.steps() == [4, 6]
    assert logged_steps(run) == 6


def test_a_fault_in_a_gradient_that_passes_leaves_no_trace(
    make_config: ConfigFactory,
    dataset: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(make_config(), dataset, tmp_path / "whole")
    monkeypatch.setenv("MINIGPT_FAULTS", "nan:step=5,phase=reduce")
    train(make_config(), dataset, tmp_path / "run")
    assert exact_result(tmp_path / "run") == exact_result(tmp_path / "whole")
    assert [line["action"] for line in events_of(tmp_path / "run", "anomaly")] == ["retry"]


def test_a_fault_that_stays_is_skipped_then_its_data_is_never_used_again(
    make_config: ConfigFactory,
    dataset: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, config = tmp_path / "run", make_config(recovery={"max_skips": 1})
    # Steps 6 and 7: each computed twice; the last of the four is one too many to skip.
    monkeypatch.setenv("MINIGPT_FAULTS", "nan:step=5,phase=reduce,times=4")
    train(config, dataset, run)
    assert [x["action"] for x in events_of(run, "anomaly")] == [
        "retry",
        "skip",
        "retry",
        "roll back",
    ]
    rollback = events_of(run, "rollback")[0]
    assert (rollback["step"], rollback["to"]) == (7, 4)
    skips = SkipList.read(run / SKIP_FILE).samples
    assert [(skip.first, skip.count) for skip in skips] == [(5 * 8, 2 * 8)]
    assert open_artifact(run / "model").manifest.metrics["skipped_samples"] == 16
    result = exact_result(run)
    assert result["steps_logged"] == list(range(1, 13)) and "nan" not in result["hex"]
    monkeypatch.delenv("MINIGPT_FAULTS")
    train(make_config(), dataset, tmp_path / "whole")
    whole = exact_result(tmp_path / "whole")
    assert result["hex"][:5] == whole["hex"][:5] and result["hex"][5] != whole["hex"][5]
    # A run that had the record from the beginning is the same, through a kill as well.
    again = tmp_path / "again"
    again.mkdir()
    (again / SKIP_FILE).write_bytes((run / SKIP_FILE).read_bytes())
    with pytest.raises(TrainingInterruptedError):
        clock = signal_when(lambda: logged_steps(again) >= 6, signal.SIGTERM)
        train(config, dataset, again, clock=clock)
    train(config, dataset, again)
    assert exact_result(again)["hex"] == result["hex"]


def test_a_skipped_step_is_skipped_again_after_a_resume_and_anomalies_have_a_limit(
    make_config: ConfigFactory,
    dataset: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, config = tmp_path / "run", make_config(recovery={"max_skips": 2, "max_rollbacks": 1})
    monkeypatch.setenv("MINIGPT_FAULTS", "nan:step=5,phase=reduce,times=1000")
    with pytest.raises(TrainingError, match=r"step 8 after 1 rollbacks.*gradient's norm is nan"):
        train(config, dataset, run)
    lines = list(read_metrics(run / "metrics.jsonl"))
    assert [line["step"] for line in lines if line.get("skipped")] == [6, 7]
    assert CheckpointStore(run / "checkpoints", keep=2).steps() == [4]
    for mark in (run / "ranks" / "struck").iterdir():  # so that it strikes once more
        mark.unlink()
    with pytest.raises(TrainingError, match="after 1 rollbacks"):  # the limit is the run's
        train(config, dataset, run)
