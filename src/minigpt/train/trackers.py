"""Experiment trackers behind one small interface, off the training thread.

`BackgroundTracker` takes lines from the loop into a bounded queue and hands them to the
trackers on a thread of its own: a slow, broken or missing tracker costs the step nothing, and
at worst loses lines, which are counted.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from minigpt.core.storage import home, write_atomic
from minigpt.core.telemetry import get_logger
from minigpt.train.config import TrainConfig

_QUEUE_LINES = 4096
_CLOSE_SECONDS = 10.0
_DEFAULT_EXPERIMENT = "minigpt"

Line = Mapping[str, Any]
T = TypeVar("T")


class Tracker(Protocol):
    """Where metrics go. Called from one thread; may block and may raise."""

    def log(self, lines: Sequence[Line]) -> None:
        """Record metrics lines, each with a `step`."""
        ...

    def close(self, status: str) -> None:
        """End the run; status is "finished", "interrupted" or "failed"."""
        ...


class BackgroundTracker:
    """Feeds trackers from a thread; `log` never blocks and never raises."""

    def __init__(self, factories: Mapping[str, Callable[[], Tracker]]) -> None:
        """Start the thread, on which each factory is called."""
        self.dropped = 0
        self._queue: queue.Queue[Line | None] = queue.Queue(_QUEUE_LINES)
        self._status = "failed"
        self._log = get_logger("train")
        self._thread = threading.Thread(
            target=self._work, args=(dict(factories),), name="trackers", daemon=True
        )
        if factories:
            self._thread.start()

    def log(self, line: Line) -> None:
        """Hand over a metrics line, or count it as dropped where the queue is full."""
        if not self._thread.is_alive():
            return
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def close(self, status: str, seconds: float = _CLOSE_SECONDS) -> None:
        """Let the trackers finish what is queued, for at most `seconds`."""
        if self._thread.is_alive():
            self._status = status
            with suppress(queue.Full):
                self._queue.put(None, timeout=seconds)
            self._thread.join(seconds)
            if self._thread.is_alive():
                self._log.warning("trackers did not finish in time", seconds=seconds)
        if self.dropped:
            self._log.warning("trackers were too slow: lines dropped", lines=self.dropped)

    def _work(self, factories: dict[str, Callable[[], Tracker]]) -> None:
        made = {name: self._guard(name, factory) for name, factory in factories.items()}
        trackers = {name: tracker for name, tracker in made.items() if tracker is not None}
        ended = False
        while not ended:
            lines, ended = self._take_all()
            for name, tracker in list(trackers.items()):
                if self._guard(name, partial(self._deliver, tracker, lines)) is None:
                    del trackers[name]
        for name, tracker in trackers.items():
            self._guard(name, partial(tracker.close, self._status))

    def _take_all(self) -> tuple[list[Line], bool]:
        """Wait for a line, then take what else is queued; say whether the end is among it."""
        taken = [self._queue.get()]
        with suppress(queue.Empty):
            while True:
                taken.append(self._queue.get_nowait())
        return [line for line in taken if line is not None], None in taken

    @staticmethod
    def _deliver(tracker: Tracker, lines: Sequence[Line]) -> bool:
        tracker.log(lines)
        return True

    def _guard(self, name: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except Exception as error:  # whatever a tracker raises, training goes on
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._log.warning("tracker switched off", tracker=name, reason=reason)
            return None


def make_tracker(config: TrainConfig, run_dir: Path) -> BackgroundTracker:
    """Start the trackers that the config asks for; a resumed run continues its records."""
    factories: dict[str, Callable[[], Tracker]] = {}
    if config.trackers.mlflow:
        factories["mlflow"] = lambda: MlflowTracker(config, run_dir)
    if config.trackers.tensorboard:
        factories["tensorboard"] = lambda: TensorBoardTracker(run_dir / "tensorboard")
    if config.trackers.wandb:
        factories["wandb"] = lambda: WandbTracker(config, run_dir)
    return BackgroundTracker(factories)


class MlflowTracker:
    """One MLflow run per training run; its id is kept in the run directory."""

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        import logging

        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        uri = config.trackers.mlflow_uri
        if not uri:
            home().mkdir(parents=True, exist_ok=True)
            uri = f"sqlite:///{home() / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        saved = run_dir / "mlflow.json"
        known = json.loads(saved.read_text()) if saved.exists() else {}
        if known.get("uri") == uri:
            self._run = known["run_id"]
            self._client.update_run(self._run, status="RUNNING")
            return
        name = config.trackers.experiment or _DEFAULT_EXPERIMENT
        experiment = self._client.get_experiment_by_name(name)
        identifier = (
            experiment.experiment_id if experiment else self._client.create_experiment(name)
        )
        run = self._client.create_run(identifier, run_name=config.name)
        self._run = run.info.run_id
        write_atomic(saved, json.dumps({"uri": uri, "run_id": self._run}).encode())
        for key, value in flatten(config.model_dump(mode="json")).items():
            self._client.log_param(self._run, key, str(value)[:500])

    def log(self, lines: Sequence[Line]) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(f"{prefix}{key}", value, now, line["step"])
            for line in lines
            for prefix, key, value in _numbers(line)
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run, metrics=metrics[start : start + 1000])

    def close(self, status: str) -> None:
        states = {"finished": "FINISHED", "interrupted": "KILLED"}
        self._client.set_terminated(self._run, status=states.get(status, "FAILED"))


class TensorBoardTracker:
    """Event files below the run directory."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory))

    def log(self, lines: Sequence[Line]) -> None:
        for line in lines:
            for prefix, key, value in _numbers(line):
                self._writer.add_scalar(f"{prefix}{key}", value, line["step"])
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run, offline unless asked otherwise."""

    def __init__(self, config: TrainConfig, run_dir: Path) -> None:
        import wandb

        saved = run_dir / "wandb.json"
        run_id = json.loads(saved.read_text())["run_id"] if saved.exists() else None
        self._run: Any = wandb.init(
            project=config.trackers.experiment or _DEFAULT_EXPERIMENT,
            name=config.name,
            id=run_id,
            resume="allow",
            mode=config.trackers.wandb_mode,
            settings=wandb.Settings(silent=True),
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
        )
        write_atomic(saved, json.dumps({"run_id": self._run.id}).encode())

    def log(self, lines: Sequence[Line]) -> None:
        for line in lines:
            self._run.log({f"{p}{k}": v for p, k, v in _numbers(line)} | {"step": line["step"]})

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping's leaves by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _numbers(line: Line) -> list[tuple[str, str, float]]:
    prefix = f"{line['kind']}/"
    return [
        (prefix, key, float(value))
        for key, value in line.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    ]
