"""What a run tells: its metrics and events files, trackers, the display and the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minigpt.core.errors import StorageError
from minigpt.core.job_status import report_saved
from minigpt.core.telemetry import get_logger
from minigpt.train.checkpoint import TrainState
from minigpt.train.config import TrainConfig
from minigpt.train.context import Outputs, Speedometer
from minigpt.train.goodput import progress_share
from minigpt.train.metrics import MetricsLog
from minigpt.train.step import StepResult

_SPEED_SMOOTHING = 0.95
_WARMUP_STEPS = 3


class Reporter:
    """Writes lines; never fails a run over them."""

    def __init__(
        self, config: TrainConfig, outputs: Outputs, speedometer: Speedometer, train_tokens: int
    ) -> None:
        """Report a resolved config's run over a split of `train_tokens`."""
        assert isinstance(config.optimizer.lr, float) and isinstance(config.steps, int)
        assert isinstance(config.batch.tokens_per_step, int)
        self._lr, self._steps = config.optimizer.lr, config.steps
        self._tokens_per_step = config.batch.tokens_per_step
        self._train_tokens = train_tokens
        self._out = outputs
        self._speedometer = speedometer
        self._log = get_logger("train")
        self._measured = 0
        self._smooth_seconds = 0.0

    def step(
        self,
        state: TrainState,
        result: StepResult,
        *,
        factor: float,
        seconds: float,
        skipped: bool,
        phases: Mapping[str, float],
    ) -> None:
        """Report a finished step.

        Args:
            state: After the step.
            result: Its numbers.
            factor: Of the peak learning rate.
            seconds: Its duration.
            skipped: Whether the weights were left as they were.
            phases: Seconds of this process by phase, up to now.
        """
        speed = self._tokens_per_step / max(seconds, 1e-9)
        line = {
            "kind": "train",
            "step": state.step,
            "loss": result.loss,
            "loss_hex": result.loss.hex(),
            "grad_norm": result.grad_norm,
            **result.metrics,
            "lr": self._lr * factor,
            "tokens": state.tokens,
            "epoch": state.tokens / self._train_tokens,
            "seconds": seconds,
            "tokens_per_second": speed,
            "mfu": self._speedometer.mfu(speed),
            "goodput": progress_share(phases),
        }
        if skipped:
            line["skipped"] = True
        self._write(self._out.metrics, line)
        self._out.display.step(line, self._seconds_left(state.step, seconds))

    def event(self, kind: str, step: int, **fields: Any) -> dict[str, Any]:
        """Write a line of `events.jsonl` and return it."""
        line = {"kind": kind, "step": step, **fields}
        self._write(self._out.events, line)
        return line

    def alarm(self, kind: str, step: int, **fields: Any) -> None:
        """Write an event of which a person should hear, to the log as well."""
        self.event(kind, step, **fields)
        shown = {key: value for key, value in fields.items() if key != "phases"}
        self._log.warning(kind, step=step, **shown)

    def saved(self, every: int, seconds: float) -> None:
        """Tell the job queue above, if there is one, what an eviction would lose.

        Args:
            every: Steps to the next save; 0 is only at the end.
            seconds: What a save takes.
        """
        safe_in = every * self._smooth_seconds + seconds if every else None
        try:
            report_saved(safe_to_evict_in=safe_in)
        except StorageError as error:
            self._log.warning("the job's status can't be written", reason=str(error))

    def _seconds_left(self, step: int, seconds: float) -> float:
        """Estimate from the steps so far; the first few, which compile, are forgotten."""
        self._measured += 1
        keep = _SPEED_SMOOTHING if self._measured > _WARMUP_STEPS else 0.0
        self._smooth_seconds = keep * self._smooth_seconds + (1 - keep) * seconds
        return (self._steps - step) * self._smooth_seconds

    def _write(self, log: MetricsLog, line: Mapping[str, Any]) -> None:
        if not log.append(line):
            self._log.warning(f"{log.path.name} can't be written; its lines are kept for later")
        self._out.tracker.log(line)
