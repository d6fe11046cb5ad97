from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minigpt.train.trackers import BackgroundTracker, Line, TensorBoardTracker, make_tracker


class _Recorder:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.status = ""

    def log(self, lines: Sequence[Line]) -> None:
        self.steps += [line["step"] for line in lines]

    def close(self, status: str) -> None:
        self.status = status


class _Stuck(_Recorder):
    """A tracker whose server does not answer until told to."""

    def __init__(self) -> None:
        super().__init__()
        self.release = threading.Event()

    def log(self, lines: Sequence[Line]) -> None:
        self.release.wait(60)
        super().log(lines)


class _Broken(_Recorder):
    def log(self, lines: Sequence[Line]) -> None:
        raise ConnectionError("no route to host")


def _line(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 2.5, "loss_hex": (2.5).hex()}


def test_every_line_arrives_in_order() -> None:
    recorder = _Recorder()
    tracker = BackgroundTracker({"recorder": lambda: recorder})
    for step in range(100):
        tracker.log(_line(step))
    tracker.close("finished")
    assert recorder.steps == list(range(100))
    assert recorder.status == "finished"
    assert tracker.dropped == 0


def test_a_stuck_tracker_blocks_nobody_and_drops_are_counted() -> None:
    stuck = _Stuck()
    tracker = BackgroundTracker({"stuck": lambda: stuck})
    begin = time.perf_counter()
    for step in range(10_000):
        tracker.log(_line(step))
    tracker.close("interrupted", seconds=0.05)
    assert time.perf_counter() - begin < 3
    assert tracker.dropped >= 10_000 - 2 * 4096
    stuck.release.set()


def test_a_broken_tracker_is_switched_off_and_the_others_go_on(
    capfd: pytest.CaptureFixture[str],
) -> None:
    recorder = _Recorder()

    def missing() -> _Recorder:
        raise ModuleNotFoundError("No module named 'nowhere'")

    tracker = BackgroundTracker(
        {"missing": missing, "broken": _Broken, "recorder": lambda: recorder}
    )
    tracker.log(_line(1))
    tracker.log(_line(2))
    tracker.close("finished")
    assert recorder.steps == [1, 2]
    captured = capfd.readouterr()
    for reason in ("nowhere", "no route to host"):
        assert (captured.out + captured.err).count(reason) == 1


def test_mlflow_gets_parameters_metrics_and_status(make_config: Any, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = make_config(trackers={"mlflow": True, "mlflow_uri": uri, "experiment": "tests"})
    for status, steps in (("interrupted", (1, 2)), ("finished", (3,))):
        tracker = make_tracker(config, tmp_path)
        for step in steps:
            tracker.log(_line(step))
        tracker.close(status, seconds=60)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])  # the second start continued it
    assert run.info.status == "FINISHED"
    assert run.data.params["batch.sequence_length"] == "64"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.5), (2, 2.5), (3, 2.5)]


def test_tensorboard_gets_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = TensorBoardTracker(tmp_path)
    tracker.log([_line(1), _line(2)])
    tracker.close("finished")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
