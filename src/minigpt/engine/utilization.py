"""Which share of the machine's limits the steps reach: memory read, arithmetic. No torch here.

The roofline model: Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minigpt.api.requests import Utilization
from minigpt.engine.cost_model import StepWork
from minigpt.model.config import ModelConfig

Phase = Literal["prefill", "decode"]

_MEMORY = 0.98
"""Weight of the past at each step: half of what is shown is from the last 34 steps."""


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most, measured."""

    bytes_per_second: float
    operations_per_second: float
    """A multiply-add counts two."""


@dataclass(frozen=True)
class WorkSize:
    """Bytes that a step must read and operations that it must do."""

    weight_bytes: int
    """Read by every step: all weights but rows of tables."""
    token_bytes: int
    """Keys and values of one token, over all layers."""
    token_operations: int
    """Products of one token with the layers' weights."""
    row_operations: int
    """Its product with the output projection."""
    pair_operations: int
    """Attention of one token to one other, over all layers."""

    @classmethod
    def of(cls, model: ModelConfig, weight_bytes: int, token_bytes: int) -> WorkSize:
        """Derive the operations of a dense model from its shape."""
        projection = model.vocab_size * model.hidden_size
        return cls(
            weight_bytes,
            token_bytes,
            2 * (model.parameter_counts().matmul - projection),
            2 * projection,
            4 * model.num_layers * model.num_heads * model.head_dim,
        )

    def bytes(self, work: StepWork) -> int:
        """Return what a step reads at least; of a prompt's earlier chunks nothing is counted."""
        return self.weight_bytes + self.token_bytes * work.decode_context

    def operations(self, work: StepWork) -> int:
        """Return what a step computes; the rows at prompts' ends are not counted."""
        rows = work.decode_rows + work.drafted_tokens
        pairs = work.prefill_pairs + work.decode_context
        return (
            self.token_operations * (work.prefill_tokens + rows)
            + self.row_operations * rows
            + self.pair_operations * pairs
        )


class UtilizationMeter:
    """Sums work over seconds by phase: steps that take in any prompt are of prefill.

    Args:
        size: Of the model's work.
        limits: Of the machine.
    """

    def __init__(self, size: WorkSize, limits: Limits) -> None:
        self._size = size
        self._limits = limits
        self._sums: dict[Phase, tuple[float, float, float]] = {}

    def observe(self, work: StepWork, seconds: float) -> None:
        """Count a finished step."""
        phase: Phase = "prefill" if work.prefill_tokens else "decode"
        done = (seconds, self._size.bytes(work), self._size.operations(work))
        held = self._sums.get(phase, (0.0, 0.0, 0.0))
        a, b, c = (_MEMORY * old + new for old, new in zip(held, done, strict=True))
        self._sums[phase] = (a, b, c)

    def read(self) -> list[Utilization]:
        """Return the shares of each phase that there has been, of the latest steps above all."""
        limits = self._limits
        return [
            Utilization(
                phase=phase,
                memory_bandwidth=read / seconds / limits.bytes_per_second,
                arithmetic=operations / seconds / limits.operations_per_second,
            )
            for phase, (seconds, read, operations) in self._sums.items()
            if seconds > 0
        ]
