"""What a request wants to know of its prompt's positions; filled chunk by chunk; no torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.api.requests import Pooling, Request
from minigpt.engine.choice import Sampled

Observer = Callable[[int, Any], None]
"""Sees the prompt's logits as they come: the first position, and (R, V) float32 logits of it and
those after it. Each position but the last is seen once, in order."""


@dataclass(slots=True)
class PromptReader:
    """Gathers log-probabilities or an embedding while the prompt is computed.

    Positions are read in order and each once, though preemption computes them anew.
    """

    num_logprobs: int | None
    """Alternatives with each token; None is no log-probabilities at all."""
    pooling: Pooling | None
    num_read: int = 0
    """Positions that were read."""
    scores: list[Sampled] = field(default_factory=list)
    """Of the prompt's tokens from the second on."""
    pooled: npt.NDArray[np.float64] | None = None
    """(C,) sum of the hidden states read, or the last of them."""
    observe: Observer | None = None
    """Where the log-probabilities are wanted whole, of all tokens."""

    @classmethod
    def of(cls, request: Request) -> PromptReader | None:
        """Return a reader, or None where the request wants nothing of its prompt."""
        if request.sampling.prompt_logprobs is None and request.pooling is None:
            return None
        return cls(request.sampling.prompt_logprobs, request.pooling)

    def embedding(self) -> list[float] | None:
        """Return the (C,) embedding of a prompt that was read to its end."""
        if self.pooled is None:
            return None
        count = self.num_read if self.pooling == "mean" else 1
        values: list[float] = (self.pooled / count).tolist()
        return values
