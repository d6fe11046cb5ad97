"""Embeddings in OpenAI's form: the request body and the answer.

Source: https://github.com/openai/openai-openapi (embeddings).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Struct
from pydantic import StrictBool, StrictStr

from minigpt.api.body import Body, Prompts, neutral
from minigpt.api.requests import Pooling


class EmbeddingBody(Body):
    """Body of `POST /v1/embeddings`."""

    model: StrictStr
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[Any, neutral()] = None
    user: StrictStr | None = None
    pooling: Pooling | None = None
    """minigpt's own: `mean` (the default) of the last layer's outputs, or the `last` one."""
    normalize: StrictBool | None = None
    """minigpt's own, as vLLM's: whether to divide by the L2 norm; true where not given."""


class Embedding(Struct, frozen=True):
    """One input's embedding: numbers, or little-endian float32 in base64."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingUsage(Struct, frozen=True):
    """Tokens that a request cost."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, frozen=True):
    """Answer of `/v1/embeddings`."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: str = "list"
