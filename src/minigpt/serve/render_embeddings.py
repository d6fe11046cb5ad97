"""From the updates of pooled requests to OpenAI's list of embeddings."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from minigpt.api.embeddings import Embedding, EmbeddingList, EmbeddingUsage
from minigpt.api.openai_responses import Usage
from minigpt.serve.engine_client import Update
from minigpt.serve.service import Job


class EmbeddingRenderer:
    """Renders `/v1/embeddings`, which comes whole.

    Args:
        job: Of pooled requests.
        base64: Numbers as little-endian float32 in base64.
        normalize: Divide by the L2 norm.
    """

    def __init__(self, job: Job, *, base64: bool, normalize: bool) -> None:
        self._job = job
        self._base64 = base64
        self._normalize = normalize

    @property
    def usage(self) -> Usage:
        """Tokens of the inputs."""
        tokens = self._job.generation.prompt_tokens
        return Usage(tokens, 0, tokens)

    def chunks(self, updates: Sequence[Update]) -> list[Struct]:
        """Nothing comes in pieces."""
        return []

    def usage_chunk(self) -> Struct:
        """Return the usage alone."""
        return self.usage

    def whole(self, updates: Sequence[Update]) -> Struct:
        """Return all embeddings in the order of their inputs."""
        data = [
            Embedding(index, self._encode(delta.embedding))
            for index, delta in sorted(updates, key=lambda update: update[0])
            if delta.embedding is not None
        ]
        tokens = self._job.generation.prompt_tokens
        return EmbeddingList(data, self._job.model, EmbeddingUsage(tokens, tokens))

    def _encode(self, values: list[float]) -> list[float] | str:
        vector = np.array(values, dtype=np.float64)
        if self._normalize:
            vector /= max(float(np.linalg.norm(vector)), 1e-12)
        if self._base64:
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers
