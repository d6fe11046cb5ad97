"""Answers of OpenAI's REST API: whole objects, stream chunks, errors.

msgspec structs, because a chunk is encoded for every token. Field names and nulls follow
https://github.com/openai/openai-openapi.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from minigpt.core.errors import RequestError

STREAM_END = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()


class Usage(Struct, frozen=True):
    """Tokens that a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(Struct):
    """Log-probabilities of a completion, one entry per token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """None for the first token of an echoed prompt, which nothing predicts."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Struct, frozen=True):
    """One token at a place of the prompt; vLLM's form."""

    logprob: float
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""For each token of the prompt: it and its alternatives by id; None for the first."""


class CompletionChoice(Struct):
    """One answer of a completion, or the next piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    """Where it was asked for."""


class Completion(Struct):
    """Answer of `/v1/completions`, whole or a chunk of a stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"


class TopLogprob(Struct):
    """An alternative at a token's place."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(Struct):
    """A token of a chat answer with its alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Log-probabilities of a chat answer."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(Struct):
    """A whole chat answer."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatDelta(Struct):
    """The next piece of a chat answer."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChoice(Struct):
    """One whole answer of a chat completion."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunkChoice(Struct):
    """A piece of one answer of a chat completion."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatCompletion(Struct):
    """Answer of `/v1/chat/completions`."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    """Where it was asked for."""
    object: str = "chat.completion"


class ChatCompletionChunk(Struct):
    """A chunk of a streamed chat completion."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"


class Model(Struct, frozen=True):
    """A served model."""

    id: str
    created: int
    root: str
    max_model_len: int | None
    """Context length in tokens; null until the engine is ready."""
    parent: str | None = None
    """The model that an adapter is of."""
    object: str = "model"
    owned_by: str = "minigpt"


class ModelList(Struct, frozen=True):
    """Answer of `/v1/models`."""

    data: list[Model]
    object: str = "list"


def encode(body: Struct | dict[str, Any]) -> bytes:
    """Render as JSON."""
    return _encoder.encode(body)


def encode_event(body: Struct | dict[str, Any]) -> bytes:
    """Render as one server-sent event."""
    return b"data: " + _encoder.encode(body) + b"\n\n"


def error_body(error: RequestError) -> dict[str, Any]:
    """Render an error in OpenAI's form."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    if error.status == 503:
        kind = "service_unavailable_error"
    return {
        "error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    }
