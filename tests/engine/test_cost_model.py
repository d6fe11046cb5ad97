from __future__ import annotations

import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.engine.cost_model import (
    MIN_CHUNK,
    STREAM_FACTOR,
    STREAM_SECONDS,
    Pacer,
    StepCostModel,
    StepWork,
    prefill_pairs,
)


def _truth(work: StepWork, slowness: float = 1.0) -> float:
    return slowness * (
        6e-3
        + 4e-4 * work.prefill_tokens
        + 2e-8 * work.prefill_pairs
        + 8e-4 * work.decode_rows
        + 1e-6 * work.decode_context
    )


def _random_work(chance: random.Random) -> StepWork:
    rows = chance.choice([0, 1, 4, 16])
    length = chance.choice([0, 0, 16, 100, 256])
    if not rows and not length:
        rows = 1
    return StepWork(
        length, prefill_pairs(chance.choice([0, 256, 2048]), length), rows,
        rows * chance.randrange(16, 1500),
    )  # fmt: skip


def _taught(steps: int = 400, seed: int = 0, noise: float = 0.1) -> StepCostModel:
    chance, model = random.Random(seed), StepCostModel()
    for _ in range(steps):
        work = _random_work(chance)
        model.observe(work, _truth(work) * chance.uniform(1 - noise, 1 + noise))
    return model


def test_it_knows_nothing_before_the_second_step() -> None:
    model = StepCostModel()
    assert not model.has_data
    model.observe(StepWork(256), 30.0)  # warms up
    assert not model.has_data
    assert model.predict(StepWork(256)) == 0
    model.observe(StepWork(256), 0.1)
    assert model.predict(StepWork(256)) == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_predictions_come_close_despite_noise_and_pauses(seed: int) -> None:
    chance, model = random.Random(seed), StepCostModel()
    for _ in range(400):
        work = _random_work(chance)
        pause = chance.choice([0.5, 2.0, 20.0]) if chance.random() < 0.01 else 0.0
        model.observe(work, _truth(work) * chance.uniform(0.9, 1.1) + pause)
    for _ in range(50):
        work = _random_work(chance)
        assert model.predict(work) == pytest.approx(_truth(work), rel=0.35, abs=4e-3)


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    model, chance = _taught(), random.Random(9)
    for _ in range(150):
        work = _random_work(chance)
        model.observe(work, _truth(work, slowness=5))
    work = StepWork(100, prefill_pairs(0, 100), 4, 2000)
    assert model.predict(work) == pytest.approx(_truth(work, slowness=5), rel=0.2)


def test_a_long_time_of_decode_alone_does_not_make_it_forget_prefill() -> None:
    model = _taught(noise=0)
    for _ in range(5000):
        work = StepWork(0, 0, 4, 2000)
        model.observe(work, _truth(work))
    prefill = StepWork(200, prefill_pairs(0, 200), 4, 2000)
    assert model.predict(prefill) == pytest.approx(_truth(prefill), rel=0.2)


@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 4096), st.integers(0, 1 << 30), st.integers(0, 256),
            st.integers(0, 1 << 20), st.floats(0, 1e4),
        ),
        max_size=30,
    ),
    probe=st.tuples(st.integers(0, 4096), st.integers(0, 1 << 30), st.integers(0, 256)),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_predictions_are_finite_positive_and_grow_with_the_work(
    steps: list[tuple[int, int, int, int, float]], probe: tuple[int, int, int]
) -> None:
    model = StepCostModel()
    for *work, seconds in steps:
        model.observe(StepWork(*work), seconds)
    tokens, pairs, rows = probe
    small = model.predict(StepWork(tokens, pairs, rows, 0))
    assert 0 <= small < math.inf
    assert model.predict(StepWork(tokens + 1, pairs + 1, rows + 1, 1)) >= small


@given(seconds=st.floats(0, 10), start=st.integers(0, 100_000))
@settings(deadline=None)
def test_the_longest_chunk_just_fits(seconds: float, start: int) -> None:
    model = _taught(60)
    length = int(model.longest_chunk(seconds, start))
    bare = model.predict(StepWork())

    def cost(tokens: int) -> float:
        return model.predict(StepWork(tokens, prefill_pairs(start, tokens))) - bare

    assert cost(length) <= seconds * 1.001 + 1e-9
    assert cost(length + 1) >= seconds * 0.999 - 1e-9


def _chunks(pacer: Pacer, decode: StepWork, limits: list[int]) -> list[int]:
    pace, taken = pacer.begin(decode), []
    for limit in limits:
        if pace.is_spent:
            break
        taken.append(pace.take(0, limit))
    return taken


def _pacer(target: float | None) -> Pacer:
    pacer = Pacer(target)
    pacer.model = _taught(noise=0)
    return pacer


def test_without_streams_or_data_the_whole_budget_is_used() -> None:
    assert _chunks(_pacer(0.01), StepWork(), [256, 100]) == [256, 100]
    assert _chunks(Pacer(0.01), StepWork(0, 0, 4, 400), [256, 100]) == [256, 100]


@pytest.mark.parametrize("target", [0.05, 0.1, None])
def test_prefill_fills_what_the_target_leaves(target: float | None) -> None:
    decode = StepWork(0, 0, 16, 8000)
    pacer = _pacer(target)
    (length,) = _chunks(pacer, decode, [4096, 4096])
    bare = _truth(decode)
    expected = target or max(STREAM_SECONDS, STREAM_FACTOR * bare)
    step = StepWork(length, prefill_pairs(0, length), 16, 8000)
    assert _truth(step) == pytest.approx(expected, rel=0.1)


def test_several_prompts_share_what_the_target_leaves() -> None:
    pacer = _pacer(0.1)
    decode = StepWork(0, 0, 4, 400)
    alone = _chunks(pacer, decode, [4096])
    together = _chunks(pacer, decode, [60] * 20)
    assert sum(together) == pytest.approx(sum(alone), abs=MIN_CHUNK)
    assert together[:-1] == [60] * (len(together) - 1)


def test_prompts_go_on_where_the_target_can_not_be_kept() -> None:
    assert _chunks(_pacer(0.001), StepWork(0, 0, 16, 8000), [4096, 4096]) == [MIN_CHUNK]
    assert _chunks(_pacer(0.001), StepWork(0, 0, 16, 8000), [3, 4096]) == [3]


def test_learning_costs_little() -> None:
    model, work = StepCostModel(), StepWork(100, 5000, 4, 2000)
    model.observe(work, 0.1)
    seconds = []
    for _ in range(200):
        begin = time.perf_counter()
        model.observe(work, 0.1)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 2e-4
