"""Everything observable passes here: structured logs, progress on a terminal.

Logs go to standard error, so that standard output carries results alone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


def configure_logging(*, json: bool = False, level: str = "info") -> None:
    """Send structured logs to standard error, as text for people or JSON for machines."""
    import structlog

    renderer: Any = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        # Looked up at each line: whoever redirects standard error later gets the lines too.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


def get_logger(component: str) -> Any:
    """Return a structured logger whose lines carry `component`."""
    import structlog

    return structlog.get_logger(component=component)


class Progress(Protocol):
    """What a long loop reports to."""

    def advance(self, amount: float = 1) -> None:
        """Count `amount` more units as done."""
        ...


class _NoProgress:
    def advance(self, amount: float = 1) -> None:
        pass


@contextmanager
def progress(description: str, total: float | None, unit: str = "items") -> Iterator[Progress]:
    """Show a progress bar with rate and time left; a no-op where stderr is no terminal.

    Args:
        description: What is being done.
        total: Units in all, or None where nobody knows.
        unit: `items` or `bytes` (bytes are shown as sizes and speeds).
    """
    if not sys.stderr.isatty():
        yield _NoProgress()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)

        class _Bar:
            def advance(self, amount: float = 1) -> None:
                bar.advance(task, amount)

        yield _Bar()
