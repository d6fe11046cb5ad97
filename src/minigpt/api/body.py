"""What every request body is built of: strict fields, refusals in OpenAI's form.

A parameter is supported, or it is accepted only at the values at which it has no effect, or
it is refused by name: nothing is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PlainValidator,
    Strict,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from minigpt.core.errors import RequestError

Int = Annotated[int, Strict()]
Number = Annotated[float, Strict()]


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
