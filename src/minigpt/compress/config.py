"""How a model is made smaller, and how what that cost is measured. No torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from minigpt.core.config import Auto, Config


class CompressConfig(Config):
    """The method, and the measurements before and after."""

    method: Literal["int8", "int4"] = "int8"
    """int8: weights rounded to 8 bits, one scale per output channel. int4: to 4 bits, a scale and
    a zero point per group of inputs; embedding and output projection are int8. Activations stay
    as they are."""
    group_size: Auto | Literal[32, 64, 128] = "auto"
    """Inputs that share a scale in int4; fewer err less and take more bytes. auto is 32."""
    dtype: Auto | Literal["float32", "bfloat16"] = "auto"
    """Type in which both models are measured; auto is what the engine serves in here."""
    max_documents: int | None = Field(default=None, ge=1)
    """Score at most this many held-out documents, drawn with the seed; null is all."""
    bootstrap_samples: int = Field(default=2000, ge=100)
    """Resamples behind the interval of the difference in bits per byte."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Two-sided coverage of that interval."""
    speed_repeats: int = Field(default=5, ge=2)
    """Timings of each model, taken in turns so that both meet the same machine."""
    speed_tokens: int = Field(default=64, ge=4)
    """Tokens generated in a timing; the context limits them too."""
    speed_batch: int = Field(default=1, ge=1)
    """Sequences generated at once in a timing."""
    seed: int = Field(default=0, ge=0)
    """Draws documents and resamples."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.method == "int8" and self.group_size != "auto":
            raise ValueError(
                f"group_size = {self.group_size} with method = int8, whose scales are per output "
                "channel: leave it out or set method=int4"
            )
        return self

    def settled(self) -> Self:
        """Return the config with its group size settled."""
        if self.method == "int4" and self.group_size == "auto":
            return self.replace(group_size=32)
        return self
