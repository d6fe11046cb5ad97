"""How long a step takes, learnt from measured steps, and how much prefill a step can bear.

No torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import mul, truediv

MIN_CHUNK = 16
"""Tokens of prefill that a step computes at least, whatever the streams' target: prompts go on."""
STREAM_FACTOR = 2.0
"""Automatic target: with prefill a step may take this many times its decode alone, ..."""
STREAM_SECONDS = 0.03
"""... or as long as this, which is 33 tokens a second and faster than anyone reads."""

_MEMORY = 0.98
"""Weight of the past at each step: half of what is known is from the last 34 steps."""
_SURPRISE = 2.0
"""A step that took longer than this many times its prediction counts as just that, for a pause
of the machine says nothing of the work, ..."""
_SURPRISES = 3
"""... unless it is at least the third in a row: then the machine has become slower."""
_NOVICE_STEPS = 16
"""The first steps, in which nothing is a surprise: a prediction from one or two steps is wrong by
more than any pause."""
_INERTIA = 1e-3
"""Weight of the present estimate, which holds what no recent step tells anything about."""
_SWEEPS = 2
_SCALES = (1.0, 256.0, 65536.0, 16.0, 4096.0, 16.0)
"""Units of the six terms, so that all are of the order of 1."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes."""

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    """Pairs of a prefilled token and a token that it attends to."""
    decode_rows: int = 0
    decode_context: int = 0
    """Cached tokens that the decode rows read."""
    drafted_tokens: int = 0
    """Tokens that are verified beside the decode rows."""


class StepCostModel:
    """seconds = a + b prefill tokens + c prefill pairs + d decode rows + e decode context
    + f drafted tokens.

    Least squares with exponential forgetting and no coefficient below 0, solved by a few sweeps
    of coordinate descent a step, from the last solution. Attention has two terms because prefill
    is bound by arithmetic and decode by the memory that it reads. The first step, which warms
    up, is not learnt from.
    """

    def __init__(self) -> None:
        self._moments = [[0.0] * len(_SCALES) for _ in _SCALES]
        self._products = [0.0] * len(_SCALES)
        self._theta = [0.0] * len(_SCALES)
        self._num_steps = 0
        self._surprises = 0

    @property
    def has_data(self) -> bool:
        """Whether it has learnt from any step."""
        return self._num_steps > 1

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a finished step."""
        self._num_steps += 1
        if self._num_steps == 1:
            return
        terms = _terms(work)
        limit = _SURPRISE * self.predict(work)
        surprised = seconds > limit and self._num_steps > _NOVICE_STEPS
        self._surprises = self._surprises + 1 if surprised else 0
        if 0 < self._surprises < _SURPRISES and limit > 0:
            seconds = limit
        for i, x in enumerate(terms):
            row = self._moments[i]
            row[:] = [moment * _MEMORY + x * y for moment, y in zip(row, terms, strict=True)]
            self._products[i] = self._products[i] * _MEMORY + x * seconds
        for _ in range(_SWEEPS):
            self._sweep()

    def predict(self, work: StepWork) -> float:
        """Return the seconds that a step will take; 0 before any was learnt from."""
        return math.fsum(map(mul, self._theta, _terms(work)))

    def longest_chunk(self, seconds: float, start: int) -> float:
        """Return how many tokens of prefill from `start` on fit in `seconds`; may be infinite."""
        per_token, per_pair = self._theta[1] / _SCALES[1], self._theta[2] / _SCALES[2]
        # n tokens see n * start + n (n + 1) / 2 pairs; the root of a quadratic in n.
        linear = per_token + per_pair * (start + 0.5)
        divisor = linear + math.sqrt(linear * linear + 2 * per_pair * seconds)
        return math.inf if divisor <= 0 else 2 * seconds / divisor

    def _sweep(self) -> None:
        """Minimise over one coefficient after another, each held at or above 0."""
        theta = self._theta
        for i, row in enumerate(self._moments):
            gradient = self._products[i] - sum(map(mul, row, theta))
            theta[i] = max(0.0, theta[i] + gradient / (row[i] + _INERTIA))


class Pacer:
    """Bounds each step's prefill so that running streams keep their inter-token target.

    Args:
        target_seconds: Most seconds of a step that decodes; None is automatic: STREAM_FACTOR
            times what its decode alone would take, at least STREAM_SECONDS.
    """

    def __init__(self, target_seconds: float | None = None) -> None:
        self.model = StepCostModel()
        self._target_seconds = target_seconds

    def begin(self, decode: StepWork) -> StepPace:
        """Return the pace of a step that decodes so much; without any it is not bounded."""
        if not decode.decode_rows or not self.model.has_data:
            return StepPace(self.model, math.inf)
        bare = self.model.predict(decode)
        target = self._target_seconds
        if target is None:
            target = max(STREAM_SECONDS, STREAM_FACTOR * bare)
        return StepPace(self.model, max(0.0, target - bare))


class StepPace:
    """The seconds of prefill that are left to a step."""

    def __init__(self, model: StepCostModel, seconds: float) -> None:
        self._model = model
        self._seconds = seconds
        self._taken = False

    @property
    def is_spent(self) -> bool:
        """Whether no more prefill fits; a step has room for its first chunk always."""
        if not self._taken or self._seconds == math.inf:
            return False
        return self._model.longest_chunk(self._seconds, 0) < MIN_CHUNK

    def take(self, start: int, limit: int) -> int:
        """Return how many tokens from `start` on to compute, 1 to `limit`, and count them."""
        assert limit > 0
        assert not self.is_spent
        length = limit
        if self._seconds < math.inf:
            least = 1 if self._taken else MIN_CHUNK
            length = min(
                limit, max(least, int(min(self._model.longest_chunk(self._seconds, start), limit)))
            )
            bare = self._model.predict(StepWork())
            chunk = StepWork(length, prefill_pairs(start, length))
            self._seconds = max(0.0, self._seconds - (self._model.predict(chunk) - bare))
        self._taken = True
        return length


def prefill_pairs(start: int, length: int) -> int:
    """Return how many pairs tokens start .. start + length - 1 and those they see make."""
    return length * start + length * (length + 1) // 2


def largest_step(max_tokens: int, max_rows: int, context_length: int) -> StepWork:
    """Return a step of the most prefill at a context's end, beside the longest streams.

    Args:
        max_tokens: Budget of a step.
        max_rows: Most sequences in it.
        context_length: Most tokens of one.
    """
    prefill = min(max_tokens, context_length)
    pairs = max_tokens // prefill * prefill_pairs(context_length - prefill, prefill)
    return StepWork(max_tokens, pairs, max_rows, max_rows * context_length)


def _terms(work: StepWork) -> tuple[float, ...]:
    values = (
        1, work.prefill_tokens, work.prefill_pairs, work.decode_rows, work.decode_context,
        work.drafted_tokens,
    )  # fmt: skip
    return tuple(map(truediv, values, _SCALES))
