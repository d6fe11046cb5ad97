"""Bias, penalties and masks on the logits of those sequences that ask for them.

Order: logit bias; repetition penalty; frequency and presence penalties; `min_tokens`; the
grammar's mask. Every entry is changed by itself, so that a row does not depend on its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from minigpt.engine.sequence import Sequence
from minigpt.engine.shaping import Ids, Shaping, Values


def shape(logits: Tensor, sequences: SequenceOf[Sequence]) -> None:
    """Change logits in place.

    Args:
        logits: (B, V) float32, contiguous, row i for `sequences[i]`.
        sequences: Each with a `shaping`.
    """
    shapings = []
    for sequence in sequences:
        assert sequence.shaping is not None
        shapings.append(sequence.shaping)
    flat, width = logits.view(-1), logits.shape[-1]
    _add_bias(flat, width, shapings)
    _penalize(flat, width, shapings)
    early = [
        (row, shaping.end_ids)
        for row, (sequence, shaping) in enumerate(zip(sequences, shapings, strict=True))
        if sequence.num_output_tokens < shaping.sampling.min_tokens
    ]
    if early:
        flat.index_fill_(0, _index(early, width, flat), -math.inf)
    for row, shaping in enumerate(shapings):
        if shaping.grammar is not None:
            allowed = torch.from_numpy(shaping.grammar.allowed()[:width]).to(flat.device)
            logits[row, : len(allowed)].masked_fill_(~allowed, -math.inf)
            logits[row, len(allowed) :] = -math.inf


def _add_bias(flat: Tensor, width: int, shapings: SequenceOf[Shaping]) -> None:
    biased = [(row, s) for row, s in enumerate(shapings) if len(s.bias_ids)]
    if biased:
        index = _index([(row, s.bias_ids) for row, s in biased], width, flat)
        flat.index_add_(0, index, _values([s.bias_values for _, s in biased], flat))


def _penalize(flat: Tensor, width: int, shapings: SequenceOf[Shaping]) -> None:
    """Divide or multiply what was seen (CTRL, arXiv 1909.05858); subtract by count (OpenAI)."""
    seen = [(row, s, s.counts) for row, s in enumerate(shapings) if s.counts and len(s.counts.ids)]
    if not seen:
        return
    index = _index([(row, counts.ids) for row, _, counts in seen], width, flat)
    repetition, subtrahend = [], []
    for _, shaping, counts in seen:
        sampling, count = shaping.sampling, counts.counts
        repetition.append(np.full_like(count, sampling.repetition_penalty))
        subtrahend.append(
            np.float32(sampling.frequency_penalty) * count
            + np.float32(sampling.presence_penalty) * (count > 0).astype(np.float32)
        )
    values = flat.index_select(0, index)
    factor = _values(repetition, flat)
    values = torch.where(values > 0, values / factor, values * factor)
    flat.index_copy_(0, index, values - _values(subtrahend, flat))


def _index(entries: SequenceOf[tuple[int, Ids]], width: int, flat: Tensor) -> Tensor:
    """Return where the ids of each row lie in the flattened logits."""
    return torch.from_numpy(np.concatenate([row * width + ids for row, ids in entries])).to(
        flat.device
    )


def _values(parts: SequenceOf[Values], flat: Tensor) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(flat.device)
