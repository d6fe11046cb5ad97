"""What a person sees of a run: a live line on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from minigpt.core.clock import Clock, SystemClock
from minigpt.core.telemetry import get_logger

_LOG_SECONDS = 5.0
_SMOOTHING = 0.9
_OF_PREFERENCES = ("accuracy", "margin")

Line = Mapping[str, Any]


class Display(Protocol):
    """Shown the run's events as they happen, on the training thread; must be quick."""

    def begin(self, step: int, steps: int) -> None:
        """The loop starts after `step` of `steps`."""
        ...

    def step(self, line: Line, seconds_left: float) -> None:
        """A training step's metrics line, and an estimate of the time to the end."""
        ...

    def validation(self, line: Line, sample: str) -> None:
        """A validation's metrics line, and a text by the model (maybe empty)."""
        ...

    def end(self) -> None:
        """The loop has ended, for whatever reason."""
        ...


def make_display() -> Display:
    """Return the display that fits standard error."""
    return TerminalDisplay() if sys.stderr.isatty() else LogDisplay(SystemClock())


class LogDisplay:
    """A log line for the first and last step and every few seconds in between."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._log = get_logger("train")
        self._steps = 0
        self._next = 0.0

    def begin(self, step: int, steps: int) -> None:
        self._steps = steps
        self._next = self._clock.monotonic()

    def step(self, line: Line, seconds_left: float) -> None:
        now = self._clock.monotonic()
        if now < self._next and line["step"] != self._steps:
            return
        self._next = now + _LOG_SECONDS
        self._log.info(
            "step",
            step=f"{line['step']}/{self._steps}",
            loss=round(line["loss"], 4),
            tokens_per_second=round(line["tokens_per_second"]),
            mfu=f"{line['mfu']:.1%}",
            left=format_seconds(seconds_left),
        )

    def validation(self, line: Line, sample: str) -> None:
        self._log.info(
            "validation",
            step=line["step"],
            bits_per_byte=round(line["bits_per_byte"], 4),
            loss=round(line["loss"], 4),
            **{key: round(line[key], 4) for key in _OF_PREFERENCES if key in line},
            sample=sample,
        )

    def end(self) -> None:
        pass


class TerminalDisplay:
    """A progress bar with loss, speed and time left; validations and samples scroll above."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=self._console,
        )
        self._task = self._progress.add_task("train", total=None, text="")
        self._loss: float | None = None

    def begin(self, step: int, steps: int) -> None:
        self._progress.update(self._task, total=steps, completed=step)
        self._progress.start()

    def step(self, line: Line, seconds_left: float) -> None:
        loss = line["loss"]
        smooth = loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
        self._loss = smooth
        text = (
            f"loss {smooth:.3f}  {line['tokens_per_second']:,.0f} tok/s  "
            f"MFU {line['mfu']:.1%}  {format_seconds(seconds_left)} left"
        )
        self._progress.update(self._task, completed=line["step"], text=text)

    def validation(self, line: Line, sample: str) -> None:
        from rich.text import Text

        text = f"step {line['step']:>6}  {line['bits_per_byte']:.4f} bits per byte (held out)"
        text += "".join(f"  {key} {line[key]:.3f}" for key in _OF_PREFERENCES if key in line)
        self._console.print(Text(text, style="bold"))
        if sample:
            self._console.print(Text(sample.strip("\n"), style="dim"))

    def end(self) -> None:
        self._progress.stop()


def show_table(title: str, rows: Sequence[tuple[str, str, str]]) -> None:
    """Print (name, value, note) rows: a table on a terminal, log lines elsewhere."""
    if not sys.stderr.isatty():
        get_logger("train").info(title, **{name: value for name, value, _ in rows})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2), show_header=False)
    for row in rows:
        table.add_row(*row)
    Console(stderr=True).print(table)


def format_seconds(seconds: float) -> str:
    """Render a duration: 42s, 3m07s, 2h05m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
