"""Request schemas of OpenAI's REST API, as far as minigpt supports them.

Source: https://github.com/openai/openai-openapi (completions, chat/completions, models).
A parameter is supported, or it is accepted only at the values at which it has no effect, or
it is refused by name: nothing is ignored. Answers are in `minigpt.api.openai_responses`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    Strict,
    StrictBool,
    StrictStr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from minigpt.api.requests import SamplingParams
from minigpt.core.errors import RequestError

Int = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Seed = Annotated[int, Strict(), Field(ge=-(2**63), le=2**63 - 1)]
StopText = Annotated[str, Strict(), Field(min_length=1)]

MAX_CHOICES = 128
MAX_LOGPROBS = 20


def neutral(*values: Any) -> AfterValidator:
    """Return a validator that takes null and `values` alone: those without an effect."""

    def check(value: Any) -> Any:
        # 0 == False in Python, but not on the wire.
        if value is not None and not any(
            value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
            for allowed in values
        ):
            raise PydanticCustomError("unsupported", "this value is not supported")
        return value

    return AfterValidator(check)


def _listed(value: Any) -> Any:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of strings")
    return value


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """Bring the four forms of a prompt to a list of strings or a list of token lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _is_tokens(value):
            return [value]
        if all(isinstance(item, list) and item and _is_tokens(item) for item in value):
            return value
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of such lists, "
        "none of them empty"
    )


def _is_tokens(items: list[Any]) -> bool:
    return all(type(item) is int and item >= 0 for item in items)


Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_prompts),
    WithJsonSchema(
        {
            "oneOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]


class Body(BaseModel):
    """Base of everything that a client may send: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: StrictBool | None = None
    include_obfuscation: Annotated[Any, neutral(False)] = None


class GenerationBody(Body):
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
    frequency_penalty: Annotated[Any, neutral(0)] = None
    presence_penalty: Annotated[Any, neutral(0)] = None
    logit_bias: Annotated[Any, neutral({})] = None
    user: StrictStr | None = None

    top_k: Int | None = Field(None, ge=-1)
    """minigpt's own, as vLLM's: sample from this many most likely tokens; 0 and -1 are all."""
    ignore_eos: StrictBool | None = None
    """minigpt's own, as vLLM's: go on past the end-of-text token."""
    stop_token_ids: list[Annotated[int, Strict(), Field(ge=0)]] | None = Field(None, max_length=64)
    """minigpt's own, as vLLM's: tokens that end an answer."""

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
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

    def _sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )


class CompletionBody(GenerationBody):
    """Body of `POST /v1/completions`."""

    prompt: Prompts
    echo: StrictBool | None = None
    logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Int | None = None
    suffix: Annotated[Any, neutral("")] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.best_of not in (None, self.choices):
            raise PydanticCustomError("at:best_of", "only best_of equal to n is supported")
        if self.echo and self.logprobs is not None:
            raise PydanticCustomError(
                "at:echo", "log-probabilities of the prompt are not supported: drop echo"
            )
        return self

    def sampling(self, max_tokens: int) -> SamplingParams:
        """Return how to sample, with the token limit that the service has settled."""
        return self._sampling(max_tokens, self.logprobs)


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
    response_format: Annotated[Any, neutral({"type": "text"})] = None
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
        return self._sampling(max_tokens, (self.top_logprobs or 0) if self.logprobs else None)


class TokenizeBody(Body):
    """Body of `POST /tokenize`."""

    model: StrictStr | None = None
    prompt: StrictStr
    add_special_tokens: StrictBool = True


class DetokenizeBody(Body):
    """Body of `POST /detokenize`."""

    model: StrictStr | None = None
    tokens: list[Annotated[int, Strict(), Field(ge=0)]]


B = TypeVar("B", bound=Body)


def parse_body(cls: type[B], raw: bytes) -> B:
    """Read a JSON body.

    Raises:
        RequestError: Status 400; malformed JSON, or the first parameter at fault in `param`.
    """
    try:
        return cls.model_validate_json(raw)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0]) from None


def _refusal(problem: ErrorDetails) -> RequestError:
    kind, message = problem["type"], problem["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return RequestError(f"the body is not valid JSON: {message}", code="invalid_json")
    if kind.startswith("at:"):
        return RequestError(message, param=kind.removeprefix("at:"), code="invalid_value")
    param = _param(problem["loc"])
    if param is None:
        return RequestError("the body must be a JSON object", code="invalid_type")
    if kind == "extra_forbidden":
        return RequestError(
            f"unknown parameter: {param}", param=param, code="unknown_parameter", remedy="drop it"
        )
    if kind == "missing":
        return RequestError(f"{param} is required", param=param, code="missing_required_parameter")
    code = "unsupported_parameter" if kind == "unsupported" else "invalid_value"
    value = repr(problem["input"])
    shown = value if len(value) <= 80 else value[:77] + "..."
    return RequestError(f"{param} = {shown}: {_lower(message)}", param=param, code=code)


def _param(location: tuple[int | str, ...]) -> str | None:
    """Write a location as OpenAI does: `messages[0].content`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".") or None


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
