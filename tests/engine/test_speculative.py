"""Which sequences are drafted for, and how far."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.api.requests import Request, SamplingParams
from minigpt.engine.choice import Sampled
from minigpt.engine.config import SpeculativeConfig
from minigpt.engine.cost_model import StepCostModel, StepWork
from minigpt.engine.sequence import Sequence
from minigpt.engine.speculative import Speculator, keep_right


def _sequence(arrival: int = 0, max_tokens: int = 1000) -> Sequence:
    """A sequence that repeats itself with period 4."""
    request = Request(
        id=str(arrival), prompt_token_ids=[1, 2, 3, 4] * 3,
        sampling=SamplingParams(max_tokens=max_tokens),
    )  # fmt: skip
    return Sequence.from_request(request, 0, arrival, seed=0)


def _cost(work: StepWork, drafted_cost: float) -> float:
    return 20e-3 + 1e-3 * work.decode_rows + drafted_cost * work.drafted_tokens


def _model(drafted_cost: float) -> StepCostModel:
    """A model that has learnt steps of 20 ms, 1 ms a row and so much a drafted token."""
    model = StepCostModel()
    for i in range(300):
        work = StepWork(decode_rows=1 + i % 16, drafted_tokens=i * 7 % 20)
        model.observe(work, _cost(work, drafted_cost))
    return model


def _work(rows: int) -> StepWork:
    return StepWork(decode_rows=rows)


def _lengths(speculator: Speculator, sequences: list[Sequence], budget: int = 1000) -> list[int]:
    chosen = speculator.choose(sequences, _work(len(sequences)), budget)
    return [len(chosen.get(row, ())) for row in range(len(sequences))]


def test_what_is_right_is_drafted_ever_further() -> None:
    speculator, sequence = Speculator(SpeculativeConfig(), _model(1e-3)), _sequence()
    lengths = []
    for _ in range(20):
        (length,) = _lengths(speculator, [sequence])
        speculator.observe(sequence, length, length)
        lengths.append(length)
    assert lengths == sorted(lengths)
    assert 1 <= lengths[0] < 8
    assert lengths[-1] == 8


def test_what_is_wrong_costs_half_a_hundredth() -> None:
    """Never right: after a while only probes are left, within their share of the time."""
    speculator, sequences = Speculator(SpeculativeConfig(), _model(1e-3)), [_sequence(0)]
    spent = []
    for _ in range(2000):
        lengths = _lengths(speculator, sequences)
        spent.append(sum(lengths) * 1e-3)
        for sequence, length in zip(sequences, lengths, strict=True):
            if length:
                speculator.observe(sequence, length, 0)
    assert sum(spent[100:]) <= 0.0055 * 21e-3 * 1900
    assert sum(spent[-500:]) > 0, "nothing is ever tried again"


def test_a_change_is_noticed() -> None:
    speculator, sequence = Speculator(SpeculativeConfig(), _model(1e-3)), _sequence()
    for _ in range(300):
        (length,) = _lengths(speculator, [sequence])
        if length:
            speculator.observe(sequence, length, 0)
    reached = 0
    for _ in range(100):
        (reached,) = _lengths(speculator, [sequence])
        if reached:
            speculator.observe(sequence, reached, reached)
    assert reached == 8


def test_what_drafts_cost_is_found_out_while_all_draft() -> None:
    """Four streams that never ran without drafts: a loss is not taken for the price of a step."""
    chance, model = random.Random(0), StepCostModel()
    for _ in range(3):
        model.observe(StepWork(decode_rows=1), 0.5e-3)
    config = SpeculativeConfig(method="heads", draft_heads="x", max_draft_tokens=3)
    speculator = Speculator(config, model, lambda sequence: True)
    sequences = [_sequence(i) for i in range(4)]
    drafted = []
    for _ in range(300):
        lengths = _lengths(speculator, sequences)
        for sequence, length in zip(sequences, lengths, strict=True):
            if length:
                speculator.observe(sequence, length, min(length, chance.choice((0, 2))))
        work = StepWork(decode_rows=4, drafted_tokens=sum(lengths), decode_context=400)
        # A pass of the heads costs the same for any number of rows.
        seconds = 0.7e-3 + 0.3e-3 * max(lengths) + 0.05e-3 * sum(lengths)
        model.observe(work, seconds)
        drafted.append(sum(lengths))
    assert max(drafted[:10]) == 12
    assert sum(drafted[200:]) < 20


def test_a_sequence_that_loses_does_not_stop_the_others() -> None:
    speculator = Speculator(SpeculativeConfig(), _model(1e-3))
    good, bad = _sequence(0), _sequence(1)
    for _ in range(60):
        lengths = _lengths(speculator, [good, bad])
        speculator.observe(good, lengths[0], lengths[0])
        if lengths[1]:
            speculator.observe(bad, lengths[1], 0)
    assert _lengths(speculator, [good, bad])[0] == 8
    assert _lengths(speculator, [good, bad])[1] <= 1


def test_a_batch_bound_by_arithmetic_is_left_alone() -> None:
    """16 rows in 36 ms, and each drafted token takes 3 more: even a sure one would not pay."""
    speculator = Speculator(SpeculativeConfig(), _model(3e-3))
    sequences = [_sequence(i) for i in range(16)]
    for sequence in sequences:
        speculator.observe(sequence, 8, 8)
    total = sum(sum(_lengths(speculator, sequences)) for _ in range(300))
    assert total * 3e-3 <= 0.0055 * 300 * 36e-3
    assert _lengths(speculator, sequences[:1]) != [0], "alone it pays"


@given(
    budget=st.integers(0, 12),
    max_tokens=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    drafted_cost=st.floats(0, 5e-3),
)
@settings(deadline=None)
def test_bounds(budget: int, max_tokens: list[int], drafted_cost: float) -> None:
    """Never more than the budget, the config's limit, and what max_tokens leaves."""
    config = SpeculativeConfig(max_draft_tokens=5)
    speculator = Speculator(config, _model(drafted_cost))
    sequences = [_sequence(i, most) for i, most in enumerate(max_tokens)]
    for _ in range(3):
        lengths = _lengths(speculator, sequences, budget)
        assert sum(lengths) <= budget
        for length, most in zip(lengths, max_tokens, strict=True):
            assert length <= min(5, most - 1)


def test_nothing_is_drafted_before_a_step_was_measured() -> None:
    assert _lengths(Speculator(SpeculativeConfig(), StepCostModel()), [_sequence()]) == [0]


@given(
    drafted=st.lists(st.integers(0, 2), max_size=6),
    chosen=st.lists(st.one_of(st.none(), st.integers(0, 2)), min_size=7, max_size=7),
)
def test_what_is_kept_is_what_would_have_been_sampled(
    drafted: list[int], chosen: list[int | None]
) -> None:
    choices = [None if c is None else Sampled(c) for c in chosen[: len(drafted) + 1]]
    kept = [choice.token_id for choice in keep_right(drafted, choices)]
    assert kept == chosen[: len(kept)]
    assert kept[:-1] == drafted[: max(len(kept) - 1, 0)]
    complete = len(kept) == len(choices) or choices[len(kept)] is None
    refused = bool(kept) and kept != drafted[: len(kept)]
    assert complete or refused


@pytest.mark.parametrize("changes", [{"max_ngram": 1}, {"max_draft_tokens": 0}])
def test_a_bad_config_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"max_ngram|max_draft_tokens"):
        SpeculativeConfig.model_validate(changes)
