"""Whether serving computes what training computed: two sets of log-probabilities, compared."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from minigpt.evaluate.certificate import Numbers
from minigpt.model.attention import CausalAttention
from minigpt.model.decoder import Decoder

_ROWS = 32
"""Positions whose logits exist at once."""


@dataclass
class Comparison:
    """Gathers the differences of places as they come."""

    deltas: list[float] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    agreed: int = 0

    def add(self, reference: Tensor, served: Tensor, targets: Tensor) -> None:
        """Compare whole distributions.

        Args:
            reference: (R, V) float32 logits.
            served: (R, V) float32 logits.
            targets: (R,) the tokens that came.
        """
        expected, found = reference.log_softmax(-1), served.log_softmax(-1)
        column = targets[:, None]
        self.deltas += (expected.gather(-1, column) - found.gather(-1, column)).abs()[:, 0].tolist()
        self.kls += (expected.exp() * (expected - found)).sum(-1).clamp(min=0).tolist()
        self.agreed += int((reference.argmax(-1) == served.argmax(-1)).sum())

    def add_chosen(self, reference: Tensor, tokens: Tensor, logprobs: Tensor) -> None:
        """Compare (R, V) reference logits with (R,) greedy tokens and their log-probabilities."""
        expected = reference.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        self.deltas += (expected - logprobs).abs().tolist()
        self.agreed += int((reference.argmax(-1) == tokens).sum())

    def numbers(self) -> Numbers:
        """Summarise at least one place."""
        return Numbers(
            tokens=len(self.deltas),
            max_delta=max(self.deltas),
            p99_delta=float(np.quantile(self.deltas, 0.99)),
            mean_kl=float(np.mean(self.kls)) if self.kls else None,
            greedy_agreement=self.agreed / len(self.deltas),
        )


class TrainingSide:
    """Plain forward passes over whole windows, as training computes them.

    Args:
        model: In eval mode, in the dtype to compare with.
    """

    def __init__(self, model: Decoder) -> None:
        self._model = model
        self._device = next(iter(model.state_dict().values())).device

    @torch.inference_mode()
    def hidden(self, tokens: list[int]) -> Tensor:
        """Return the (T, C) final hidden states of a window."""
        ids = torch.tensor([tokens], device=self._device)
        positions = torch.arange(len(tokens), device=self._device)[None]
        attention = CausalAttention(sliding_window=self._model.config.sliding_window)
        return self._model(ids, positions, attention)[0]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Map (R, C) to (R, V) float32 logits, a few rows at a time."""
        parts = [self._model.logits(rows).float() for rows in torch.split(hidden, _ROWS)]
        return torch.cat(parts)
