"""Sampled frequencies match the distribution that each option, and each combination, defines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.api.requests import Request, SamplingParams
from minigpt.engine.penalties import shape
from minigpt.engine.sampler import sample
from minigpt.engine.sequence import Sequence
from minigpt.engine.shaping import Shaping

PROMPT = [0, 3, 3, 5]
GENERATED = [1, 3, 1, 1, 7]
EOS = 9
LOGITS = [1.0, 2.0, -0.5, 1.5, 0.3, -1.0, 0.8, 2.2, 0.0, 1.2]
DRAWS = 6000


def _sequences(count: int, generated: list[int], **sampling: Any) -> list[Sequence]:
    """Sequences with the same history; their indices make their random numbers differ."""
    params = SamplingParams(**({"max_tokens": 100} | sampling))
    request = Request(id="r", prompt_token_ids=PROMPT, sampling=params)
    shaping = Shaping.of(params, PROMPT, [EOS])
    if shaping is not None:
        for token in generated:
            shaping.observe(token)
    sequences = []
    for index in range(count):
        sequence = Sequence.from_request(request, index, index, seed=17)
        sequence.token_ids += generated
        sequence.shaping = shaping
        sequences.append(sequence)
    return sequences


def _counts(generated: list[int], **sampling: Any) -> npt.NDArray[np.float64]:
    """How often each token is drawn for the same logits and history."""
    rows = torch.tensor([LOGITS]).expand(DRAWS, -1)
    chosen = sample(rows, _sequences(DRAWS, generated, **sampling))
    tokens = [choice.token_id for choice in chosen if choice is not None]
    return np.bincount(tokens, minlength=len(LOGITS)).astype(np.float64)


def _defined(
    generated: list[int],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    logit_bias: dict[int, float] | None = None,
    min_tokens: int = 0,
) -> npt.NDArray[np.float64]:
    """The probabilities by definition, one token at a time, recounting the history."""
    logits = list(LOGITS)
    for token in range(len(logits)):
        logits[token] += (logit_bias or {}).get(token, 0.0)
        if token in PROMPT or token in generated:
            scale = 1 / repetition_penalty if logits[token] > 0 else repetition_penalty
            logits[token] *= scale
        logits[token] -= frequency_penalty * generated.count(token)
        logits[token] -= presence_penalty * (token in generated)
    if len(generated) < min_tokens:
        logits[EOS] = -math.inf
    weights = np.exp(np.array(logits) / temperature)
    weights[weights < min_p * weights.max()] = 0
    if top_k:
        weights[np.argsort(-weights)[top_k:]] = 0
    probabilities: npt.NDArray[np.float64] = weights / weights.sum()
    order = np.argsort(-probabilities)
    before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[before >= top_p]] = 0
    probabilities /= probabilities.sum()
    return probabilities


def _misfit(counts: npt.NDArray[np.float64], probabilities: npt.NDArray[np.float64]) -> float:
    """The G statistic over its critical value (exceeded by chance once in 10,000)."""
    expected = probabilities * counts.sum()
    if counts[expected == 0].any():
        return math.inf
    seen = counts > 0
    g = 2 * float((counts[seen] * np.log(counts[seen] / expected[seen])).sum())
    freedom = int((expected > 0).sum()) - 1
    # Wilson and Hilferty's approximation of the chi-square quantile.
    spread = 2 / (9 * freedom)
    return g / (freedom * (1 - spread + 3.72 * math.sqrt(spread)) ** 3)


OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "min_p": {"min_p": 0.3},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "repetition": {"repetition_penalty": 1.6},
    "encouraged repetition": {"repetition_penalty": 0.7},
    "frequency": {"frequency_penalty": 0.7},
    "presence": {"presence_penalty": 1.1},
    "negative": {"frequency_penalty": -0.3, "presence_penalty": -0.4},
    "bias": {"logit_bias": {2: 3.0, 7: -100.0}},
    "min_tokens": {"min_tokens": 6},
    "filters": {"temperature": 1.3, "min_p": 0.1, "top_k": 6, "top_p": 0.85},
    "penalties": {
        "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2,
        "logit_bias": {1: 2.0, 5: 4.0},
    },
    "everything": {
        "temperature": 0.8, "min_p": 0.05, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.2,
        "frequency_penalty": 0.3, "presence_penalty": 0.3, "logit_bias": {9: 5.0, 4: 1.5},
        "min_tokens": 20,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_frequencies_match_the_definition(name: str) -> None:
    options = OPTIONS[name]
    counts = _counts(GENERATED, **options)
    assert _misfit(counts, _defined(GENERATED, **options)) < 1
    assert _misfit(counts, _defined(GENERATED)) > 1, "the test tells this option from none"


def test_min_tokens_is_over_once_they_are_there() -> None:
    early = _counts(GENERATED, min_tokens=6)
    late = _counts(GENERATED, min_tokens=5)
    assert early[EOS] == 0
    assert _misfit(late, _defined(GENERATED)) < 1


def test_min_tokens_rules_out_stop_tokens_too() -> None:
    counts = _counts([1], min_tokens=2, stop_token_ids=(7, 1), ignore_eos=True)
    assert counts[[7, 1, EOS]].tolist() == [0, 0, 0]


def test_greedy_obeys_them_too() -> None:
    likeliest = {
        (): 7,
        (("logit_bias", ((4, 50.0),)),): 4,
        (("presence_penalty", 2.0),): 3,
        (("repetition_penalty", 9.0),): EOS,
    }
    for options, token in likeliest.items():
        sampling: dict[str, Any] = {
            key: dict(value) if isinstance(value, tuple) else value for key, value in options
        }
        history = [7, 7, 1] if "presence_penalty" in sampling else [7, 1]
        (choice,) = sample(
            torch.tensor([LOGITS]), _sequences(1, history, temperature=0, **sampling)
        )
        assert choice is not None
        assert choice.token_id == token, sampling


def test_logprobs_stay_the_models_own() -> None:
    (choice,) = sample(
        torch.tensor([LOGITS]), _sequences(1, GENERATED, logprobs=2, **OPTIONS["everything"])
    )
    assert choice is not None
    expected = torch.tensor(LOGITS).log_softmax(-1)
    assert choice.logprob == pytest.approx(expected[choice.token_id].item(), abs=1e-6)


def test_defaults_have_no_shaping_and_leave_the_logits_alone() -> None:
    assert Shaping.of(SamplingParams(), PROMPT, [EOS]) is None
    logits = torch.tensor([LOGITS, LOGITS])
    plain, shaped = _sequences(1, GENERATED)[0], _sequences(1, GENERATED, frequency_penalty=2)[0]
    sample(logits, [plain, shaped])
    assert logits.tolist() == torch.tensor([LOGITS, LOGITS]).tolist()


@given(
    data=st.data(),
    rows=st.integers(1, 5),
    history=st.lists(st.integers(0, 9), max_size=80),
)
@settings(max_examples=60, deadline=None)
def test_each_row_is_shaped_as_alone_and_by_definition(
    data: st.DataObject, rows: int, history: list[int]
) -> None:
    options = [data.draw(st.sampled_from(sorted(OPTIONS))) for _ in range(rows)]
    keys = ("repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias")
    wanted = [{k: v for k, v in OPTIONS[name].items() if k in keys} for name in options]
    wanted = [option or {"presence_penalty": 0.5} for option in wanted]
    sequences = [_sequences(1, history, **option)[0] for option in wanted]
    together = torch.tensor([LOGITS] * rows)
    shape(together, sequences)
    for row, (sequence, option) in enumerate(zip(sequences, wanted, strict=True)):
        alone = torch.tensor([LOGITS])
        shape(alone, [sequence])
        assert together[row].tolist() == alone[0].tolist()
        with np.errstate(divide="ignore"):
            expected = np.log(_defined(history, **option))
        found = together[row].double().log_softmax(-1).numpy()
        assert found[expected > -80] == pytest.approx(expected[expected > -80], abs=1e-3)
