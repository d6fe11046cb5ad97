from __future__ import annotations

from typing import Any

import pytest

from minigpt.core.clock import ManualClock
from minigpt.train.display import LogDisplay, TerminalDisplay, format_seconds


def _line(step: int) -> dict[str, Any]:
    line = {"step": step, "loss": 2.0, "tokens_per_second": 1234.0}
    return {**line, "mfu": 0.25, "goodput": 0.875}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (0.4, "0s"), (59.6, "1m00s"), (187, "3m07s"), (7500, "2h05m")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_log_lines_come_at_intervals_and_at_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    clock = ManualClock()
    display = LogDisplay(clock)
    display.begin(0, 20)
    for step in range(1, 21):
        display.step(_line(step), seconds_left=60.0)
        clock.advance(1.0)
    captured = capfd.readouterr()
    text = captured.out + captured.err
    assert sum(f"={step}/20" in text for step in range(1, 21)) == 5  # 1, 6, 11, 16, 20
    assert "tokens_per_second=1234" in text


def test_the_terminal_shows_validations_and_samples(capfd: pytest.CaptureFixture[str]) -> None:
    display = TerminalDisplay()
    display.begin(0, 2)
    display.step(_line(1), seconds_left=60.0)
    display.validation({"step": 1, "bits_per_byte": 2.5}, "[bold]not markup[/bold]")
    display.end()
    text = capfd.readouterr().err
    assert "2.5000 bits per byte" in text
    for shown in ("2.0000", "1,234", "25.0%", "87.5%", "1m00s", "step 1 of 2"):
        assert shown in text, shown
    assert "[bold]not markup[/bold]" in text
