from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minigpt.api.requests import Request, SamplingParams
from minigpt.engine.sampler import _invert, sample, uniform
from minigpt.engine.sequence import Sequence
from minigpt.engine.shaping import Shaping


def _sequence(position: int = 0, index: int = 0, **sampling: Any) -> Sequence:
    params = SamplingParams(**sampling)
    request = Request(id="r", prompt_token_ids=[1], sampling=params)
    sequence = Sequence.from_request(request, index, 0, seed=params.seed or 0)
    sequence.token_ids += [0] * position
    return sequence


def _tokens(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    chosen = sample(logits, sequences)
    return [choice.token_id for choice in chosen if choice is not None]


def _draws(logits: list[float], count: int, **sampling: Any) -> Tensor:
    """Return how often each token is drawn over `count` positions."""
    rows = torch.tensor([logits]).expand(count, -1)
    sequences = [_sequence(position, seed=5, **sampling) for position in range(count)]
    return torch.bincount(torch.tensor(_tokens(rows, sequences)), minlength=len(logits))


def test_uniform_is_a_fixed_function_and_spread_evenly() -> None:
    assert uniform(1, 2, 3) == 0.5337969999670171  # recorded answers depend on it
    values = torch.tensor([uniform(7, 0, i) for i in range(20_000)])
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, bins=20, min=0, max=1)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_square < 50  # 19 degrees of freedom: exceeded once in 7,000
    distinct = {uniform(s, i, p) for s in (-1, 0, 1, 2**64 - 2) for i in (0, 1) for p in (0, 1)}
    assert len(distinct) == 16


def test_draws_follow_the_distribution() -> None:
    logits = [0.0, 1.0, 2.0, -1.0, 0.5]
    counts = _draws(logits, 8000, temperature=0.7)
    expected = 8000 * (torch.tensor(logits) / 0.7).softmax(-1)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 23  # 4 degrees of freedom: exceeded once in 8,000


@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.sampled_from([1, 3, 255, 256, 257, 700, 3000]),
    positive=st.sampled_from([1, 2, 40, 3000]),
)
@settings(max_examples=120, deadline=None)
def test_inversion_equals_a_plain_cumulative_sum(seed: int, vocab_size: int, positive: int) -> None:
    """Up to rounding, and never a place of zero weight, at both ends of [0, 1) too."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(8, vocab_size)
    places = torch.randperm(vocab_size, generator=generator)[:positive]
    weights[:, places] = torch.rand(8, len(places), generator=generator) + 1e-6
    uniforms = torch.rand(8, 1, generator=generator, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, 1 - 2**-53
    found = _invert(weights, uniforms)
    assert (weights.gather(-1, found.unsqueeze(-1)) > 0).all()
    cumulative = weights.double().cumsum(-1)
    share = cumulative / cumulative[:, -1:]
    upper = share.gather(-1, found.unsqueeze(-1))
    lower = upper - weights.gather(-1, found.unsqueeze(-1)) / cumulative[:, -1:]
    assert (uniforms <= upper + 1e-6).all()
    assert (uniforms >= lower - 1e-6).all()


def test_top_k_keeps_the_likeliest_renormalised() -> None:
    counts = _draws([0.0, 3.0, 1.0, 2.0], 4000, top_k=2)
    assert counts[0] == counts[2] == 0
    assert counts[1] / 4000 == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert (_draws(logits, 300, top_p=0.0) > 0).tolist() == [True, False, False, False]
    assert (_draws(logits, 300, top_p=0.5) > 0).tolist() == [True, True, False, False]
    assert (_draws(logits, 300, top_p=0.71) > 0).tolist() == [True, True, True, False]
    # top_k acts first: of 0.4 and 0.3 alone the first has 0.57 of the probability.
    assert (_draws(logits, 300, top_k=2, top_p=0.56) > 0).tolist() == [True, False, False, False]


def _allowed(logits: Tensor, top_k: int, top_p: float) -> set[int]:
    """The tokens that may be drawn, by definition, with a full sort."""
    order = logits.argsort(descending=True)[: top_k or None]
    before = logits[order].double().softmax(-1).cumsum(-1).roll(1)
    before[0] = 0
    kept = before < top_p
    kept[0] = True
    return set(order[kept].tolist())


@given(
    seed=st.integers(0, 1000),
    vocab_size=st.sampled_from([3, 50, 3000]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 5, 5000]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 0.999, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_only_allowed_tokens_are_drawn(
    seed: int, vocab_size: int, spread: float, top_k: int, top_p: float
) -> None:
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    sequences = [_sequence(p, seed=seed, top_k=top_k, top_p=top_p) for p in range(20)]
    drawn = set(_tokens(logits.expand(20, -1), sequences))
    # One rank of slack: a threshold in float32 may fall to either side of top_p.
    assert drawn <= _allowed(logits, top_k, min(top_p + 1e-5, 1.0))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(0))
    sequences = [
        _sequence(3, temperature=0),
        _sequence(3, seed=1, temperature=2.0),
        _sequence(4, seed=1, top_k=7, logprobs=3),
        _sequence(4, seed=1, top_p=0.8),
        _sequence(4, index=1, seed=1, top_p=0.8, top_k=100),
        _sequence(0, seed=9, logprobs=0),
    ]
    together = sample(logits, sequences)
    alone = [sample(logits[i : i + 1], [s])[0] for i, s in enumerate(sequences)]
    assert together == alone


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-300])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.randn(4, 100)
    tokens = _tokens(logits, [_sequence(seed=1, temperature=temperature)] * 4)
    assert tokens == logits.argmax(-1).tolist()


def test_logprobs_are_those_of_the_model_before_temperature_and_filters() -> None:
    logits = torch.randn(1, 100)
    (choice,) = sample(logits, [_sequence(seed=3, temperature=0.5, top_k=3, logprobs=4)])
    assert choice is not None
    expected = logits[0].log_softmax(-1)
    assert choice.logprob == pytest.approx(expected[choice.token_id].item(), abs=1e-6)
    best = expected.topk(4)
    assert [token for token, _ in choice.top] == best.indices.tolist()
    assert [value for _, value in choice.top] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_rows_in_succession_are_for_successive_tokens() -> None:
    """Each is drawn as if the tokens before it were there already."""
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
    one, other = _sequence(3, seed=1), _sequence(8, index=1, seed=1)
    found = _tokens(logits, [one, one, one, other, other, one])
    alone = [_sequence(3 + i, seed=1) for i in range(3)]
    alone += [_sequence(8 + i, index=1, seed=1) for i in range(2)]
    assert found == _tokens(logits, [*alone, _sequence(3, seed=1)])
    ahead = sample(logits[1:3], [one, one], ahead=1)
    assert [choice.token_id for choice in ahead if choice is not None] == found[1:3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_broken_logits_yield_no_token_and_spare_the_others(bad: float) -> None:
    logits = torch.randn(3, 10)
    logits[1, 4] = bad
    sequences = [_sequence(temperature=0), _sequence(seed=1, logprobs=1), _sequence(seed=1)]
    first, broken, last = sample(logits, sequences)
    assert broken is None
    assert first is not None
    assert last is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_of_shaped_rows_yield_no_token_either(bad: float) -> None:
    logits = torch.randn(3, 10)
    logits[1, 4] = bad
    sequences = [_sequence(seed=i, repetition_penalty=1.5, logit_bias={4: 1.0}) for i in range(3)]
    for sequence in sequences:
        sequence.shaping = Shaping.of(sequence.sampling, [1], [])
    first, broken, last = sample(logits, sequences)
    assert broken is None
    assert first is not None
    assert last is not None
