"""The learning rate as a pure function of the step, so that a resumed run needs no state."""

from __future__ import annotations

import math

from minigpt.train.config import ScheduleConfig


def learning_rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Return the factor of the peak learning rate for one step.

    Args:
        schedule: Resolved schedule (`warmup_steps` is a number).
        step: The step, counted from 0.
        steps: Steps of the whole run.

    Returns:
        A factor in (0, 1] during warmup and the stable phase, falling to `final_fraction`
        at the end. Warmup never yields 0, and the last step still learns.
    """
    assert isinstance(schedule.warmup_steps, int) and 0 <= step < steps
    warmup = schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if schedule.kind == "cosine":
        progress = (step - warmup + 1) / (steps - warmup + 1)
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        decay = min(round(steps * schedule.decay_fraction), steps - warmup)
        shape = min(1.0, (steps - step) / (decay + 1))
    return schedule.final_fraction + (1.0 - schedule.final_fraction) * shape
