from __future__ import annotations

import numpy as np
import pytest
import torch

from minigpt.evaluate import generate as module
from minigpt.evaluate.generate import generate
from minigpt.model.attention import CausalAttention
from minigpt.model.decoder import Decoder

from .conftest import EOS, make_decoder

PROMPTS = [[3, 4, 5], [7], [1, 2, 3, 4, 5, 6, 7, 8], [9, 9]]


def greedy_without_cache(model: Decoder, prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < min(model.config.context_length, len(prompt) + max_tokens):
        ids = torch.tensor([tokens])
        attention = CausalAttention(sliding_window=model.config.sliding_window)
        with torch.no_grad():
            hidden = model(ids, torch.arange(len(tokens))[None], attention)
            token = int(model.logits(hidden[0, -1]).argmax())
        if token == EOS:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 3}, {"position": "learned"}])
def test_greedy_equals_decoding_without_a_cache(changes: dict[str, object]) -> None:
    model = make_decoder(**changes)
    completions = generate(model, PROMPTS, max_tokens=12)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.tokens == greedy_without_cache(model, prompt, 12)
        assert len(prompt) + len(completion.tokens) <= model.config.context_length


def test_a_seeded_sample_does_not_depend_on_its_batch(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = generate(decoder, PROMPTS, max_tokens=8, temperature=1.0, seed=5)
    monkeypatch.setattr(module, "_BATCH", 1)
    alone = generate(decoder, PROMPTS, max_tokens=8, temperature=1.0, seed=5)
    assert together == alone
    assert generate(decoder, PROMPTS, max_tokens=8, temperature=1.0, seed=6) != alone


def test_sampling_follows_the_distribution() -> None:
    model = make_decoder(vocab_size=4, eos_token_id=None)
    draws = generate(model, [[1]] * 4000, max_tokens=1, temperature=1.0)
    found = np.bincount([draw.tokens[0] for draw in draws], minlength=4) / len(draws)
    with torch.no_grad():
        hidden = model(torch.tensor([[1]]), torch.zeros(1, 1, dtype=torch.int64), CausalAttention())
        expected = model.logits(hidden[0, -1]).softmax(-1).numpy()
    # Four standard deviations of a share of 4,000 draws.
    assert np.abs(found - expected).max() < 4 * 0.5 / np.sqrt(4000)


def test_limits_end_of_text_and_stop() -> None:
    model = make_decoder()
    full = [1] * model.config.context_length
    (no_room,) = generate(model, [full], max_tokens=5)
    assert no_room.tokens == [] and not no_room.ended
    (stopped,) = generate(model, [[1]], max_tokens=9, stop=lambda tokens: len(tokens) == 2)
    assert len(stopped.tokens) == 2 and stopped.ended
    first = greedy_without_cache(model, [1], 1)[0]
    model.config = model.config.replace(eos_token_id=first)
    (ended,) = generate(model, [[1]], max_tokens=9)
    assert ended.tokens == [] and ended.ended
