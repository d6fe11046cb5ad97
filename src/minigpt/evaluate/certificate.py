"""What `minigpt parity` certifies of a model, and what a gate can require of it. No torch.

A parity report artifact holds `parity.json`, a `ParityReport`: for these weights, by their digest,
how far each way of serving them is from the plain forward pass of training.
"""

from __future__ import annotations

from minigpt.core.artifact import Artifact
from minigpt.core.config import Config
from minigpt.evaluate.config import RequiredParity, describe_serving, parity_place
from minigpt.evaluate.report import Measured, Subject, read_report

PARITY_FILE = "parity.json"


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
    """What its keys and values are kept in."""
    runner: str
    """What multiplied: `kernels` or `torch`."""
    activation_bits: int | None = None
    """To what the kernels round the inputs of integer weights; null where nothing does."""
    prefill: Numbers
    """The text, scored in chunks through the paged cache."""
    decode: Numbers
    """Greedy continuations of the text, token by token."""

    @property
    def place(self) -> str:
        """Where a gate finds its numbers: `parity/<served>/<reference>`."""
        return parity_place(self.served_dtype, self.kv_dtype, self.reference_dtype)

    @property
    def served_by(self) -> str:
        """How it was served, for people."""
        return describe_serving(
            self.served_dtype, self.kv_dtype, self.runner, self.activation_bits or 16
        )

    def numbers(self) -> dict[str, float]:
        """Return those of the text, and those of the continuations with `decode_` before."""
        found = {}
        for prefix, numbers in (("", self.prefill), ("decode_", self.decode)):
            for name in ("max_delta", "p99_delta", "mean_kl", "greedy_agreement"):
                value = getattr(numbers, name)
                if value is not None:
                    found[prefix + name] = value
        return found


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
        return {
            f"{row.place}/{name}": Measured(estimate=value)
            for row in self.rows
            for name, value in row.numbers().items()
        }

    def find(self, required: RequiredParity) -> ParityRow | None:
        """Return the row of exactly the way of serving that a gate requires."""
        for row in self.rows:
            if row.place == required.place and row.served_by == required.served_by:
                return row
        return None


def load_parity(artifact: Artifact) -> ParityReport:
    """Read a parity report; raises as `read_report`."""
    return read_report(artifact, PARITY_FILE, ParityReport, "parity report", "minigpt parity")
