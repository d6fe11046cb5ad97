from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from minigpt.core.errors import DataError
from minigpt.evaluate import likelihood
from minigpt.evaluate.likelihood import (
    DocumentScore,
    Span,
    bits_per_byte,
    score_documents,
    score_spans,
)
from minigpt.model.attention import CausalAttention
from minigpt.model.decoder import Decoder

from .conftest import EOS, VOCAB, make_decoder

BYTES = np.arange(VOCAB) % 5


def document(length: int, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(1, VOCAB, size=length).astype(np.uint16)
    tokens[0] = EOS
    return tokens


def reference_nll(model: Decoder, tokens: np.ndarray) -> float:
    """One window, no batching, no padding, whole logits."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    positions = torch.arange(ids.shape[1] - 1)[None]
    attention = CausalAttention(sliding_window=model.config.sliding_window)
    with torch.no_grad():
        logits = model.logits(model(ids[:, :-1], positions, attention))
    return float(functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}, {"position": "learned"}])
@pytest.mark.parametrize("batch_tokens", [1, 24, 8192])
def test_scores_equal_each_document_by_itself(
    changes: dict[str, object], batch_tokens: int
) -> None:
    model = make_decoder(**changes)
    documents = [document(length, seed=length) for length in (9, 2, 17, 5, 5, 12, 3)]
    scores = score_documents(model, documents, BYTES, context_length=16, batch_tokens=batch_tokens)
    for tokens, score in zip(documents, scores, strict=True):
        assert score.nll_nats == pytest.approx(reference_nll(model, tokens), rel=1e-5)
        assert score.tokens == len(tokens) - 1
        assert score.bytes == BYTES[tokens[1:]].sum()


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 60), context=st.integers(1, 16))
def test_a_long_document_is_the_sum_of_its_windows(length: int, context: int) -> None:
    model = make_decoder()
    tokens = document(length)
    (score,) = score_documents(model, [tokens], BYTES, context_length=context)
    windows = [tokens[at : at + context + 1] for at in range(0, length - 1, context)]
    expected = sum(reference_nll(model, window) for window in windows)
    assert sum(len(window) - 1 for window in windows) == score.tokens == length - 1
    assert score.nll_nats == pytest.approx(expected, rel=1e-5)


def test_logits_in_parts_change_nothing(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [document(length) for length in (16, 7)]
    whole = score_documents(decoder, documents, BYTES, context_length=16)
    monkeypatch.setattr(likelihood, "_MAX_LOGITS", 3 * VOCAB)
    parts = score_documents(decoder, documents, BYTES, context_length=16)
    assert [s.nll_nats for s in parts] == pytest.approx([s.nll_nats for s in whole], rel=1e-6)


def test_spans_count_only_their_targets_and_tell_greedy(decoder: Decoder) -> None:
    prompt = document(6)
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    with torch.no_grad():
        hidden = decoder(ids, torch.arange(6)[None], CausalAttention())
        best = int(decoder.logits(hidden[:, -1]).argmax())
    other = (best + 1) % VOCAB
    spans = [Span(np.append(prompt, token), 6) for token in (best, other)]
    scores = score_spans(decoder, spans, greedy=True)
    assert [score.greedy for score in scores] == [True, False]
    assert scores[0].nll_nats < scores[1].nll_nats
    assert scores[0].nll_nats == pytest.approx(
        reference_nll(decoder, spans[0].tokens) - reference_nll(decoder, prompt), rel=1e-4
    )


def test_bits_per_byte_of_a_uniform_model() -> None:
    model = make_decoder()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    tokens = np.concatenate([[EOS], np.full(40, 3)])
    scores = score_documents(model, [tokens], np.full(VOCAB, 2), context_length=16)
    assert bits_per_byte(scores) == pytest.approx(math.log2(VOCAB) / 2)


def test_no_bytes_is_refused() -> None:
    with pytest.raises(DataError, match="no bytes of text"):
        bits_per_byte([DocumentScore(1.0, 1, 0)])
