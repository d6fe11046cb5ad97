"""Choose the next tokens from logits; random numbers depend on (seed, index, position) alone.

Order, for each row: what `penalties.shape` does; temperature; min-p; top-k; top-p over what is
left; one draw. Log-probabilities are the model's own, before all of it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from minigpt.engine.choice import Sampled
from minigpt.engine.penalties import shape
from minigpt.engine.sequence import Sequence

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""


def uniform(seed: int, index: int, position: int) -> float:
    """Return a number in [0, 1) with 53 random bits, a pure function of its arguments.

    Counter-based, so that it is the same whatever the batch, the chunking or the preemptions
    were: a keyed hash (BLAKE2b, RFC 7693) of the counter.

    Args:
        seed: The request's seed, any integer (taken modulo 2**64).
        index: Which of the request's sequences.
        position: How many tokens the sequence has generated before this one.
    """
    key = struct.pack("<Q", seed % (1 << 64))
    digest = hashlib.blake2b(struct.pack("<QQ", index, position), digest_size=8, key=key)
    return (int.from_bytes(digest.digest(), "little") >> 11) / (1 << 53)


def sample(logits: Tensor, sequences: SequenceOf[Sequence]) -> list[Sampled | None]:
    """Choose the next token of each sequence.

    Args:
        logits: (B, V) float32, row i for `sequences[i]`.
        sequences: Whose sampling parameters, seed and position apply.

    Returns:
        One choice a row; None where the logits hold a NaN or an infinity.
    """
    assert logits.dtype is torch.float32
    assert logits.shape[0] == len(sequences)
    finite = logits.sum(dim=-1).isfinite().tolist()
    shaped = [row for row, s in enumerate(sequences) if s.shaping is not None and finite[row]]
    if len(shaped) < len(sequences):
        unshaped = [good and s.shaping is None for good, s in zip(finite, sequences, strict=True)]
        tokens = _choose(logits, sequences, unshaped)
    else:
        tokens = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
    if shaped:
        theirs = [sequences[row] for row in shaped]
        copies = logits[shaped]
        shape(copies, theirs)
        tokens[shaped] = _choose(copies, theirs, [True] * len(shaped))
    sampled: list[Sampled | None] = [
        Sampled(token) if good else None
        for token, good in zip(tokens.tolist(), finite, strict=True)
    ]
    _add_logprobs(sampled, logits, sequences)
    return sampled


def _choose(logits: Tensor, sequences: SequenceOf[Sequence], usable: SequenceOf[bool]) -> Tensor:
    """Return a token a row, the likeliest or a drawn one; of rows not usable any."""
    tokens = logits.argmax(dim=-1)
    random_rows = [
        row
        for row, sequence in enumerate(sequences)
        if usable[row] and sequence.sampling.temperature >= GREEDY_BELOW
    ]
    if random_rows:
        chosen = _draw(logits[random_rows], [sequences[row] for row in random_rows])
        tokens[random_rows] = chosen
    return tokens


def _draw(logits: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
    """Sample a token a row by the inverse of the cumulative distribution."""
    temperatures = [s.sampling.temperature for s in sequences]
    logits = logits / logits.new_tensor(temperatures).unsqueeze(-1)
    logits = _keep_min_p(logits, [s.sampling.min_p for s in sequences])
    logits = _keep_top_k(logits, [s.sampling.top_k for s in sequences])
    probabilities = logits.softmax(dim=-1)
    probabilities = _keep_top_p(probabilities, [s.sampling.top_p for s in sequences])
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1]
    draws = [uniform(s.seed, s.index, s.num_output_tokens) for s in sequences]
    # Below the total, or rounding could point past the last token of non-zero probability.
    target = torch.minimum(
        total * torch.tensor(draws, dtype=torch.float64, device=total.device),
        total.nextafter(torch.zeros_like(total)),
    )
    return torch.searchsorted(cumulative, target.unsqueeze(-1), right=True).squeeze(-1)


def _keep_min_p(logits: Tensor, min_p: SequenceOf[float]) -> Tensor:
    """Set to -inf what is less likely than `min_p[row]` times the likeliest (arXiv 2407.01082)."""
    if not any(min_p):
        return logits
    shares = logits.new_tensor(min_p).unsqueeze(-1)
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + shares.log(), -math.inf)


def _keep_top_k(logits: Tensor, top_k: SequenceOf[int]) -> Tensor:
    """Set all but the `top_k[row]` largest logits to -inf (equals of the last one stay)."""
    vocab_size = logits.shape[-1]
    rows = [row for row, k in enumerate(top_k) if 0 < k < vocab_size]
    if not rows:
        return logits
    largest = logits[rows].topk(max(top_k[row] for row in rows)).values
    last = torch.tensor([top_k[row] - 1 for row in rows], device=logits.device)
    threshold = logits.new_full((len(top_k), 1), -math.inf)
    threshold[rows] = largest.gather(-1, last.unsqueeze(-1))
    return logits.masked_fill(logits < threshold, -math.inf)


def _keep_top_p(probabilities: Tensor, top_p: SequenceOf[float]) -> Tensor:
    """Zero all but the smallest set of tokens whose probability reaches `top_p[row]`, in place.

    Sorting a vocabulary costs far more than anything else here, so only the tokens above a bound
    are sorted; if those do not reach `top_p`, the bound is lowered. Below the last one a whole
    vocabulary holds less than what may be left out.
    """
    vocab_size = probabilities.shape[-1]
    for row, wanted in enumerate(top_p):
        if wanted >= 1:
            continue
        its = probabilities[row]
        for share in (64, 2048, 2 * vocab_size):
            candidates = its[its >= (1 - wanted) / share]
            if len(candidates) and float(candidates.sum()) >= wanted:
                break
        candidates = candidates.sort(descending=True).values
        before = candidates.cumsum(dim=-1) - candidates
        last = (before < wanted).sum().clamp(min=1) - 1
        its.masked_fill_(its < candidates[last], 0)
    return probabilities


def _add_logprobs(
    sampled: list[Sampled | None], logits: Tensor, sequences: SequenceOf[Sequence]
) -> None:
    """Replace the choices of those sequences that report log-probabilities."""
    rows = [
        row
        for row, sequence in enumerate(sequences)
        if sampled[row] is not None and sequence.sampling.logprobs is not None
    ]
    if not rows:
        return
    logprobs = logits[rows].log_softmax(dim=-1)
    counts = [sequences[row].sampling.logprobs or 0 for row in rows]
    values, ids = logprobs.topk(min(max(counts), logits.shape[-1]))
    alternatives = zip(ids.tolist(), values.tolist(), strict=True)
    for i, (row, (top_ids, top_values)) in enumerate(zip(rows, alternatives, strict=True)):
        choice = sampled[row]
        assert choice is not None
        sampled[row] = Sampled(
            choice.token_id,
            float(logprobs[i, choice.token_id]),
            tuple(zip(top_ids, top_values, strict=True))[: counts[i]],
        )
