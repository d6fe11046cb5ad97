"""A run's curves as pictures: `loss.png`, `bits_per_byte.png`, `speed.png`, `time.png`, and one
page, `run.html`, that holds them all and needs nothing else. Needs matplotlib.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt.core.errors import TrainingError
from minigpt.core.storage import write_atomic
from minigpt.train.goodput import CATEGORIES, read_goodput
from minigpt.train.metrics import read_metrics
from minigpt.train.run import METRICS_FILE
from minigpt.train.sessions import EVENTS_FILE, until_now

_SMOOTHING = 0.95
_DPI = 120

Lines = Sequence[Mapping[str, Any]]


def plot_run(run_dir: Path, destination: Path) -> dict[str, Path]:
    """Draw a run's curves, running or finished.

    Args:
        run_dir: The run's directory.
        destination: The directory for the pictures; made, files there are replaced.

    Returns:
        The path of each file by its name.

    Raises:
        TrainingError: The run has no step yet, or matplotlib is not installed.
        StorageError: The files can't be written.
    """
    lines = list(read_metrics(run_dir / METRICS_FILE))
    events = until_now(run_dir, list(read_metrics(run_dir / EVENTS_FILE)))
    if not lines:
        raise TrainingError(f"{run_dir} holds no step to draw", remedy="give a --run-dir of a run")
    draw: dict[str, Callable[[Any], bool]] = {
        "loss": lambda axes: _draw_loss(axes, lines, events),
        "bits_per_byte": lambda axes: _draw_bits(axes, events),
        "speed": lambda axes: _draw_speed(axes, lines),
        "time": lambda axes: _draw_time(axes, events),
    }
    pictures = {name: png for name, by in draw.items() if (png := _picture(by)) is not None}
    paths = {name: destination / f"{name}.png" for name in pictures}
    for name, path in paths.items():
        write_atomic(path, pictures[name])
    paths["page"] = destination / "run.html"
    write_atomic(paths["page"], _page(run_dir.name, lines[-1], pictures).encode())
    return paths


def _picture(draw: Callable[[Any], bool]) -> bytes | None:
    """Return a PNG of what `draw` puts on a pair of axes, None where it has nothing to show."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise TrainingError(
            "plots need matplotlib, which is not installed", remedy="pip install 'minigpt[plots]'"
        ) from None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    if not draw(axes):
        return None
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    return content.getvalue()


def _draw_loss(axes: Any, lines: Lines, events: Lines) -> bool:
    steps, losses = [x["step"] for x in lines], [x["loss"] for x in lines]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, label="step")
    axes.plot(steps, _smooth(losses), color="tab:blue", label="smoothed")
    for event in events:
        if event["kind"] in ("anomaly", "rollback", "failure"):
            axes.axvline(event["step"], color="tab:red", alpha=0.4, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training loss")
    axes.legend()
    return True


def _draw_bits(axes: Any, events: Lines) -> bool:
    found = [(x["step"], x["bits_per_byte"]) for x in events if x["kind"] == "validation"]
    if found:
        axes.plot(*zip(*found, strict=True), marker="o")
        axes.set(xlabel="step", ylabel="bits per byte", title="Held-out text")
    return bool(found)


def _draw_speed(axes: Any, lines: Lines) -> bool:
    axes.plot([x["step"] for x in lines], [x["tokens_per_second"] for x in lines])
    axes.set(xlabel="step", ylabel="tokens per second", title="Speed", ylim=(0, None))
    return True


def _draw_time(axes: Any, events: Lines) -> bool:
    ledger = read_goodput(events)
    if ledger is None:
        return False
    names = [name for name in CATEGORIES if ledger.seconds[name] > 0]
    axes.barh(names, [ledger.seconds[name] for name in names])
    axes.invert_yaxis()
    axes.set(xlabel="seconds", title=f"Wall time: goodput {ledger.goodput:.1%}")
    return True


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the exponential mean at each value; what is not finite repeats the one before."""
    smooth: list[float] = []
    for value in values:
        last = smooth[-1] if smooth else value
        finite = value - value == 0
        smooth.append(_SMOOTHING * last + (1 - _SMOOTHING) * value if finite else last)
    return smooth


def _page(name: str, last: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    images = "\n".join(
        f'<img alt="{title}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for title, png in pictures.items()
    )
    title = html.escape(name)
    facts = f"step {last['step']:,}, {last['tokens']:,} tokens, loss {last['loss']:.4f}"
    style = "body{font-family:sans-serif;max-width:60rem;margin:2rem auto}img{width:100%}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{style}</style>\n<h1>{title}</h1>\n<p>{facts}</p>\n{images}\n</html>\n"
    )
