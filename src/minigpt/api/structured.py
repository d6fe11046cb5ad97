"""How a request body asks for structured output: OpenAI's `response_format`, vLLM's extensions.

Source: https://github.com/openai/openai-openapi and vLLM's protocol (field names only).
Whether a schema can be compiled is `engine.structured`'s to say.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PlainValidator,
    StrictBool,
    StrictStr,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from minigpt.api.body import Body
from minigpt.api.requests import StructuredKind, StructuredOutput

_OBJECT = '{"type": "object"}'


def _schema(value: Any) -> Any:
    """Bring a JSON schema, an object or its text, to an object."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError("must be a JSON schema, this is not valid JSON") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError("must be a JSON schema: an object")
    return value


Schema = Annotated[
    dict[str, Any] | None, PlainValidator(_schema), WithJsonSchema({"type": "object"})
]
Choices = Annotated[list[StrictStr], Field(min_length=1, max_length=1024)]


class JsonSchema(Body):
    """The schema of a `response_format`."""

    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: Schema = Field(None, alias="schema")
    strict: StrictBool | None = None
    """Taken either way: the schema is always kept to."""


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "at:response_format", "json_schema belongs to the type json_schema, and only there"
            )
        return self


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`: one of these."""

    json_: Schema = Field(None, alias="json")
    regex: StrictStr | None = None
    choice: Choices | None = None
    grammar: StrictStr | None = None
    json_object: StrictBool | None = None


class StructuredFields(Body):
    """The fields of a body that ask for structured output; at most one is given."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema = None
    guided_regex: StrictStr | None = None
    guided_choice: Choices | None = None
    guided_grammar: StrictStr | None = None

    @model_validator(mode="after")
    def _check_structured(self) -> Self:
        asked = self._asked()
        if len(asked) > 1:
            raise PydanticCustomError(
                f"at:{asked[1].param}", "structured output is asked for more than once: send one"
            )
        return self

    @property
    def structured(self) -> StructuredOutput | None:
        """What the answer must be; None is anything."""
        return next(iter(self._asked()), None)

    def _asked(self) -> list[StructuredOutput]:
        form, outputs = self.response_format, self.structured_outputs
        found: list[tuple[str, StructuredKind, Any]] = []
        if form is not None and form.type == "json_object":
            found.append(("response_format", "json_schema", _OBJECT))
        elif form is not None and form.json_schema is not None:
            schema = form.json_schema.schema_
            found.append(("response_format", "json_schema", _OBJECT if schema is None else schema))
        if outputs is not None:
            found += [
                ("structured_outputs", "json_schema", outputs.json_),
                ("structured_outputs", "json_schema", _OBJECT if outputs.json_object else None),
                ("structured_outputs", "regex", outputs.regex),
                ("structured_outputs", "choice", outputs.choice),
                ("structured_outputs", "grammar", outputs.grammar),
            ]
        found += [
            ("guided_json", "json_schema", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "grammar", self.guided_grammar),
        ]
        return [
            StructuredOutput(
                kind=kind, text=value if isinstance(value, str) else json.dumps(value), param=param
            )
            for param, kind, value in found
            if value is not None
        ]
