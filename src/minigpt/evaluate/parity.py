"""Whether serving computes what training computed: two sets of log-probabilities, compared.

A parity report artifact holds `parity.json`, a `ParityReport`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from minigpt.core.artifact import Artifact
from minigpt.core.config import Config
from minigpt.evaluate.report import Measured, Subject, read_report
from minigpt.model.attention import CausalAttention
from minigpt.model.decoder import Decoder

PARITY_FILE = "parity.json"
_ROWS = 32
"""Positions whose logits exist at once."""


class Numbers(Config):
    """How far served log-probabilities are from the reference's, in nats."""

    tokens: int
    """Tokens that were compared."""
    max_delta: float
    """Largest |difference| of a token's log-probability."""
    p99_delta: float
    mean_kl: float | None
    """Mean KL(reference || served) over the whole vocabulary; null where only the chosen tokens'
    log-probabilities are known."""
    greedy_agreement: float
    """Share of places at which both find the same token likeliest."""


class ParityRow(Config):
    """One way of serving against one way of training."""

    served_dtype: str
    reference_dtype: str
    """Of the plain forward pass, weights and activations."""
    quantization: str
    """Of the served weights: `int8`, `int4` or `none`."""
    kv_dtype: str
    runner: str
    """What multiplied: `kernels` or `torch`."""
    activation_bits: int | None = None
    """To what the kernels round the inputs of integer weights; null where nothing does."""
    prefill: Numbers
    """The text, scored in chunks through the paged cache."""
    decode: Numbers
    """Greedy continuations of the text, token by token."""


class ParityReport(Config):
    """The content of `parity.json`."""

    model: Subject
    reference: Subject
    """Whose plain forward pass is compared with."""
    text: str
    """SHA-256 of the text."""
    windows: int
    context_length: int
    device: str
    threads: int
    rows: tuple[ParityRow, ...]

    def metrics(self) -> dict[str, Measured]:
        """Return all numbers by the names that a gate knows them by."""
        found = {}
        for row in self.rows:
            place = f"parity/{row.served_dtype}/{row.reference_dtype}"
            for prefix, numbers in (("", row.prefill), ("decode_", row.decode)):
                for name in ("max_delta", "p99_delta", "mean_kl", "greedy_agreement"):
                    value = getattr(numbers, name)
                    if value is not None:
                        found[f"{place}/{prefix}{name}"] = Measured(estimate=value)
        return found


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


def load_parity(artifact: Artifact) -> ParityReport:
    """Read a parity report; raises as `read_report`."""
    return read_report(artifact, PARITY_FILE, ParityReport, "parity report", "minigpt parity")
