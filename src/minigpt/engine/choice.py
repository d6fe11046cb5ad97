"""A token with its log-probabilities, as the sampler and the scoring of prompts give it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen or given token, and where asked for, log-probabilities at temperature 1."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the likeliest tokens, best first."""
