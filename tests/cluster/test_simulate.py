"""The simulation against closed forms, and its own books."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.cluster.simulate import (
    KnownFailures,
    RandomFailures,
    SimulationConfig,
    Timings,
    ring_all_reduce_seconds,
    run_job,
    simulate,
)

PLAIN = Timings(step=1, steps_per_checkpoint=10, stall=2, write=0, detection=3, restart=4)


def test_ring_all_reduce_of_two_and_of_many() -> None:
    assert ring_all_reduce_seconds(2, 100, 10) == 10
    assert ring_all_reduce_seconds(1, 100, 10, 5) == 0
    assert math.isclose(ring_all_reduce_seconds(1024, 1e9, 1e9, 1e-6), 2 * 1023 / 1024 + 2046e-6)


def test_known_failures_by_hand() -> None:
    """Cycles of 10 s work and 2 s save; killed after 25 s and again after 9 s."""
    ledger = run_job(PLAIN, KnownFailures([25, 9]), steps=40)
    assert ledger.interruptions == 2
    # 25 s: two saves are done, 1 s of work is lost; 9 s: all of it is.
    assert ledger.lost == 1 + 9
    assert ledger.useful == 40
    assert ledger.detection == 6 and ledger.restart == 8
    assert ledger.checkpoint == 2 * 4
    assert ledger.total == 40 + 10 + 14 + 8


def test_an_asynchronous_save_counts_once_it_is_durable() -> None:
    slow = Timings(step=1, steps_per_checkpoint=10, stall=1, write=5, detection=0, restart=0)
    ledger = run_job(slow, KnownFailures([15, 17]), steps=30)
    # Saved at 11 s, durable at 16 s: too late for the first failure, not for the second.
    assert ledger.lost == 14 + 6


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20_000),
    st.floats(100, 1e6),
    st.floats(0, 120),
    st.floats(0, 60),
    st.integers(0, 3),
)
def test_the_books_balance(gpus: int, mtbf: float, stall: float, write: float, spares: int) -> None:
    config = SimulationConfig(
        gpus=gpus,
        gpu_mtbf_hours=mtbf,
        days=2,
        checkpoint_stall_seconds=stall,
        checkpoint_write_seconds=write,
        spare_nodes=spares,
        seeds=2,
    )
    for ledger in simulate(config).ledgers:
        assert math.isclose(ledger.total, 2 * 86_400, rel_tol=1e-9)
        assert min(ledger.parts().values()) >= 0


@pytest.mark.parametrize("gpus", [1024, 16_384])
@pytest.mark.parametrize("stall", [5.0, 60.0])
def test_agrees_with_the_closed_form(gpus: int, stall: float) -> None:
    """Without shortage of nodes Daly's expectation is exact for long runs."""
    config = SimulationConfig(
        gpus=gpus, days=300, seeds=20, checkpoint_stall_seconds=stall, node_loss=0.0
    )
    result = simulate(config)
    low, high = result.effective_interval
    slack = 4 / 1.96  # 4 standard errors, so that an honest build does not fail
    middle, half = (low + high) / 2, (high - low) / 2 * slack
    assert abs(result.closed_form - middle) <= half + 1e-4


def test_spares_matter_and_repairs_return_them() -> None:
    values = {"gpus": 16_384, "days": 54, "seeds": 5, "node_loss": 1.0, "repair_hours": 24.0}
    none = simulate(SimulationConfig(**values, spare_nodes=0))
    many = simulate(SimulationConfig(**values, spare_nodes=64))
    assert many.effective > 0.85 > none.effective
    assert many.summary()["shares"]["waiting_for_nodes"] < 1e-3
    assert none.summary()["shares"]["waiting_for_nodes"] > 0.1


def test_llama_3_published_point() -> None:
    """466 interruptions in 54 days on 16,384 GPUs, and more than 90 % effective training time.

    Assumed: saves stall 10 s, 1 min to notice, 4 min to restart, spares enough.
    """
    config = SimulationConfig(
        gpus=16_384,
        gpu_mtbf_hours=54 * 24 * 16_384 / 466,
        restart_seconds=240,
        spare_nodes=64,
        seeds=40,
    )
    result = simulate(config)
    summary = result.summary()
    assert 440 < summary["interruptions"] < 492
    assert 2.7 < summary["mtbf_hours"] < 2.85
    assert 0.90 < result.effective < 0.95


def test_seeds_decide_and_repeat() -> None:
    config = SimulationConfig(gpus=4096, days=10, seeds=3)
    first, again = simulate(config), simulate(config)
    assert first.ledgers == again.ledgers
    assert len({ledger.useful for ledger in first.ledgers}) == 3


def test_exponential_failures_have_their_mean() -> None:
    config = SimulationConfig(gpus=1000, gpu_mtbf_hours=1000)
    failures = RandomFailures(config, np.random.default_rng(0))
    mean = float(np.mean([failures.uptime() for _ in range(20_000)]))
    assert abs(mean / 3600 - 1) < 0.03
