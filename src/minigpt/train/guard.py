"""The vote on a step before its update: what all ranks do with it, and whether they stop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from minigpt.train.anomaly import Action, AnomalyDetector, Strikes, Verdict, decide
from minigpt.train.config import RecoveryConfig
from minigpt.train.step import StepResult
from minigpt.train.world import World


class Decision(NamedTuple):
    """What every rank does; the same on all."""

    action: Action
    verdict: Verdict
    signum: int
    """A signal that asked some rank to stop, or 0."""
    save: bool
    """Rank 0 finds a save due by its clock."""
    ranks: tuple[int, ...]
    """Of a step that is not healthy: the ranks whose own numbers were not finite."""


class StepGuard:
    """Judges steps and remembers what led here.

    A verdict is the largest of all ranks' verdicts: one rank that alone skipped a step, or alone
    did not, would leave the others waiting or make replicas differ.
    """

    def __init__(self, config: RecoveryConfig, world: World) -> None:
        self._config = config
        self._world = world
        self._strikes = Strikes()
        self._detector = AnomalyDetector(config)
        self.first_bad_step = 0
        """The first step of the row of skipped ones at hand."""

    def resume(self, lines: Sequence[Mapping[str, Any]], rollbacks: int) -> None:
        """Take up where the run stands: its metrics lines, and its rollbacks so far."""
        in_a_row = _trailing_skips(lines)
        self._strikes = Strikes(in_a_row=in_a_row, rollbacks=rollbacks)
        self.first_bad_step = lines[-in_a_row]["step"] if in_a_row else 0
        healthy = [line["loss"] for line in lines if not line.get("skipped")]
        self._detector = AnomalyDetector(self._config, healthy[-self._config.spike_window :])

    def judge(
        self, step: int, result: StepResult, *, own_finite: bool, signum: int, save: bool
    ) -> Decision:
        """Vote on a step (counted from 1) whose gradient is ready."""
        own = self._detector.judge(result.loss, result.grad_norm)
        agreed, signum, save_due = self._world.vote(int(own), signum, int(save))
        verdict = Verdict(agreed)
        action, self._strikes = decide(verdict, self._strikes, self._config)
        ranks: tuple[int, ...] = ()
        if verdict is not Verdict.HEALTHY:
            finite = self._world.gather(own_finite)
            ranks = tuple(rank for rank, flag in enumerate(finite) if not flag)
        if action is Action.ACCEPT:
            self._detector.accept(result.loss)
        elif action is Action.SKIP and self._strikes.in_a_row == 1:
            self.first_bad_step = step
        return Decision(action, verdict, signum, bool(save_due), ranks)

    @property
    def rollbacks(self) -> int:
        """Rollbacks so far."""
        return self._strikes.rollbacks

    def count_rollback(self) -> bool:
        """Count one for another reason than a step's numbers; False where it is one too many."""
        if self._strikes.rollbacks >= self._config.max_rollbacks:
            return False
        self._strikes = Strikes(rollbacks=self._strikes.rollbacks + 1)
        return True


def _trailing_skips(lines: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    for line in lines:
        count = count + 1 if line.get("skipped") else 0
    return count
