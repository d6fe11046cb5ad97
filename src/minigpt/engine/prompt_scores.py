"""Read what a request wants of its prompt from one chunk's hidden states."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minigpt.engine.batch import Chunk
from minigpt.engine.choice import Sampled

_ROWS = 32
"""Positions whose logits exist at once: 6 MB in float32 at a vocabulary of 50,000."""


def read_prompt(hidden: Tensor, chunk: Chunk, project: Callable[[Tensor], Tensor]) -> None:
    """Let a sequence's reader see the positions of a chunk that it has not seen.

    Args:
        hidden: (chunk.length, C), after the final norm.
        chunk: Of a sequence with a `reader`.
        project: From (R, C) hidden states to (R, V) logits.

    Raises:
        FloatingPointError: A log-probability is not finite.
    """
    sequence, reader = chunk.sequence, chunk.sequence.reader
    assert reader is not None
    first, stop = reader.num_read, min(chunk.stop, sequence.num_prompt_tokens)
    if first >= stop:
        return
    assert chunk.start <= first, "a position was not computed: nothing to read it from"
    if reader.num_logprobs is not None:
        scores: list[Sampled] = []
        for begin, end in scored_positions(chunk):
            rows = hidden[begin - chunk.start : end - chunk.start]
            targets = sequence.token_ids[begin + 1 : end + 1]
            logits = project(rows).float()
            scores += score(logits, targets, reader.num_logprobs)
            if reader.observe is not None:
                reader.observe(begin, logits)
        reader.scores += scores
    rows = hidden[first - chunk.start : stop - chunk.start]
    if reader.pooling == "mean":
        total = rows.sum(dim=0, dtype=torch.float64).cpu().numpy()
        reader.pooled = total if reader.pooled is None else reader.pooled + total
    elif reader.pooling == "last":
        reader.pooled = rows[-1].double().cpu().numpy()
    if reader.pooled is not None and not np.isfinite(reader.pooled).all():
        raise FloatingPointError("the prompt's hidden states are not finite")
    reader.num_read = stop


def scored_positions(chunk: Chunk) -> list[tuple[int, int]]:
    """Return the positions that `read_prompt` projects, (first, stop), one call after another."""
    sequence, reader = chunk.sequence, chunk.sequence.reader
    if reader is None or reader.num_logprobs is None:
        return []
    stop = min(chunk.stop, sequence.num_prompt_tokens - 1)
    return [(begin, min(begin + _ROWS, stop)) for begin in range(reader.num_read, stop, _ROWS)]


def score(logits: Tensor, tokens: list[int], num_alternatives: int) -> list[Sampled]:
    """Return the log-probabilities of given tokens.

    Args:
        logits: (R, V) float32.
        tokens: The R tokens that came.
        num_alternatives: How many of the likeliest to list with each.

    Raises:
        FloatingPointError: One is not finite.
    """
    normalizer = logits.logsumexp(dim=-1, keepdim=True)
    chosen = torch.tensor(tokens, device=logits.device).unsqueeze(-1)
    logprobs = (logits.gather(-1, chosen) - normalizer).squeeze(-1)
    if not bool(logprobs.isfinite().all()):
        raise FloatingPointError("the prompt's log-probabilities are not finite")
    top = logits.topk(min(num_alternatives, logits.shape[-1]), dim=-1)
    values, ids = (top.values - normalizer).tolist(), top.indices.tolist()
    return [
        Sampled(token, logprob, tuple(zip(its_ids, its_values, strict=True)))
        for token, logprob, its_ids, its_values in zip(
            tokens, logprobs.tolist(), ids, values, strict=True
        )
    ]
