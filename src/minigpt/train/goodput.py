"""The goodput ledger: where a run's wall time and money went, over all its sessions.

Pure: read from the lines of `events.jsonl`. Each session's phases add up to its life, the time
between two sessions is a restart (or a pause, where the run was asked to stop), and so the
categories add up to the wall clock by construction; `unaccounted` says how far off they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minigpt.core.reliability import FailureRate, failure_rate
from minigpt.train.sessions import FAILED, ended_sessions

CATEGORY = {
    "data": "data_wait",
    "forward": "compute",
    "backward": "compute",
    "update": "compute",
    "reduce": "communication",
    "vote": "communication",
    "report": "overhead",
    "validate": "evaluation",
    "save": "checkpoint",
    "finish": "checkpoint",
}
"""Of each phase but "start", which is the first session's startup and the others' restart."""
CATEGORIES = (
    "compute",
    "data_wait",
    "communication",
    "checkpoint",
    "evaluation",
    "overhead",
    "startup",
    "restart",
    "lost_work",
)
_USEFUL = ("compute", "data_wait", "communication")
_LOSABLE = (*_USEFUL, "evaluation", "overhead")
"""What is done again after a rollback or a restart."""


@dataclass
class _Span:
    """A piece of a session between two marks, by category."""

    seconds: dict[str, float]
    saved_step: int | None = None
    """The step that was saved at its end."""
    lost: bool = False


@dataclass(frozen=True)
class Goodput:
    """A run's ledger."""

    wall_seconds: float
    """From the first session's beginning to the last one's end, pauses left out."""
    paused_seconds: float
    """Between a stop that was asked for and the next session."""
    seconds: Mapping[str, float]
    """By category."""
    sessions: int
    failures: int
    rate: FailureRate
    ranks: int
    """Of the last session."""
    device_hours: float
    recoveries: Sequence[float] = field(default_factory=list)
    """Seconds from each failure to the next finished step."""

    @property
    def goodput(self) -> float:
        """The share of the wall time that went into steps that count."""
        return sum(self.seconds[name] for name in _USEFUL) / max(self.wall_seconds, 1e-9)

    @property
    def unaccounted(self) -> float:
        """Wall time less the categories' sum, as a share of the wall time."""
        difference = self.wall_seconds - sum(self.seconds.values())
        return difference / max(self.wall_seconds, 1e-9)


@dataclass(frozen=True)
class Cost:
    """What a run has cost, and for what."""

    total: float
    per_million_tokens: float
    per_bit_per_byte: float | None
    """For each bit per byte that validation has improved by; None where it has not."""


def progress_share(phases: Mapping[str, float]) -> float:
    """Return the share of one process's life that went into steps."""
    useful = sum(phases[name] for name, kind in CATEGORY.items() if kind in _USEFUL)
    return useful / max(sum(phases.values()), 1e-9)


def read_goodput(events: Sequence[Mapping[str, Any]]) -> Goodput | None:
    """Make the ledger of a run whose sessions have ended; None where there is no session.

    Args:
        events: The lines of `events.jsonl`.
    """
    spans: list[_Span] = []
    gaps = {"restart": 0.0, "paused": 0.0}
    sessions = ended_sessions(events)
    if not sessions:
        return None
    device_seconds, previous = 0.0, None
    for begin, end, lines in sessions:
        if previous is not None:
            name = "restart" if previous["status"] in FAILED else "paused"
            gaps[name] += max(0.0, begin["time"] - previous["time"])
            _lose(spans, begin["step"])
        _add_spans(spans, lines, end, first=previous is None)
        device_seconds += begin["ranks"] * (end["time"] - begin["time"])
        previous = end
    wall = sessions[-1].end["time"] - sessions[0].begin["time"] - gaps["paused"]
    totals = dict.fromkeys(CATEGORIES, 0.0) | {"restart": gaps["restart"]}
    for span in spans:
        for name, seconds in span.seconds.items():
            totals["lost_work" if span.lost and name in _LOSABLE else name] += seconds
    failures = sum(session.end["status"] in FAILED for session in sessions)
    return Goodput(
        wall_seconds=wall,
        paused_seconds=gaps["paused"],
        seconds=totals,
        sessions=len(sessions),
        failures=failures,
        rate=failure_rate(failures, max(wall, 1e-6) / 3600),
        ranks=sessions[-1].begin["ranks"],
        device_hours=device_seconds / 3600,
        recoveries=[line["seconds"] for line in events if line["kind"] == "recovered"],
    )


def cost(
    goodput: Goodput, price_per_device_hour: float, tokens: int, validations: Sequence[float]
) -> Cost:
    """Put a price on a run.

    Args:
        goodput: Its ledger; every rank is a device.
        price_per_device_hour: In any currency.
        tokens: Trained on, those of lost work not counted again.
        validations: Bits per byte, in the order of the steps.
    """
    total = price_per_device_hour * goodput.device_hours
    gained = validations[0] - min(validations) if validations else 0.0
    return Cost(
        total=total,
        per_million_tokens=total / max(tokens, 1) * 1e6,
        per_bit_per_byte=total / gained if gained > 0 else None,
    )


def _add_spans(
    spans: list[_Span], marks: Sequence[Mapping[str, Any]], end: Mapping[str, Any], *, first: bool
) -> None:
    """Cut a session at its saves and rollbacks; what a rollback undoes is lost."""
    before: Mapping[str, float] = {}
    startup = "startup" if first else "restart"
    for mark in [*marks, end]:
        seconds = dict.fromkeys(CATEGORIES, 0.0)
        for phase, spent in mark["phases"].items():
            seconds[CATEGORY.get(phase, startup)] += spent - before.get(phase, 0.0)
        before = mark["phases"]
        spans.append(_Span(seconds, mark["step"] if mark["kind"] == "checkpoint" else None))
        if mark["kind"] == "rollback":
            _lose(spans, mark["to"])


def _lose(spans: Sequence[_Span], step: int) -> None:
    """Mark as lost what was done after the latest save of `step`, or of one before it.

    The line of the save itself is missing where the process was killed right after the save.
    """
    for span in reversed(spans):
        if span.saved_step is not None and span.saved_step <= step:
            return
        span.lost = True
