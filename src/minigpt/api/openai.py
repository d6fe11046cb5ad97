"""Request schemas of OpenAI's REST API, as far as minigpt supports them.

Source: https://github.com/openai/openai-openapi (completions, chat/completions, models).
A parameter is supported, or it is accepted only at the values at which it has no effect, or
it is refused by name: nothing is ignored. Answers are in `minigpt.api.openai_responses`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    Strict,
    StrictBool,
    StrictStr,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from minigpt.api.body import Body, Int, Number, Prompts, neutral
from minigpt.api.requests import SamplingParams
from minigpt.api.structured import StructuredFields

Seed = Annotated[int, Strict(), Field(ge=-(2**63), le=2**63 - 1)]
StopText = Annotated[str, Strict(), Field(min_length=1)]

MAX_CHOICES = 128
MAX_LOGPROBS = 20


def _listed(value: Any) -> Any:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of strings")
    return value


def _biases(value: Any) -> Any:
    """Read `logit_bias`, whose keys are token ids written as JSON's strings."""
    if value is None:
        return {}
    rule = "must map token ids to numbers from -100 to 100"
    if not isinstance(value, dict):
        raise ValueError(rule)
    for token, bias in value.items():
        if not (isinstance(token, str) and token.isdecimal() and token.isascii()):
            raise ValueError(rule)
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(rule)
    return {int(token): float(bias) for token, bias in value.items()}


Biases = Annotated[
    dict[int, float],
    PlainValidator(_biases),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: StrictBool | None = None
    include_obfuscation: Annotated[Any, neutral(False)] = None


class GenerationBody(StructuredFields):
    """What completions and chat completions share."""

    model: StrictStr
    max_tokens: Int | None = Field(None, ge=1)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    n: Int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Annotated[list[StopText], BeforeValidator(_listed)] = Field([], max_length=16)
    seed: Seed | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: Biases = Field(default_factory=dict)
    user: StrictStr | None = None

    top_k: Int | None = Field(None, ge=-1)
    """minigpt's own, as vLLM's: sample from this many most likely tokens; 0 and -1 are all."""
    min_p: Number | None = Field(None, ge=0, le=1)
    """minigpt's own, as vLLM's: no token less likely than this share of the likeliest."""
    repetition_penalty: Number | None = Field(None, gt=0, le=10)
    """minigpt's own, as vLLM's: above 1 discourages tokens of the prompt and the answer."""
    min_tokens: Int | None = Field(None, ge=0)
    """minigpt's own, as vLLM's: no end before this many tokens."""
    prompt_logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """minigpt's own, as vLLM's: log-probabilities of the prompt with this many alternatives."""
    ignore_eos: StrictBool | None = None
    """minigpt's own, as vLLM's: go on past the end-of-text token."""
    stop_token_ids: list[Annotated[int, Strict(), Field(ge=0)]] | None = Field(None, max_length=64)
    """minigpt's own, as vLLM's: tokens that end an answer."""

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream and self.prompt_logprobs is not None:
            raise PydanticCustomError(
                "at:prompt_logprobs", "prompt_logprobs is allowed only where stream is false"
            )
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "at:stream_options", "stream_options is allowed only where stream is true"
            )
        return self

    @property
    def choices(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling(
        self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=self.logit_bias,
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured=self.structured,
        )


class CompletionBody(GenerationBody):
    """Body of `POST /v1/completions`."""

    prompt: Prompts
    max_tokens: Int | None = Field(None, ge=0)
    """0 generates nothing: with `echo` and `logprobs` it scores the prompt."""
    echo: StrictBool | None = None
    logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Int | None = None
    suffix: Annotated[Any, neutral("")] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.best_of not in (None, self.choices):
            raise PydanticCustomError("at:best_of", "only best_of equal to n is supported")
        return self

    def sampling(self, max_tokens: int) -> SamplingParams:
        """Return how to sample, with the token limit that the service has settled."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        prompt_logprobs = max((count for count in asked if count is not None), default=None)
        return self._sampling(max_tokens, self.logprobs, prompt_logprobs)


class TextPart(Body):
    """A part of a message's content; text is the only kind."""

    type: Literal["text"]
    text: StrictStr


def _parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    return value


class Message(Body):
    """One turn of a chat. An assistant's earlier answer may be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_parts)]
    name: Annotated[Any, neutral()] = None
    refusal: Annotated[Any, neutral()] = None
    audio: Annotated[Any, neutral()] = None
    annotations: Annotated[Any, neutral([])] = None
    function_call: Annotated[Any, neutral()] = None
    tool_calls: Annotated[Any, neutral([])] = None

    @property
    def text(self) -> str:
        """The whole content."""
        return "".join(part.text for part in self.content)


class ChatCompletionBody(GenerationBody):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Int | None = Field(None, ge=1)
    logprobs: StrictBool | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    store: Annotated[Any, neutral(False)] = None
    metadata: dict[str, str] | None = None
    service_tier: Annotated[Any, neutral("auto", "default")] = None
    safety_identifier: StrictStr | None = None
    prompt_cache_key: StrictStr | None = None
    prompt_cache_options: Annotated[Any, neutral()] = None
    prompt_cache_retention: Annotated[Any, neutral()] = None
    tools: Annotated[Any, neutral([])] = None
    tool_choice: Annotated[Any, neutral("none", "auto")] = None
    parallel_tool_calls: StrictBool | None = None
    functions: Annotated[Any, neutral([])] = None
    function_call: Annotated[Any, neutral("none", "auto")] = None
    modalities: Annotated[Any, neutral(["text"])] = None
    audio: Annotated[Any, neutral()] = None
    moderation: Annotated[Any, neutral()] = None
    prediction: Annotated[Any, neutral()] = None
    reasoning_effort: Annotated[Any, neutral()] = None
    verbosity: Annotated[Any, neutral()] = None
    web_search_options: Annotated[Any, neutral()] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError(
                "at:top_logprobs", "top_logprobs is allowed only where logprobs is true"
            )
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise PydanticCustomError(
                "at:max_tokens", "max_tokens and max_completion_tokens differ: send one of them"
            )
        return self

    @property
    def token_limit(self) -> int | None:
        """The client's limit, by either of its names."""
        return self.max_completion_tokens or self.max_tokens

    def sampling(self, max_tokens: int) -> SamplingParams:
        """Return how to sample, with the token limit that the service has settled."""
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(max_tokens, logprobs, self.prompt_logprobs)


class TokenizeBody(Body):
    """Body of `POST /tokenize`."""

    model: StrictStr | None = None
    prompt: StrictStr
    add_special_tokens: StrictBool = True


class DetokenizeBody(Body):
    """Body of `POST /detokenize`."""

    model: StrictStr | None = None
    tokens: list[Annotated[int, Strict(), Field(ge=0)]]
