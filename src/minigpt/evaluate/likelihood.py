"""How likely a model finds texts: exact negative log-likelihoods, batched by length.

A stored document is `[eos] + tokens`: the leading end-of-text is context and never a target.
A document longer than the context is cut into consecutive windows, each of which starts anew,
so that every token but the leading one is a target exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from minigpt.core.errors import DataError
from minigpt.core.telemetry import Progress
from minigpt.model.attention import CausalAttention
from minigpt.model.decoder import Decoder

_MAX_LOGITS = 1 << 24
"""Logits held at once (64 MB in float32), whatever the vocabulary and the batch."""


class DocumentScore(NamedTuple):
    """What a model thinks of one document."""

    nll_nats: float
    """Negative log-likelihood, summed over the document's targets."""
    tokens: int
    """Targets: the document's tokens without the leading end-of-text."""
    bytes: int
    """Bytes of text that the targets stand for; special tokens stand for none."""


@dataclass(frozen=True)
class Span:
    """Tokens to run through the model together, at most one more than the context holds."""

    tokens: np.ndarray
    first_target: int
    """Index of the first token that counts; at least 1, as the first has no prediction."""


class SpanScore(NamedTuple):
    """The likelihood of a span's targets given all that precedes them in the span."""

    nll_nats: float
    greedy: bool
    """Whether each target was the model's most likely token (False where not asked for)."""


def score_documents(
    model: Decoder,
    documents: Sequence[np.ndarray],
    byte_lengths: np.ndarray,
    *,
    context_length: int,
    batch_tokens: int = 8192,
    autocast_dtype: str | None = None,
    progress: Progress | None = None,
) -> list[DocumentScore]:
    """Score documents, each by itself: the result does not depend on what it is batched with.

    Args:
        model: The decoder; its parameters' device is used.
        documents: Token ids (length,), length at least 1, the leading end-of-text included.
        byte_lengths: Bytes that each token of the vocabulary stands for (vocab_size,).
        context_length: Tokens that the model sees at most, at least 1.
        batch_tokens: Tokens a forward pass holds, padding included; a bound on memory.
        autocast_dtype: "bfloat16" to run matrix products in it, None for the weights' own type.
        progress: Told the number of tokens after each forward pass.

    Returns:
        A score for each document, in order.
    """
    spans: list[Span] = []
    owners: list[int] = []
    for owner, document in enumerate(documents):
        for start in range(0, len(document) - 1, context_length):
            spans.append(Span(document[start : start + context_length + 1], 1))
            owners.append(owner)
    scores = score_spans(
        model,
        spans,
        batch_tokens=batch_tokens,
        autocast_dtype=autocast_dtype,
        progress=progress,
    )
    nll = np.zeros(len(documents))
    for owner, score in zip(owners, scores, strict=True):
        nll[owner] += score.nll_nats
    return [
        DocumentScore(float(total), len(document) - 1, int(byte_lengths[document[1:]].sum()))
        for total, document in zip(nll, documents, strict=True)
    ]


def bits_per_byte(scores: Sequence[DocumentScore]) -> float:
    """Return the sum of the NLLs in bits over the sum of the bytes.

    Raises:
        DataError: The documents hold no bytes.
    """
    total_bytes = sum(score.bytes for score in scores)
    if total_bytes == 0:
        raise DataError(
            f"{len(scores)} documents hold no bytes of text to score",
            remedy="prepare the dataset with a larger val_fraction",
        )
    return math.fsum(score.nll_nats for score in scores) / math.log(2) / total_bytes


def score_spans(
    model: Decoder,
    spans: Sequence[Span],
    *,
    batch_tokens: int = 8192,
    autocast_dtype: str | None = None,
    greedy: bool = False,
    progress: Progress | None = None,
) -> list[SpanScore]:
    """Score each span's targets; the other arguments are `score_documents`'s.

    Args:
        model: The decoder.
        spans: Spans of at least two tokens.
        batch_tokens: Tokens a forward pass holds, padding included.
        autocast_dtype: Type of matrix products, or None.
        greedy: Also find whether each target was the most likely token.
        progress: Told the number of tokens after each forward pass.
    """
    results: list[SpanScore | None] = [None] * len(spans)
    for batch in _batches_by_length(spans, batch_tokens):
        members = [spans[index] for index in batch]
        for index, score in zip(
            batch, _score_batch(model, members, autocast_dtype, greedy), strict=True
        ):
            results[index] = score
        if progress is not None:
            progress.advance(sum(len(span.tokens) - 1 for span in members))
    assert all(score is not None for score in results)
    return [score for score in results if score is not None]


def autocast(device: torch.device, dtype: str | None) -> AbstractContextManager[object]:
    """Return the context that runs matrix products in `dtype`; None and "float32" do nothing."""
    if dtype in (None, "float32"):
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, str(dtype)))


def _batches_by_length(spans: Sequence[Span], batch_tokens: int) -> Iterator[list[int]]:
    """Yield index groups, longest first, whose padded size stays within `batch_tokens`."""
    order = sorted(range(len(spans)), key=lambda index: -len(spans[index].tokens))
    start = 0
    while start < len(order):
        width = len(spans[order[start]].tokens) - 1
        rows = max(1, batch_tokens // width)
        yield order[start : start + rows]
        start += rows


@torch.no_grad()
def _score_batch(
    model: Decoder, spans: Sequence[Span], autocast_dtype: str | None, greedy: bool
) -> list[SpanScore]:
    device = next(model.parameters()).device
    width = max(len(span.tokens) for span in spans) - 1
    # Right padding is harmless: attention is causal and padded places are no targets.
    tokens = np.zeros((len(spans), width + 1), dtype=np.int64)
    is_target = np.zeros((len(spans), width), dtype=bool)
    for row, span in enumerate(spans):
        assert 1 <= span.first_target <= len(span.tokens), span
        tokens[row, : len(span.tokens)] = span.tokens
        is_target[row, span.first_target - 1 : len(span.tokens) - 1] = True
    ids = torch.from_numpy(tokens).to(device)
    mask = torch.from_numpy(is_target).to(device)
    positions = torch.arange(width, device=device).expand(len(spans), width)
    attention = CausalAttention(sliding_window=model.config.sliding_window)
    with autocast(device, autocast_dtype):
        hidden = model(ids[:, :-1], positions, attention)
        nll, hits = _target_nll(model, hidden[mask], ids[:, 1:][mask], greedy)
    rows = np.nonzero(is_target)[0]
    sums = np.bincount(rows, weights=nll.cpu().double().numpy(), minlength=len(spans))
    misses = np.bincount(rows, weights=(~hits).cpu().numpy(), minlength=len(spans))
    return [
        SpanScore(float(total), greedy and missed == 0)
        for total, missed in zip(sums, misses, strict=True)
    ]


def _target_nll(
    model: Decoder, hidden: Tensor, targets: Tensor, greedy: bool
) -> tuple[Tensor, Tensor]:
    """Return (N,) NLLs and (N,) "was the most likely" from hidden (N, C), in bounded memory."""
    rows = max(1, _MAX_LOGITS // model.config.vocab_size)
    losses, hits = [], []
    for part, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        logits = model.logits(part).float()
        losses.append(functional.cross_entropy(logits, wanted, reduction="none"))
        if greedy:
            hits.append(logits.argmax(-1) == wanted)
    nll = torch.cat(losses) if losses else hidden.new_zeros(0)
    return nll, torch.cat(hits) if hits else torch.ones_like(targets, dtype=torch.bool)
