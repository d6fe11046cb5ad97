"""Runs stopped in every way, resumed, and the same to the last bit."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.train.runs import WatchingClock, exact_result, logged_steps, signal_when

from minigpt.core.artifact import Artifact, create_artifact
from minigpt.core.errors import ArtifactError
from minigpt.train.checkpoint import CheckpointStore
from minigpt.train.config import TrainConfig
from minigpt.train.interrupt import TrainingInterruptedError
from minigpt.train.run import train

ConfigFactory = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    ("signum", "code", "after", "precision"),
    [(signal.SIGTERM, 143, 6, "float32"), (signal.SIGINT, 130, 8, "bfloat16")],
)
def test_signals_save_and_the_resumed_run_is_the_same(
    make_config: ConfigFactory,
    dataset: Artifact,
    tmp_path: Path,
    signum: int,
    code: int,
    after: int,
    precision: str,
) -> None:
    config = make_config(precision=precision)
    train(config, dataset, tmp_path / "whole")
    run = tmp_path / "stopped"
    for goal in (after, after + 1):
        clock = signal_when(lambda goal=goal: logged_steps(run) >= goal, signum)  # type: ignore[misc]
        with pytest.raises(TrainingInterruptedError) as caught:
            train(config, dataset, run, clock=clock)
        assert caught.value.exit_code == code
        assert CheckpointStore(run / "checkpoints", keep=2).steps()[-1] == goal
    train(config, dataset, run)
    assert exact_result(run) == exact_result(tmp_path / "whole")


def test_a_validation_is_logged_once_though_its_step_was_resumed_twice(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    config, run = make_config(), tmp_path / "run"
    train(config, dataset, tmp_path / "whole")
    readings: list[None] = []

    def at_the_end_of_step_8() -> bool:
        if logged_steps(run) == 7:
            readings.append(None)
        return len(readings) == 2

    with pytest.raises(TrainingInterruptedError):  # saved at step 8, before its validation
        clock = signal_when(at_the_end_of_step_8, signal.SIGTERM)
        train(config, dataset, run, clock=clock)
    assert '"validation", "step": 8' not in (run / "events.jsonl").read_text()

    def abort() -> None:
        if logged_steps(run) >= 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # validated, and dead before the next save
        train(config, dataset, run, clock=WatchingClock(abort))
    train(config, dataset, run)
    assert exact_result(run) == exact_result(tmp_path / "whole")


def test_a_corrupt_checkpoint_costs_only_the_steps_since_the_one_before(
    make_config: ConfigFactory,
    dataset: Artifact,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = make_config()
    train(config, dataset, tmp_path / "whole")
    run = tmp_path / "run"
    with pytest.raises(TrainingInterruptedError):
        clock = signal_when(lambda: logged_steps(run) >= 10, signal.SIGTERM)
        train(config, dataset, run, clock=clock)
    damaged = run / "checkpoints" / "step-00000010" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    train(config, dataset, run)
    captured = capfd.readouterr()
    assert str(damaged) in captured.out + captured.err
    assert exact_result(run) == exact_result(tmp_path / "whole")


def test_another_dataset_is_refused(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingInterruptedError):
        clock = signal_when(lambda: logged_steps(run) >= 2, signal.SIGTERM)
        train(make_config(), dataset, run, clock=clock)
    with create_artifact(tmp_path / "other", kind="dataset") as draft:
        for file in dataset.path.rglob("*"):
            if file.is_file() and file.name != "manifest.json":
                target = draft.path / file.relative_to(dataset.path)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(file.read_bytes())
        (draft.path / "more").write_text("x")
    assert draft.artifact is not None
    with pytest.raises(ArtifactError, match="not the dataset"):
        train(make_config(), draft.artifact, run)
