"""Whether drawn answers are distributed as the model says, drafted for or not."""

from __future__ import annotations

from collections import Counter

import torch
from tests.engine.conftest import Logits

from minigpt.api.requests import Request, SamplingParams
from minigpt.engine.engine import Engine
from minigpt.model.decoder import Decoder

_PROMPT, _TEMPERATURE, _DRAWS = [1, 2, 3, 1, 2, 3, 1, 2], 0.9, 3000


def check_distribution(drafting: Engine, model: Decoder, full_logits: Logits) -> None:
    """G-test over the next three tokens, drafted for on the way, against the exact chances.

    Args:
        drafting: With room for 100 sequences of the model.
        model: Of few tokens.
        full_logits: The fixture.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    for number in range(_DRAWS // 100):
        sampling = SamplingParams(
            ignore_eos=True, seed=number, temperature=_TEMPERATURE, max_tokens=4
        )
        drafting.add(Request(id=str(number), prompt_token_ids=_PROMPT, n=100, sampling=sampling))
        answers: dict[int, list[int]] = {}
        while drafting.has_work:
            for delta in drafting.step():
                answers.setdefault(delta.index, []).extend(delta.token_ids)
        counts.update(tuple(tokens[:3]) for tokens in answers.values())
    assert drafting.stats().accepted_tokens > _DRAWS / 20, "hardly anything was drafted"
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tokens, chance in expected.items():
            logits = full_logits(model, _PROMPT + list(tokens))[-1]
            for token, share in enumerate((logits / _TEMPERATURE).softmax(-1).tolist()):
                if chance * share > 1e-12:
                    longer[*tokens, token] = chance * share
        expected = longer
    likely = {tokens for tokens, chance in expected.items() if chance * _DRAWS >= 5}
    observed = [counts[tokens] for tokens in likely]
    chances = [expected[tokens] for tokens in likely]
    observed.append(_DRAWS - sum(observed))
    chances.append(1 - sum(chances))
    g = 2 * sum(
        o * torch.tensor(o / (_DRAWS * c)).log().item()
        for o, c in zip(observed, chances, strict=True)
        if o
    )
    freedom = len(observed) - 1
    # Wilson and Hilferty: the cube root of chi-square over its freedom is nearly normal.
    z = ((g / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert freedom > 20
    assert z < 4, (g, freedom)
