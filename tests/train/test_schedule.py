from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.train.config import ScheduleConfig
from minigpt.train.schedule import learning_rate_factor


@given(
    kind=st.sampled_from(["cosine", "wsd"]),
    steps=st.integers(1, 300),
    warmup_share=st.floats(0, 1),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_rises_stays_and_falls(
    kind: str, steps: int, warmup_share: float, decay: float, final: float
) -> None:
    warmup = int(steps * warmup_share)
    schedule = ScheduleConfig.model_validate(
        {
            "kind": kind,
            "warmup_steps": warmup,
            "decay_fraction": decay,
            "final_fraction": final,
        }
    )
    factors = [learning_rate_factor(schedule, step, steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors) or (kind == "cosine" and final == 0)
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if warmup:
        assert rising[-1] == 1.0


def test_wsd_is_flat_between_warmup_and_decay() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=10, decay_fraction=0.2, final_fraction=0.1)
    factors = [learning_rate_factor(schedule, step, 100) for step in range(100)]
    assert set(factors[10:80]) == {1.0}
    assert factors[80] < 1.0
    assert factors[99] == pytest.approx(0.1 + 0.9 / 21)


def test_cosine_passes_its_middle_and_ends_at_the_final_fraction() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=0, final_fraction=0.1)
    factors = [learning_rate_factor(schedule, step, 99) for step in range(99)]
    assert factors[49] == pytest.approx(0.55)
    assert 0.1 < factors[98] < 0.102
