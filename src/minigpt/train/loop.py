"""The training loop: step, validate, save, until done or asked to stop.

Each of the three happens at most once a step and its completion is part of the saved state,
so that a resumed run takes up exactly what the killed one had not finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from minigpt.core.artifact import Artifact
from minigpt.core.clock import Clock
from minigpt.core.errors import StorageError, TrainingError
from minigpt.core.manifest import Parent
from minigpt.core.telemetry import get_logger
from minigpt.model.lora import trained_state
from minigpt.train.build import Build
from minigpt.train.checkpoint import CheckpointStore, TrainState
from minigpt.train.config import TrainConfig
from minigpt.train.display import Display
from minigpt.train.interrupt import StopRequest, TrainingInterruptedError
from minigpt.train.metrics import MetricsLog
from minigpt.train.schedule import learning_rate_factor
from minigpt.train.step import NonFiniteError, StepResult
from minigpt.train.trackers import BackgroundTracker

_SPEED_SMOOTHING = 0.95
_WARMUP_STEPS = 3


@dataclass(frozen=True)
class Speedometer:
    """What turns seconds into MFU."""

    flops_per_token: float
    peak_flops: float

    def mfu(self, tokens_per_second: float) -> float:
        """Return the share of the measured peak that the model's own FLOPs reach."""
        return self.flops_per_token * tokens_per_second / self.peak_flops


@dataclass(frozen=True)
class Outputs:
    """Where the loop's results go."""

    store: CheckpointStore
    metrics: MetricsLog
    """A line a training step."""
    events: MetricsLog
    """Validations and checkpoints."""
    tracker: BackgroundTracker
    display: Display


