"""How a model is made smaller, and how what that cost is measured. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from minigpt.core.config import Auto, Config


class CompressConfig(Config):
    """The method, and the measurements before and after."""

    method: Literal["int8"] = "int8"
    """int8: weights rounded to 8 bits, one scale per output channel; activations stay as they
    are."""
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
