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

_BLOCK = 256
"""Weights that are summed together when drawing."""


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


def sample(
    logits: Tensor, sequences: SequenceOf[Sequence], *, ahead: int = 0
) -> list[Sampled | None]:
    """Choose the next token of each sequence.

    Args:
        logits: (B, V) float32, row i for `sequences[i]`.
        sequences: Whose sampling parameters, seed and position apply. Rows in succession of one
            sequence, which has no shaping, are for its next token, the one after it, and so on.
        ahead: Tokens that come before these and are not in the sequences yet.

    Returns:
        One choice a row; None where the logits hold a NaN or an infinity.
    """
    assert logits.dtype is torch.float32
    assert logits.shape[0] == len(sequences)
    finite = logits.sum(dim=-1).isfinite().tolist()
    shaped = [row for row, s in enumerate(sequences) if s.shaping is not None and finite[row]]
    plain = [good and s.shaping is None for good, s in zip(finite, sequences, strict=True)]
    positions = [ahead + position for position in _positions(sequences)]
    tokens = _choose(logits, sequences, positions, plain)
    if shaped:
        theirs = [sequences[row] for row in shaped]
        copies = logits[shaped]
        shape(copies, theirs)
        their_positions = [positions[row] for row in shaped]
        tokens[shaped] = _choose(copies, theirs, their_positions, [True] * len(shaped))
    sampled: list[Sampled | None] = [
        Sampled(token) if good else None
        for token, good in zip(tokens.tolist(), finite, strict=True)
    ]
    _add_logprobs(sampled, logits, sequences)
    return sampled


def _positions(sequences: SequenceOf[Sequence]) -> list[int]:
    """Return how many tokens each row's sequence has generated before that row's."""
    positions: list[int] = []
    for row, sequence in enumerate(sequences):
        follows = row > 0 and sequence is sequences[row - 1]
        positions.append(positions[-1] + 1 if follows else sequence.num_output_tokens)
    return positions


def _choose(
    logits: Tensor,
    sequences: SequenceOf[Sequence],
    positions: SequenceOf[int],
    usable: SequenceOf[bool],
) -> Tensor:
    """Return a token a row, the likeliest or a drawn one; of rows not usable 0."""
    greedy: list[int] = []
    drawn: list[int] = []
    for row, sequence in enumerate(sequences):
        if usable[row]:
            (greedy if sequence.sampling.temperature < GREEDY_BELOW else drawn).append(row)
    tokens = torch.zeros(len(sequences), dtype=torch.int64, device=logits.device)
    if greedy:
        tokens[greedy] = _rows(logits, greedy).argmax(dim=-1)
    if drawn:
        theirs = [(sequences[row], positions[row]) for row in drawn]
        tokens[drawn] = _draw(_rows(logits, drawn), theirs)
    return tokens


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    """Select rows, without a copy where that is all of them: a vocabulary is wide."""
    return logits if len(rows) == len(logits) else logits[rows]


def _draw(logits: Tensor, places: SequenceOf[tuple[Sequence, int]]) -> Tensor:
    """Sample a token a row, for (sequence, position); `logits` stays as it is."""
    sequences = [sequence for sequence, _ in places]
    temperatures = [s.sampling.temperature for s in sequences]
    logits = logits / logits.new_tensor(temperatures).unsqueeze(-1)
    _keep_min_p(logits, [s.sampling.min_p for s in sequences])
    _keep_top_k(logits, [s.sampling.top_k for s in sequences])
    probabilities = logits.softmax(dim=-1)
    _keep_top_p(probabilities, [s.sampling.top_p for s in sequences])
    draws = [uniform(s.seed, s.index, position) for s, position in places]
    uniforms = torch.tensor(draws, dtype=torch.float64, device=logits.device)
    return _invert(probabilities, uniforms.unsqueeze(-1))


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return where the cumulative sum of each row passes a share of its total.

    First among sums of blocks, then within one: a cumulative sum of the whole vocabulary in
    float64 would cost several times as much as all the rest of drawing.

    Args:
        weights: (B, V) float32, not negative, each row's sum positive.
        uniforms: (B, 1) float64 in [0, 1).

    Returns:
        (B,) places of positive weight.
    """
    rows, vocab_size = weights.shape
    whole = vocab_size // _BLOCK * _BLOCK
    blocks = weights[:, :whole].view(rows, whole // _BLOCK, _BLOCK).sum(dim=-1)
    sums = torch.cat([blocks, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=-1).double()
    cumulative = sums.cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniforms * total, _below(total))
    block = torch.searchsorted(cumulative, target, right=True)
    target = target - (cumulative - sums).gather(-1, block)
    places = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(-1, places.clamp(max=vocab_size - 1)).double()
    inside = inside.masked_fill(places >= vocab_size, 0).cumsum(dim=-1)
    # The two sums of a block differ in their last bits.
    target = torch.minimum(target, _below(inside[:, -1:]))
    return (block * _BLOCK + torch.searchsorted(inside, target, right=True)).squeeze(-1)


def _below(values: Tensor) -> Tensor:
    """Return the next smaller numbers: rounding must not point past the last positive weight."""
    return values.nextafter(torch.zeros_like(values))


# These three work in place.


def _keep_min_p(logits: Tensor, min_p: SequenceOf[float]) -> None:
    """Set to -inf what is less likely than `min_p[row]` times the likeliest (arXiv 2407.01082)."""
    if not any(min_p):
        return
    shares = logits.new_tensor(min_p).unsqueeze(-1)
    least = logits.amax(dim=-1, keepdim=True) + shares.log()
    logits.masked_fill_(logits < least, -math.inf)


def _keep_top_k(logits: Tensor, top_k: SequenceOf[int]) -> None:
    """Set all but the `top_k[row]` largest logits to -inf (equals of the last one stay)."""
    vocab_size = logits.shape[-1]
    rows = [row for row, k in enumerate(top_k) if 0 < k < vocab_size]
    if not rows:
        return
    largest = _rows(logits, rows).topk(max(top_k[row] for row in rows)).values
    last = torch.tensor([top_k[row] - 1 for row in rows], device=logits.device)
    threshold = logits.new_full((len(top_k), 1), -math.inf)
    threshold[rows] = largest.gather(-1, last.unsqueeze(-1))
    logits.masked_fill_(logits < threshold, -math.inf)


def _keep_top_p(probabilities: Tensor, top_p: SequenceOf[float]) -> None:
    """Zero all but the smallest set of tokens whose probability reaches `top_p[row]`.

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
