"""What a person sees of a run: a live panel on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from minigpt.core.clock import Clock, SystemClock
from minigpt.core.telemetry import get_logger

if TYPE_CHECKING:
    from rich.console import RenderableType

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


class SilentDisplay:
    """Shows nothing: for every rank but the first."""

    def begin(self, step: int, steps: int) -> None:
        pass

    def step(self, line: Line, seconds_left: float) -> None:
        pass

    def validation(self, line: Line, sample: str) -> None:
        pass

    def end(self) -> None:
        pass


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
            **{key: round(line[key], 4) for key in _OF_PREFERENCES if key in line},
            tokens_per_second=round(line["tokens_per_second"]),
            mfu=f"{line['mfu']:.1%}",
            goodput=f"{line['goodput']:.1%}",
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
    """A live panel with the run's numbers; validations and samples scroll above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, refresh_per_second=4)
        self._steps = 1
        self._loss: float | None = None
        self._bits: float | None = None

    def begin(self, step: int, steps: int) -> None:
        self._steps = steps
        self._live.start()

    def step(self, line: Line, seconds_left: float) -> None:
        loss, before = line["loss"], self._loss
        if math.isfinite(loss):
            self._loss = loss if before is None else _SMOOTHING * before + (1 - _SMOOTHING) * loss
        self._live.update(self._panel(line, seconds_left))

    def validation(self, line: Line, sample: str) -> None:
        from rich.text import Text

        self._bits = line["bits_per_byte"]
        text = f"step {line['step']:>6}  {line['bits_per_byte']:.4f} bits per byte (held out)"
        text += "".join(f"  {key} {line[key]:.3f}" for key in _OF_PREFERENCES if key in line)
        self._console.print(Text(text, style="bold"))
        if sample:
            self._console.print(Text(sample.strip("\n"), style="dim"))

    def end(self) -> None:
        self._live.stop()

    def _panel(self, line: Line, seconds_left: float) -> RenderableType:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        facts = {
            "loss": "-" if self._loss is None else f"{self._loss:.4f}",
            "bits per byte": "-" if self._bits is None else f"{self._bits:.4f}",
            "tok/s": f"{line['tokens_per_second']:,.0f}",
            "MFU": f"{line['mfu']:.1%}",
            "goodput": f"{line['goodput']:.1%}",
            "left": format_seconds(seconds_left),
        }
        table = Table.grid(padding=(0, 3))
        for _ in facts:
            table.add_column(justify="right")
        table.add_row(*facts.values(), style="bold")
        table.add_row(*facts, style="dim")
        bar = ProgressBar(total=self._steps, completed=line["step"])
        rows = Table.grid(expand=True)
        rows.add_row(bar)
        rows.add_row(table)
        title = f"step {line['step']:,} of {self._steps:,}"
        return Panel(rows, title=title, title_align="left")


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
