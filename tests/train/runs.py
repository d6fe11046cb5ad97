"""Whole runs in this process: stopping them at a moment, and what they left to the last bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigpt.core.clock import SystemClock
from minigpt.train.metrics import read_metrics
from minigpt.train.run import read_final

EXACT = ("steps", "tokens", "loss_hex", "losses", "validation", "best_step", "weights_sha256")


class WatchingClock(SystemClock):
    """Runs an action at every reading: several times a step, in the middle of real work."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def monotonic(self) -> float:
        self._action()
        return super().monotonic()


def dying_clock(run_dir: Path, steps: int) -> WatchingClock:
    """Return a clock that ends the process's run, without a save, once `steps` are logged."""
    path = run_dir / "metrics.jsonl"

    def die() -> None:
        if path.exists() and path.read_text().count('"train"') >= steps:
            raise KeyboardInterrupt

    return WatchingClock(die)


def exact_result(run_dir: Path) -> dict[str, Any]:
    """Return everything of a finished run that must be the same on every way to it."""
    final = read_final(run_dir)
    lines = list(read_metrics(run_dir / "metrics.jsonl"))
    exact = {key: final[key] for key in EXACT}
    exact["steps_logged"] = [line["step"] for line in lines]
    exact["hex"] = [line["loss_hex"] for line in lines]
    exact["norms"] = [line["grad_norm"] for line in lines]
    events = read_metrics(run_dir / "events.jsonl")
    exact["bpb"] = [
        (line["step"], line["bits_per_byte"]) for line in events if line["kind"] == "validation"
    ]
    return exact


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Return the event lines of a kind."""
    return [line for line in read_metrics(run_dir / "events.jsonl") if line["kind"] == kind]


def signal_when(condition: Callable[[], bool], signum: int) -> WatchingClock:
    """Return a clock that sends this process a signal, once, when the condition holds."""
    sent: list[int] = []

    def action() -> None:
        if not sent and condition():
            sent.append(signum)
            os.kill(os.getpid(), signum)

    return WatchingClock(action)


def has_checkpoint(run: Path, step: int) -> bool:
    """Tell whether a save is done, which in the background may take longer than some steps."""
    return (run / "checkpoints" / f"step-{step:08d}").exists()


def logged_steps(run_dir: Path) -> int:
    """Return how many steps the metrics tell of."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0
