"""A curve drawn with characters, for terminals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def curve(values: Sequence[float], *, width: int = 64, height: int = 12, label: str = "") -> str:
    """Draw `values` from left to right as a chart of `width` x `height` characters.

    Each column shows the mean of its share of the values, each row a range of the axis.

    Args:
        values: At least one finite number.
        width: Columns of the plot at most; fewer values give fewer columns.
        height: Rows of the plot.
        label: Text under the chart.
    """
    assert values, "a curve needs a value"
    columns = [_mean(part) for part in _split(values, min(width, len(values)))]
    low, high = min(columns), max(columns)
    span = (high - low) or 1.0
    rows = [round((high - value) / span * (height - 1)) for value in columns]
    lines = []
    for row in range(height):
        axis = f"{high - span * row / (height - 1):8.3f} |" if row % 3 == 0 else " " * 9 + "|"
        lines.append(axis + "".join(_cell(rows, column, row) for column in range(len(rows))))
    lines.append(" " * 9 + "+" + "-" * len(columns))
    if label:
        lines.append(" " * 10 + label)
    return "\n".join(line.rstrip() for line in lines)


def _cell(rows: Sequence[int], column: int, row: int) -> str:
    """Mark the curve's point, and join it to the one before where the curve is steep."""
    here = rows[column]
    before = rows[column - 1] if column else here
    return "*" if row == here else ":" if min(before, here) < row < max(before, here) else " "


def _split(values: Sequence[float], parts: int) -> list[Sequence[float]]:
    edges = [round(i * len(values) / parts) for i in range(parts + 1)]
    return [values[a:b] for a, b in itertools.pairwise(edges)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
