"""What a request wants to know of its prompt's positions; filled chunk by chunk; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from minigpt.api.requests import Pooling, Request
from minigpt.engine.choice import Sampled


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
