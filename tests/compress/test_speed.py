from __future__ import annotations

from pathlib import Path

import pytest

from minigpt.compress.speed import compare_decode_speed
from minigpt.core.clock import ManualClock
from minigpt.engine.config import EngineConfig, SpeculativeConfig
from minigpt.engine.engine import Engine


class SteppingClock(ManualClock):
    """A clock that is one second further at each reading."""

    def monotonic(self) -> float:
        self.advance(1)
        return super().monotonic()


def test_only_decode_steps_count(tiny_model: Path) -> None:
    """A step lasts one second here: with three sequences, three tokens a second."""
    config = EngineConfig(
        dtype="float32", max_num_seqs=3, seed=0, speculative=SpeculativeConfig(method="none")
    )
    engine = Engine.load(tiny_model, config)
    (speeds,) = compare_decode_speed(
        [engine], [5, 6, 7], repeats=2, tokens=6, batch=3, clock=SteppingClock()
    )
    assert speeds == pytest.approx([3.0, 3.0])
    assert not engine.has_work
