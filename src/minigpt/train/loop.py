"""The training loop: step, validate, save, until done or asked to stop.

Each of the three happens at most once a step and its completion is part of the saved state,
so that a resumed run takes up exactly what the killed one had not finished. All ranks of a run
go through the same decisions: what may differ between them is voted on.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import NoReturn

from torch import Tensor
from torch.distributed.tensor import DTensor

from minigpt.core.artifact import Artifact
from minigpt.core.clock import Clock
from minigpt.core.errors import StorageError, TrainingError
from minigpt.core.manifest import Parent
from minigpt.core.telemetry import get_logger
from minigpt.data.loader import Batch
from minigpt.data.skip_list import SKIP_FILE, SkipList
from minigpt.train.anomaly import Action
from minigpt.train.build import Build
from minigpt.train.checkpoint import TrainState
from minigpt.train.config import TrainConfig
from minigpt.train.context import Member, Outputs, Speedometer
from minigpt.train.emergency import DEFAULT_GRACE_SECONDS, EmergencySave, patience_seconds
from minigpt.train.guard import Decision, StepGuard
from minigpt.train.interrupt import StopRequest, TrainingInterruptedError
from minigpt.train.metrics import read_metrics
from minigpt.train.replicas import RankComparison
from minigpt.train.reporter import Reporter
from minigpt.train.saving import Saver, note_best
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
        self._clock = clock
        self._log = get_logger("train")
        self._guard = StepGuard(config.recovery, member.world)
        self._compared = RankComparison(config.recovery, member.world, member.mesh, member.progress)
        self._changing = threading.Lock()
        """Held while parameters or position change, or are written down."""
        self._meeting = Meeting(member.world)
        self._own_finite = True
        self._saver = Saver(
            config, parts, outputs, member, self._report, parents, self._changing, clock
        )
        self._saves = self._saver.schedule
        self._saves.went_back(state.step)
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
            self._saver.finish(self.state)
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
            if self._saver.is_ready:
                self._saver.finish(self.state)
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
        mesh = self._member.mesh
        # A pipeline has gradients to exchange once, when all micro-batches are through.
        last = 0 if mesh.size("pp") > 1 else self._accumulation // mesh.data_size - 1
        if phase == "reduce" and micro_batch == last and self._world.size > 1:
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
        self._saver.finish(self.state)
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
            self._saves.went_back(self.state.step)
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
        self.state.loss_scale = self._parts.step.state()
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
            self._saver.finish(self.state)
        with self._changing:
            self.state.validated_step = self.state.step
            if result is None:
                return
            self.state.validation = asdict(result)
            if self._saves.begun_step == self.state.step:  # saved by a stop before validated
                note_best(self.state)
        seconds = self._clock.monotonic() - begin
        line = self._report.event("validation", self.state.step, **asdict(result), seconds=seconds)
        sample = self._parts.validator.sample(model, self.state.step)
        self._out.display.validation(line, sample)

    def _try_save(self) -> None:
        """Save, unless replicas differ; what can't be written is tried again later."""
        if not self._ranks_agree():
            return
        timed = self._saves.must_be_timed()
        try:
            if timed or not self._config.checkpoint.background:
                self._saver.save(self.state)
            else:
                self._saver.begin(self.state)
        except StorageError as error:
            self._saver.missed(self.state.step, error)
        if timed:
            self._saves.check_grace()

    def _final_checkpoint(self) -> Artifact | None:
        """Return the last step's checkpoint; None where replicas differed and were rolled back."""
        self._saver.finish(self.state)
        if self._saves.saved_step != self.state.step:
            if not self._ranks_agree():
                return None
            self._saver.save(self.state)
        return self._out.store.open(self.state.step)

    def _stop(self, stop: StopRequest, signum: int) -> NoReturn:
        stop.grant()
        self._saver.finish(self.state)
        if self.state.step not in (0, self._saves.saved_step):
            self._saver.save(self.state)
        raise TrainingInterruptedError(
            signum, f"stopped by signal {signum} after step {self.state.step}, saved"
        )

    def _save_at_once(self, signum: int) -> None:
        """Save the last finished step from another thread, and end the session's record."""
        self._saver.save_as_it_is(self.state)
        now = self._clock.now().timestamp()
        phases = self._progress.seconds()
        self._out.events.append(end_line(self.state.step, "interrupted", now, phases))
        self._out.events.flush()
        self._log.warning("saved in the middle of a step", signal=signum, step=self.state.step)


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
