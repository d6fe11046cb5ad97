"""What a request adds to the model's logits, and what it must remember for that; no torch here.

`penalties.shape` carries it out. A request with none of it has no Shaping and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from minigpt.api.requests import SamplingParams

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


class Grammar(Protocol):
    """What structured output asks for; `structured.GrammarState` is one."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete and can't go on."""
        ...

    def consume(self, token_id: int) -> None:
        """Go on by a chosen token and begin to compute the next mask in the background."""
        ...

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return (<= V,) which tokens may come next; those beyond its end may not. Waits."""
        ...


class TokenCounts:
    """How often each token was generated, kept as tokens come: O(1) a token.

    Args:
        prompt: Tokens to know of with count 0, for the repetition penalty.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        distinct = list(dict.fromkeys(prompt))
        self._slots = {token: slot for slot, token in enumerate(distinct)}
        capacity = max(64, 2 * len(distinct))
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._counts = np.zeros(capacity, dtype=np.float32)
        self._ids[: len(distinct)] = distinct

    @property
    def ids(self) -> Ids:
        """(U,) the distinct tokens, in order of their first appearance."""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> Values:
        """(U,) how often each was generated."""
        return self._counts[: len(self._slots)]

    def add(self, token_id: int) -> None:
        """Count a generated token."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token_id
        self._counts[slot] += 1


@dataclass(slots=True)
class Shaping:
    """One sequence's changes to its logits."""

    sampling: SamplingParams
    counts: TokenCounts | None
    """None where no penalty is asked for."""
    bias_ids: Ids
    bias_values: Values
    end_ids: Ids
    """Tokens that may not come before `min_tokens` are there."""
    grammar: Grammar | None = None

    @classmethod
    def of(
        cls, sampling: SamplingParams, prompt: Iterable[int], eos_token_ids: Iterable[int]
    ) -> Shaping | None:
        """Return what a sequence needs, or None where its logits stay as they are.

        Args:
            sampling: The request's parameters.
            prompt: Its tokens; only the repetition penalty reads them.
            eos_token_ids: The model's own ends, which `min_tokens` rules out.
        """
        repeats = sampling.repetition_penalty != 1
        penalizes = repeats or bool(sampling.frequency_penalty or sampling.presence_penalty)
        plain = not (sampling.logit_bias or sampling.min_tokens or sampling.structured)
        if plain and not penalizes:
            return None
        ends = dict.fromkeys((*eos_token_ids, *sampling.stop_token_ids))
        return cls(
            sampling=sampling,
            counts=TokenCounts(prompt if repeats else ()) if penalizes else None,
            bias_ids=np.array(list(sampling.logit_bias), dtype=np.int64),
            bias_values=np.array(list(sampling.logit_bias.values()), dtype=np.float32),
            end_ids=np.array(list(ends) if sampling.min_tokens else [], dtype=np.int64),
        )

    def observe(self, token_id: int) -> None:
        """Take note of a generated token."""
        if self.counts is not None:
            self.counts.add(token_id)
        if self.grammar is not None:
            self.grammar.consume(token_id)

    @property
    def complete(self) -> bool:
        """Whether the grammar, where there is one, allows nothing more."""
        return self.grammar is not None and self.grammar.finished
