from __future__ import annotations

import json
from typing import Any

import pytest

from minigpt.api.body import parse_body
from minigpt.api.requests import StructuredOutput
from minigpt.api.structured import StructuredFields
from minigpt.core.errors import RequestError

SCHEMA = {"type": "object", "properties": {"a": {"const": 1}}}
NAMED = {"name": "x", "schema": SCHEMA, "strict": False, "description": "d"}


def structured(**fields: Any) -> StructuredOutput | None:
    return parse_body(StructuredFields, json.dumps(fields).encode()).structured


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}),
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED}},
            "json_schema",
            SCHEMA,
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "json_schema",
            {"type": "object"},
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json_object": True}}, "json_schema", {"type": "object"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ["a", "b"]),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"guided_json": {}}, "json_schema", {}),
        ({"guided_choice": ["a"]}, "choice", ["a"]),
    ],
)
def test_all_ways_to_ask(fields: dict[str, Any], kind: str, value: Any) -> None:
    output = structured(**fields)
    assert output is not None
    assert (output.kind, json.loads(output.text)) == (kind, value)
    assert output.param == next(iter(fields))


def test_expressions_and_grammars_are_taken_as_they_are() -> None:
    for fields in ({"guided_regex": '"a"'}, {"structured_outputs": {"regex": '"a"'}}):
        output = structured(**fields)
        assert output is not None
        assert (output.kind, output.text) == ("regex", '"a"')
    output = structured(guided_grammar="start: x")
    assert output is not None
    assert (output.kind, output.text) == ("grammar", "start: x")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None, "guided_regex": None},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False}},
    ],
)
def test_nothing_asked_for(fields: dict[str, Any]) -> None:
    assert structured(**fields) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "text", "json_schema": NAMED}}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": [1]}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[" * 100_000}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice[0]"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs"),
        ({"structured_outputs": {"backend": "x"}}, "structured_outputs.backend"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ],
)
def test_refusals(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        structured(**fields)
    assert refused.value.param == param
