"""Which running sequences are drafted for, and how far; no torch here.

Drafted tokens are computed in the same step as the known one and verified: at each position the
token is sampled as it always is, with that position's own random number, and drafts are kept
for as long as they are what was sampled. So the answer is the one without speculation, token
for token, greedy or not (as far as the logits of a row don't depend on the rows beside it).

How far is a matter of seconds: tokens a second are most where each further drafted token adds
more expected tokens than its predicted time is worth (`cost_model`). Rates of acceptance are
measured, by sequence, so that drafting ends where it loses and grows where it wins; where it
has ended, single tokens are drafted now and then, to notice when that changes.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from minigpt.engine.choice import Sampled
from minigpt.engine.config import SpeculativeConfig
from minigpt.engine.cost_model import StepCostModel, StepWork
from minigpt.engine.drafting import Acceptance, NgramIndex
from minigpt.engine.sequence import Sequence

_FIRST_RATE = 0.3
"""Share of drafted tokens taken to be right before any was verified."""
_SHARED_MEMORY = 0.99
"""Weight of the past, at each verification, in what new sequences begin with."""
_MARGIN = 1.1
"""What a drafted token must gain over what its time is worth: both are estimates."""
_PROBE_SHARE = 0.005
"""Share of the time that may go into drafting where it has been found to lose."""

_MOST_IN_A_ROW = 8
"""Steps with drafts after which one has none, where all could have some: without it nothing would
tell what a drafted token costs from what a step costs."""


def keep_right(drafted: SequenceOf[int], choices: SequenceOf[Sampled | None]) -> list[Sampled]:
    """Return the choices that hold: each whose predecessors are what was drafted.

    Args:
        drafted: K tokens.
        choices: What was chosen at their positions and at the one after; None where the logits
            were not finite.

    Returns:
        The first of the choices, K of them right and one more at most; none if the first is None.
    """
    kept: list[Sampled] = []
    for position, choice in enumerate(choices):
        if choice is None:
            break
        kept.append(choice)
        if position < len(drafted) and choice.token_id != drafted[position]:
            break
    return kept


class Speculator:
    """Proposes, chooses lengths and learns from what becomes of them.

    Args:
        config: Whose method is not "none".
        model: Predicts steps; whoever measures them tells it.
        can_draft: Whether that which drafts can do so for a sequence now; None where it is
            looked up what followed before.
    """

    def __init__(
        self,
        config: SpeculativeConfig,
        model: StepCostModel,
        can_draft: Callable[[Sequence], bool] | None = None,
    ) -> None:
        self._config = config
        self._model = model
        self._can_draft = can_draft
        self._shared = Acceptance(_SHARED_MEMORY)
        self._in_a_row = 0
        """Latest steps that had drafts, all of them."""
        self._credit = 0.0
        """Seconds that probing may take."""
        self.num_drafted = 0
        """Tokens that were drafted and verified."""
        self.num_accepted = 0
        """Those that were right."""

    def choose(
        self, sequences: SequenceOf[Sequence], work: StepWork, budget: int
    ) -> dict[int, tuple[int, ...]]:
        """Draft for sequences that decode in a step.

        Args:
            sequences: Each gets one token in this step, without drafts.
            work: All that the step computes so far.
            budget: Most tokens to draft in all.

        Returns:
            The drafted tokens by place in `sequences`; none that could exceed `max_tokens`. If
            a model or heads draft, only their number counts: see `execution.Drafter`.
        """
        if budget <= 0 or not self._model.has_data:
            return {}
        if self._can_draft is not None and self._in_a_row >= _MOST_IN_A_ROW:
            self._in_a_row = 0
            return {}
        proposals = {}
        for row, sequence in enumerate(sequences):
            left = sequence.sampling.max_tokens - sequence.num_output_tokens - 1
            if proposal := self._propose(sequence, min(self._config.max_draft_tokens, left)):
                proposals[row] = proposal
        if not proposals:
            return {}
        lengths = self._lengths(sequences, proposals, work)
        chosen = {}
        for row, length in lengths.items():
            if drafted := proposals[row][: min(length, budget)]:
                chosen[row] = drafted
                budget -= len(drafted)
        self._in_a_row = self._in_a_row + 1 if chosen else 0
        return chosen

    def observe(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """Learn how many of the tokens drafted for a sequence were right."""
        sequence.drafting.acceptance.observe(drafted, accepted)
        self._shared.observe(drafted, accepted)
        self.num_drafted += drafted
        self.num_accepted += accepted

    def _propose(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        # What shapes the logits knows of the answer's tokens one by one: no drafts there.
        drafting = sequence.drafting
        if count <= 0 or not drafting.allowed or sequence.shaping is not None:
            return ()
        if self._can_draft is not None:  # it says which, once it is known how many
            return (0,) * count if self._can_draft(sequence) else ()
        if drafting.ngrams is None:
            drafting.ngrams = NgramIndex(self._config.min_ngram, self._config.max_ngram)
        return drafting.ngrams.propose(sequence.token_ids, count)

    def _lengths(
        self,
        sequences: SequenceOf[Sequence],
        proposals: dict[int, tuple[int, ...]],
        work: StepWork,
    ) -> dict[int, int]:
        """Return how many of the proposed tokens are worth their time, by row.

        Each costs the same, so the likeliest go first, until one adds less than the time that
        it takes yields anyway.
        """
        seconds, tokens = self._model.predict(work), float(len(sequences))
        cost = self._model.predict(replace(work, drafted_tokens=1)) - seconds
        prior = self._shared.rate(_FIRST_RATE)
        gains: list[tuple[float, int]] = []
        for row, proposal in proposals.items():
            rate = sequences[row].drafting.acceptance.rate(prior)
            gains += [(rate**length, row) for length in range(1, len(proposal) + 1)]
        lengths = dict.fromkeys(proposals, 0)
        for gain, row in sorted(gains, reverse=True):
            if gain * seconds <= _MARGIN * cost * tokens:
                break
            lengths[row] += 1
            tokens += gain
            seconds += cost
        self._credit = min(self._credit, cost) + _PROBE_SHARE * seconds
        for row in self._longest_without(sequences, lengths):
            if self._credit < cost:
                break
            self._credit -= cost
            lengths[row] = 1
        for row, length in lengths.items():
            drafting = sequences[row].drafting
            drafting.num_passed_over = 0 if length else drafting.num_passed_over + 1
        return lengths

    def _longest_without(
        self, sequences: SequenceOf[Sequence], lengths: dict[int, int]
    ) -> list[int]:
        """Return the rows that have no draft now, those that had none for longest first."""
        idle = (row for row, length in lengths.items() if not length)
        return sorted(idle, key=lambda row: -sequences[row].drafting.num_passed_over)
