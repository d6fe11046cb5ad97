"""The training loop: step, validate, save, until done or asked to stop.

Each of the three happens at most once a step and its completion is part of the saved state,
so that a resumed run takes up exactly what the killed one had not finished. All ranks of a run
go through the same decisions: what may differ between them is voted on.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NoReturn

from torch import Tensor
from torch.distributed.tensor import DTensor

from minigpt.core.artifact import Artifact
from minigpt.core.clock import Clock
from minigpt.core.errors import StorageError, TrainingError
from minigpt.core.manifest import Parent
from minigpt.core.telemetry import get_logger
from minigpt.data.loader import Batch
from minigpt.data.skip_list import SKIP_FILE, SkipList
from minigpt.model.lora import trained_state
from minigpt.train.anomaly import Action
from minigpt.train.build import Build
from minigpt.train.checkpoint import PendingSave, TrainState
from minigpt.train.config import TrainConfig
from minigpt.train.context import Member, Outputs, Speedometer
from minigpt.train.emergency import DEFAULT_GRACE_SECONDS, EmergencySave, patience_seconds
from minigpt.train.guard import Decision, StepGuard
from minigpt.train.interrupt import StopRequest, TrainingInterruptedError
from minigpt.train.metrics import read_metrics
from minigpt.train.replicas import RankComparison
from minigpt.train.reporter import Reporter
from minigpt.train.saving import SaveSchedule
from minigpt.train.schedule import learning_rate_factor
from minigpt.train.sessions import end_line
from minigpt.train.step import StepResult
from minigpt.train.world import Meeting


class TrainLoop:
    """Runs a resolved config from `state` to its last step."""

    def __init__(
        self,
        config: TrainConfig,
        state: TrainState,
        parts: Build,
        outputs: Outputs,
        member: Member,
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
        self._member = member
        self._world = member.world
        self._progress = member.progress
        self._report = Reporter(config, outputs, speedometer, parts.loader.num_tokens)
        self._parents = parents
        self._clock = clock
        self._log = get_logger("train")
        self._saves = SaveSchedule(config, state.step, member.history, clock)
        self._guard = StepGuard(config.recovery, member.world)
        self._compared = RankComparison(config.recovery, member.world, member.mesh, member.progress)
        self._changing = threading.Lock()
        """Held while parameters or position change, or are written down."""
        self._meeting = Meeting(member.world)
        self._own_finite = True
        self._pending: PendingSave | None = None
        self._pending_phases: Mapping[str, float] = {}
        self._failed_at = member.history.failed_at
        self._tokens_per_step = config.batch.tokens_per_step
        rows = parts.loader.batch_size * parts.loader.sequence_length
        self._accumulation = self._tokens_per_step // rows
        self._progress.listeners.append(self._note_gradient)
        self._take_up()

    def run(self) -> Artifact:
        """Train to the end; return the last step's checkpoint.

        Raises:
            TrainingInterruptedError: A signal asked to stop; the state is saved.
            TrainingError: Loss or gradient is not finite, again and again; the last checkpoint
                is kept.
            ConfigError: A save takes longer than the grace.
            StorageError: The last checkpoint could not be written.
        """
        self._saves.check_grace()
        grace = self._config.recovery.grace_seconds
        overdue = EmergencySave(
            self._changing,
            self._meeting,
            step=lambda: self.state.step,
            save=self._save_at_once,
            seconds=(grace or DEFAULT_GRACE_SECONDS) / 2,
        )
        self._out.display.begin(self.state.step, self._steps)
        try:
            with StopRequest(
                lambda: patience_seconds(grace, self._saves.seconds), overdue, self._meeting
            ) as stop:
                return self._run(stop)
        finally:
            self._finish_save()
            self._out.display.end()

    def _take_up(self) -> None:
        """Make what follows from the position: skipped data, the memory of losses."""
        window = 2 * self._config.recovery.spike_window
        path = self._out.metrics.path
        lines = self._world.from_first(lambda: list(read_metrics(path))[-window:])
        rollbacks = self._world.from_first(self._count_rollbacks)
        self._guard.resume(lines, max(self._guard.rollbacks, rollbacks))
        self._progress.step = self.state.step

    def _count_rollbacks(self) -> int:
        return sum(line["kind"] == "rollback" for line in read_metrics(self._out.events.path))

    def _run(self, stop: StopRequest) -> Artifact:
        signum = 0
        while True:
            if self._pending is not None and self._pending.done:
                self._finish_save()
            if self._is_validation_due():
                signum = signum or self._heard(stop)
                if signum:
                    self._stop(stop, signum)
                self._validate()
            if self.state.step == self._steps:
                final = self._final_checkpoint()
                if final is not None:
                    return final
            elif self._saves.is_due(self.state.step):
                self._try_save()
            signum = signum or self._heard(stop)
            if signum:
                self._stop(stop, signum)
            signum = self._train_step(stop)

    def _heard(self, stop: StopRequest) -> int:
        """Return the signal to stop by; several ranks learn of it from the vote alone."""
        return (stop.signum or 0) if self._world.size == 1 else 0

    def _is_validation_due(self) -> bool:
        step, every = self.state.step, self._config.validation.every
        assert isinstance(every, int)
        on_schedule = (every > 0 and step % every == 0) or step == self._steps
        return step > 0 and on_schedule and self.state.validated_step != step

    def _train_step(self, stop: StopRequest) -> int:
        """Do one update, if the ranks find it healthy; return a signal to stop by, or 0."""
        begin = self._clock.monotonic()
        self._progress.enter("data")
        factor = learning_rate_factor(self._config.schedule, self.state.step, self._steps)
        batches = self._batches()
        while True:
            # Between the micro-batches only one process alone may leave off.
            result = self._parts.step.compute(batches, lambda: bool(self._heard(stop)))
            if result is None:
                return stop.signum or 0
            decision = self._judge(result, stop)
            if decision.action is not Action.RETRY:
                break
            self._parts.step.discard()
        if decision.action is Action.STOP:
            self._give_up(result)
        if decision.action is Action.ROLL_BACK:
            self._parts.step.discard()
            self._roll_back(decision.verdict.name.lower().replace("_", " "), skip_data=True)
            return decision.signum
        with self._changing:
            self._progress.enter("update")
            skipped = decision.action is Action.SKIP
            if skipped:
                self._parts.step.discard()
            else:
                self._parts.step.update(factor)
            self._progress.enter("report")
            self._advance(result, skipped=skipped)
            self._report.step(
                self.state,
                result,
                factor=factor,
                seconds=self._clock.monotonic() - begin,
                skipped=skipped,
                phases=self._progress.seconds(),
            )
        self._after_step()
        if decision.save and self._saves.begun_step != self.state.step:
            self._try_save()
        return decision.signum

    def _batches(self) -> list[Batch]:
        """Return this rank's share of the step's micro-batches."""
        loader = self._parts.loader
        first = self.state.step * self._accumulation
        return [
            loader.batch_at((first + number) * loader.batch_size)
            for number in self._member.mesh.micro_batches(self._accumulation)
        ]

    def _judge(self, result: StepResult, stop: StopRequest) -> Decision:
        self._progress.enter("vote")
        step = self.state.step + 1
        decision = self._guard.judge(
            step,
            result,
            own_finite=self._own_finite,
            signum=stop.signum or 0,
            save=self._world.is_first and self._saves.is_overdue(),
        )
        if decision.action is not Action.ACCEPT:
            self._report.alarm(
                "anomaly",
                step,
                verdict=decision.verdict.name.lower(),
                action=decision.action.value,
                loss=result.loss,
                grad_norm=result.grad_norm,
                ranks=list(decision.ranks),
                first_sample=self._samples_before(step),
            )
        return decision

    def _samples_before(self, step: int) -> int:
        """Return the position in the run's order at which a step (counted from 1) begins."""
        return (step - 1) * self._accumulation * self._parts.loader.batch_size

    def _note_gradient(self, phase: str, step: int, micro_batch: int) -> None:
        """Look, before gradients are exchanged, whether this rank's own are finite."""
        share = self._accumulation // self._member.mesh.data_size
        if phase == "reduce" and micro_batch == share - 1 and self._world.size > 1:
            gradients = [p.grad for p in self._parts.model.parameters() if p.grad is not None]
            self._own_finite = all(bool(_local(g).isfinite().all()) for g in gradients)

    def _give_up(self, result: StepResult) -> NoReturn:
        rollbacks = self._guard.rollbacks
        after = f" after {rollbacks} rollbacks" if rollbacks else ""
        raise TrainingError(
            f"step {self.state.step + 1}{after}: loss is {result.loss}, the gradient's norm is "
            f"{result.grad_norm}; data cursor {self._parts.loader.state()}; the checkpoint of "
            f"step {self._saves.saved_step} is kept",
            remedy="lower the learning rate or raise schedule.warmup_steps in a new run",
        )

    def _roll_back(self, reason: str, *, skip_data: bool) -> None:
        """Go back to the last good checkpoint; leave out the data since the first bad step."""
        at = self.state.step + 1
        self._finish_save()
        if not self._world.from_first(self._out.store.steps):
            raise TrainingError(
                f"step {at}: {reason}, and there is no checkpoint to roll back to",
                remedy="lower the learning rate, raise schedule.warmup_steps or save earlier",
            )
        if skip_data:
            first_bad = self._guard.first_bad_step or at
            self._world.from_first(
                partial(
                    SkipList.add_steps,
                    self._member.run_dir / SKIP_FILE,
                    range(first_bad - 1, at),
                    samples_per_step=self._accumulation * self._parts.loader.batch_size,
                    reason=reason,
                )
            )
        spent = self._progress.seconds()
        with self._changing:
            self.state = self._member.restore()
            self._saves.begun_step = self._saves.saved_step = self.state.step
            self._take_up()
        self._report.alarm(
            "rollback",
            at,
            to=self.state.step,
            reason=reason,
            skipped_samples=self._parts.loader.skip_list.num_samples,
            phases=spent,
        )

    def _advance(self, result: StepResult, *, skipped: bool) -> None:
        self.state.step += 1
        self._progress.step = self.state.step
        self.state.tokens += self._tokens_per_step
        self._parts.loader.next_sample = self._samples_before(self.state.step + 1)
        self.state.cursor = self._parts.loader.state()
        if not skipped:
            self.state.loss = result.loss

    def _after_step(self) -> None:
        """Do what is due after a step besides validation and save."""
        if self._failed_at is not None:
            seconds = self._clock.now().timestamp() - self._failed_at
            self._report.event("recovered", self.state.step, seconds=seconds)
            self._failed_at = None
        every = self._config.recovery.check_every
        if every and self.state.step % every == 0:
            self._ranks_agree(speeds=True)

    def _ranks_agree(self, *, speeds: bool = False) -> bool:
        """Compare the ranks; where replicas differ roll back and return False."""
        if self._world.size == 1:
            return True
        self._progress.enter("vote")
        report = self._compared.run(self._parts.model.parameters(), speeds=speeds)
        if report.stragglers:
            seconds = [round(seconds, 4) for seconds in report.compute_seconds]
            self._report.alarm(
                "straggler", self.state.step, ranks=report.stragglers, compute_seconds=seconds
            )
        if not report.divergent:
            return True
        self._report.alarm("divergence", self.state.step, ranks=report.divergent)
        if not self._guard.count_rollback():
            raise TrainingError(
                f"step {self.state.step}: the weights of ranks {report.divergent} differ from "
                f"their replicas' after {self._guard.rollbacks} rollbacks",
                remedy="look for faulty memory on those ranks' machines",
            )
        self._roll_back(f"weights of ranks {report.divergent} differ", skip_data=False)
        return False

    def _validate(self) -> None:
        self._progress.enter("validate")
        begin = self._clock.monotonic()
        model = self._parts.whole_model()
        result = self._parts.validator.score(model)
        if self._saves.begun_step == self.state.step:
            self._finish_save()
        with self._changing:
            self.state.validated_step = self.state.step
            if result is None:
                return
            self.state.validation = asdict(result)
            if self._saves.begun_step == self.state.step:  # saved by a stop before validated
                self.state = self._with_best()
        seconds = self._clock.monotonic() - begin
        line = self._report.event("validation", self.state.step, **asdict(result), seconds=seconds)
        sample = self._parts.validator.sample(model, self.state.step)
        self._out.display.validation(line, sample)

    def _save(self) -> None:
        """Save and wait for the end of it; every rank writes its part.

        Raises:
            StorageError: It could not be saved; raised on every rank.
        """
        self._finish_save()
        self._progress.enter("save")
        begin, phases = self._clock.monotonic(), self._progress.seconds()
        with self._changing:
            self._out.store.save(self._with_best(), **self._contents())
            self.state = self._with_best()
            self._saves.begun_step = self.state.step
        seconds = self._clock.monotonic() - begin
        (milliseconds,) = self._world.vote(round(1000 * seconds))
        self._note_save(self.state.step, milliseconds / 1000, seconds, phases)

    def _begin_save(self) -> None:
        """Save what is now, while training goes on."""
        self._finish_save()
        self._progress.enter("save")
        self._pending_phases = self._progress.seconds()
        with self._changing:
            self._pending = self._out.store.save_async(self._with_best(), **self._contents())
            self._saves.begun_step = self.state.step

    def _finish_save(self) -> None:
        """Wait for the save in the background, if there is one, and take note of its end."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        self._progress.enter("save")
        try:
            pending.result()
        except StorageError as error:
            self._warn_not_saved(pending.step, error)
            return
        saved = pending.state
        with self._changing:
            self.state = replace(
                self.state, best_step=saved.best_step, best_bits_per_byte=saved.best_bits_per_byte
            )
        seconds = self._out.store.save_seconds[-1]
        self._note_save(pending.step, seconds, pending.stall_seconds, self._pending_phases)

    def _note_save(
        self, step: int, seconds: float, stall: float, phases: Mapping[str, float]
    ) -> None:
        self._saves.saved(step, seconds)
        self._report.event(
            "checkpoint", step, seconds=seconds, stall_seconds=stall, phases=dict(phases)
        )
        if self._world.is_first:
            assert isinstance(self._config.checkpoint.every, int)
            self._report.saved(self._config.checkpoint.every, seconds)

    def _contents(self) -> dict[str, Any]:
        # First the lines, then the checkpoint that claims they are there.
        self._out.metrics.flush()
        self._out.events.flush()
        return {
            "model": trained_state(self._parts.model),
            "optimizer": self._parts.optimizer.state_dict(),
            "parents": self._parents,
        }

    def _with_best(self) -> TrainState:
        """Return a copy of the state, with this step as the best where its validation says so.

        A copy, since a save in the background keeps it while training moves the state on.
        """
        state, value = self.state, self.state.validation.get("bits_per_byte")
        best = state.best_bits_per_byte
        is_best = value is not None and (best is None or value < best)
        if is_best and state.validated_step == state.step:
            return replace(state, best_step=state.step, best_bits_per_byte=value)
        return replace(state)

    def _try_save(self) -> None:
        """Save, unless replicas differ; what can't be written is tried again later."""
        if not self._ranks_agree():
            return
        timed = self._saves.must_be_timed()
        try:
            if timed or not self._config.checkpoint.background:
                self._save()
            else:
                self._begin_save()
        except StorageError as error:
            self._warn_not_saved(self.state.step, error)
        if timed:
            self._saves.check_grace()

    def _warn_not_saved(self, step: int, error: StorageError) -> None:
        self._log.warning(
            "checkpoint not saved; training goes on and tries again at the next interval",
            step=step,
            reason=str(error),
            last_good_step=self._saves.saved_step,
        )

    def _final_checkpoint(self) -> Artifact | None:
        """Return the last step's checkpoint; None where replicas differed and were rolled back."""
        self._finish_save()
        if self._saves.saved_step != self.state.step:
            if not self._ranks_agree():
                return None
            self._save()
        return self._out.store.open(self.state.step)

    def _stop(self, stop: StopRequest, signum: int) -> NoReturn:
        stop.grant()
        self._finish_save()
        if self.state.step not in (0, self._saves.saved_step):
            self._save()
        raise TrainingInterruptedError(
            signum, f"stopped by signal {signum} after step {self.state.step}, saved"
        )

    def _save_at_once(self, signum: int) -> None:
        """Save the last finished step from another thread, and end the session's record."""
        if self.state.step == self._saves.begun_step:
            self._out.store.wait()
        elif self.state.step > 0:
            self._out.store.save(self._with_best(), **self._contents())
        now = self._clock.now().timestamp()
        phases = self._progress.seconds()
        self._out.events.append(end_line(self.state.step, "interrupted", now, phases))
        self._out.events.flush()
        self._log.warning("saved in the middle of a step", signal=signum, step=self.state.step)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