class TrainLoop:
    """Runs a resolved config from `state` to its last step."""

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        parts: Build,
        outputs: Outputs,
        speedometer: Speedometer,
        parents: Sequence[Artifact | Parent],
        clock: Clock,
    ) -> None:
        assert isinstance(config.steps, int)
        assert isinstance(config.batch.tokens_per_step, int)
        self.state = state
        self._config = config
        self._steps = config.steps
        self._parts = parts
        self._out = outputs
        self._speedometer = speedometer
        self._parents = parents
        self._clock = clock
        self._log = get_logger("train")
        self._saved_step = state.step
        self._measured = 0
        self._smooth_seconds = 0.0
        self._tokens_per_step = config.batch.tokens_per_step
        rows = parts.loader.batch_size * parts.loader.sequence_length
        self._accumulation = self._tokens_per_step // rows

    def run(self) -> Artifact:
        """Train to the end; return the last step's checkpoint.

        Raises:
            TrainingInterruptedError: A signal asked to stop; the state is saved.
            TrainingError: Loss or gradient is not finite; the last checkpoint is kept.
            StorageError: The last checkpoint could not be written.
        """
        self._out.display.begin(self.state.step, self._steps)
        try:
            with StopRequest() as stop:
                return self._run(stop)
        finally:
            self._out.display.end()

    def _run(self, stop: StopRequest) -> Artifact:
        while True:
            if self._is_due(self._config.validation.every, self.state.validated_step):
                if stop.requested:
                    self._stop(stop)
                self._validate()
            if self.state.step == self._steps:
                return self._final_checkpoint()
            if self._is_due(self._config.checkpoint.every, self._saved_step):
                self._try_save()
            if stop.requested or not self._train_step(stop):
                self._stop(stop)

    def _is_due(self, every: Any, done_at: int) -> bool:
        step = self.state.step
        on_schedule = (every > 0 and step % every == 0) or step == self._steps
        return step > 0 and on_schedule and done_at != step

    def _train_step(self, stop: StopRequest) -> bool:
        """Do one update; return False where a stop came first and nothing has changed."""
        begin = self._clock.monotonic()
        cursor = self._parts.loader.state()
        factor = learning_rate_factor(self._config.schedule, self.state.step, self._steps)
        try:
            batches = [self._parts.loader.next_batch() for _ in range(self._accumulation)]
            result = self._parts.step.run(batches, factor, lambda: stop.requested)
        except NonFiniteError as error:
            raise TrainingError(
                f"step {self.state.step + 1}: {error}; data cursor {cursor}; "
                f"the checkpoint of step {self._saved_step} is kept",
                remedy="lower the learning rate or raise schedule.warmup_steps in a new run",
            ) from None
        if result is None:
            self._parts.loader.load_state(cursor)
            return False
        self.state.step += 1
        self.state.tokens += self._tokens_per_step
        self.state.cursor = self._parts.loader.state()
        self.state.loss = result.loss
        self._report_step(result, factor, self._clock.monotonic() - begin)
        return True

    def _report_step(self, result: StepResult, factor: float, seconds: float) -> None:
        speed = self._tokens_per_step / max(seconds, 1e-9)
        assert isinstance(self._config.optimizer.lr, float)
        line = {
            "kind": "train",
            "step": self.state.step,
            "loss": result.loss,
            "loss_hex": result.loss.hex(),
            "grad_norm": result.grad_norm,
            **result.metrics,
            "lr": self._config.optimizer.lr * factor,
            "tokens": self.state.tokens,
            "epoch": self.state.tokens / self._parts.loader.dataset.num_tokens,
            "seconds": seconds,
            "tokens_per_second": speed,
            "mfu": self._speedometer.mfu(speed),
        }
        self._write_line(self._out.metrics, line)
        self._out.display.step(line, self._seconds_left(seconds))

    def _seconds_left(self, seconds: float) -> float:
        """Estimate from the steps so far; the first few, which compile, are forgotten."""
        self._measured += 1
        keep = _SPEED_SMOOTHING if self._measured > _WARMUP_STEPS else 0.0
        self._smooth_seconds = keep * self._smooth_seconds + (1 - keep) * seconds
        return (self._steps - self.state.step) * self._smooth_seconds

    def _validate(self) -> None:
        begin = self._clock.monotonic()
        result = self._parts.validator.score(self._parts.model)
        self.state.validated_step = self.state.step
        if result is None:
            return
        self.state.validation = asdict(result)
        if self._saved_step == self.state.step:  # saved by a stop before it was validated
            self.state = self._with_best()
        line = {
            "kind": "validation",
            "step": self.state.step,
            **asdict(result),
            "seconds": self._clock.monotonic() - begin,
        }
        self._write_line(self._out.events, line)
        sample = self._parts.validator.sample(self._parts.model, self.state.step)
        self._out.display.validation(line, sample)

    def _write_line(self, log: MetricsLog, line: Mapping[str, Any]) -> None:
        if not log.append(line):
            self._log.warning(f"{log.path.name} can't be written; its lines are kept for later")
        self._out.tracker.log(line)

    def _save(self) -> Artifact:
        begin = self._clock.monotonic()
        # First the lines, then the checkpoint that claims they are there.
        self._out.metrics.flush()
        self._out.events.flush()
        checkpoint = self._out.store.save(
            self._with_best(),
            model=trained_state(self._parts.model),
            optimizer=self._parts.optimizer.state_dict(),
            parents=self._parents,
        )
        self.state = self._with_best()
        self._saved_step = self.state.step
        seconds = self._clock.monotonic() - begin
        line = {"kind": "checkpoint", "step": self.state.step, "seconds": seconds}
        self._write_line(self._out.events, line)
        return checkpoint

    def _with_best(self) -> TrainState:
        """Return the state with this step as the best, where its validation says so."""
        state, value = self.state, self.state.validation.get("bits_per_byte")
        best = state.best_bits_per_byte
        is_best = value is not None and (best is None or value < best)
        if is_best and state.validated_step == state.step:
            return replace(state, best_step=state.step, best_bits_per_byte=value)
        return state

    def _try_save(self) -> None:
        try:
            self._save()
        except StorageError as error:
            self._log.warning(
                "checkpoint not saved; training goes on and tries again at the next interval",
                step=self.state.step,
                reason=str(error),
                last_good_step=self._saved_step,
            )

    def _final_checkpoint(self) -> Artifact:
        if self._saved_step != self.state.step:
            return self._save()
        return self._out.store.open(self.state.step)

    def _stop(self, stop: StopRequest) -> None:
        assert stop.signum is not None
        if self.state.step not in (0, self._saved_step):
            self._save()
        raise TrainingInterruptedError(
            stop.signum, f"stopped by signal {stop.signum} after step {self.state.step}, saved"
        )
