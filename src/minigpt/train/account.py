"""A run's goodput, reliability and cost, read from its directory while it runs or after."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from minigpt.core.errors import TrainingError
from minigpt.core.reliability import daly_interval, reliability
from minigpt.train.goodput import cost, read_goodput
from minigpt.train.metrics import read_metrics
from minigpt.train.run import METRICS_FILE, stored_config
from minigpt.train.sessions import EVENTS_FILE, until_now

_DAY_HOURS = 24.0


def account_for(run_dir: Path, price_per_device_hour: float | None = None) -> dict[str, Any]:
    """Read a run's account.

    Args:
        run_dir: The run's directory.
        price_per_device_hour: None takes `recovery.price_per_device_hour`.

    Returns:
        `Goodput`'s fields and shares; `rate` with its bounds (failures an hour); `checkpoint`,
        the last save's seconds and Daly's interval for it; `cost`, None without a price.

    Raises:
        TrainingError: There is no run, or none that has begun to train.
    """
    config = stored_config(run_dir)
    events = until_now(run_dir, list(read_metrics(run_dir / EVENTS_FILE)))
    ledger = read_goodput(events)
    if config is None or ledger is None:
        raise TrainingError(f"{run_dir} holds no training run", remedy="give a --run-dir of one")
    lines = list(read_metrics(run_dir / METRICS_FILE))
    bits = [line["bits_per_byte"] for line in events if line["kind"] == "validation"]
    saves = [line["seconds"] for line in events if line["kind"] == "checkpoint"]
    price = config.recovery.price_per_device_hour
    price = price if price_per_device_hour is None else price_per_device_hour
    mtbf = 3600 * ledger.rate.mtbf_hours
    tokens = lines[-1]["tokens"] if lines else 0
    return {
        **asdict(ledger),
        "rate": ledger.rate._asdict(),
        "goodput": ledger.goodput,
        "unaccounted": ledger.unaccounted,
        "reliability_day": reliability(ledger.rate.upper, _DAY_HOURS),
        "checkpoint": {
            "seconds": saves[-1],
            "interval_seconds": daly_interval(saves[-1], mtbf),
        }
        if saves
        else None,
        "cost": asdict(cost(ledger, price, tokens, bits)) if price is not None else None,
    }
