"""What a model of random weights says under a grammar belongs to the grammar's language."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from minigpt.api.requests import Request, SamplingParams, StructuredOutput
from minigpt.core.errors import RequestError
from minigpt.data.tokenizer import Tokenizer
from minigpt.data.tokenizer_build import train_bpe
from minigpt.engine import structured
from minigpt.engine.engine import Engine
from minigpt.engine.structured import MAX_TEXT, GrammarState, check_structured

Make = Callable[..., Any]

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", None]},
        "scores": {"type": "array", "items": {"type": "number"}, "maxItems": 2},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
TREE: dict[str, Any] = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "v": {"type": "boolean"},
                "c": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
            },
            "required": ["v"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
UNION: dict[str, Any] = {
    "anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}, {"const": "hi"}]
}


def _output(kind: Any, value: Any) -> StructuredOutput:
    text = value if isinstance(value, str) else json.dumps(value)
    return StructuredOutput(kind=kind, text=text)


def _ask(run: Make, engine: Any, output: StructuredOutput, n: int = 8, **sampling: Any) -> Any:
    """Answers of several seeds and temperatures; an end-of-text bias makes most of them end."""

    def params(i: int) -> SamplingParams:
        defaults: dict[str, Any] = {"seed": i, "temperature": 0.7 * i, "max_tokens": 90}
        return SamplingParams(structured=output, **(defaults | sampling))

    requests = [
        Request(id=str(i), prompt_token_ids=[1 + i, 2], n=n, sampling=params(i)) for i in range(3)
    ]
    return run(engine, *requests)


@pytest.mark.parametrize("schema", [PERSON, TREE, UNION, {"type": "object"}], ids=str)
def test_all_that_stop_are_valid(
    make_model: Make, make_engine: Make, run: Make, schema: dict[str, Any]
) -> None:
    answers = _ask(run, make_engine(make_model()), _output("json_schema", schema))
    stopped = [a.text for a in answers.values() if a.finish_reason == "stop"]
    assert all(a.finish_reason in ("stop", "length") for a in answers.values())
    checker = jsonschema.FormatChecker()
    for text in stopped:
        jsonschema.validate(json.loads(text), schema, format_checker=checker)
    if schema != {"type": "object"}:  # of any objects at random, few end
        assert len(stopped) >= 6, [a.text for a in answers.values()]


@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("regex", r"[a-f]{3}-\d{2,5}(x|yz)", r"[a-f]{3}-\d{2,5}(x|yz)"),
        ("regex", r"(é|😀){2,3}!", r"(é|😀){2,3}!"),
        ("choice", ["yes", "no", 'say "ü"', "a\\b\n"], r'yes|no|say "ü"|a\\b\n'),
        (
            "grammar", 'start: "<" item ("," item)* ">"\nitem: /[0-9]/ | "k"',
            r"<[0-9k](,[0-9k])*>",
        ),
    ],
)  # fmt: skip
def test_other_languages(
    make_model: Make, make_engine: Make, run: Make, kind: str, value: Any, pattern: str
) -> None:
    answers = _ask(run, make_engine(make_model()), _output(kind, value))
    for answer in answers.values():
        assert answer.finish_reason == "stop" or kind == "grammar"
        assert answer.finish_reason == "length" or re.fullmatch(pattern, answer.text), answer.text
    assert len({answer.text for answer in answers.values()}) > 1


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """Tokens of several bytes, which cross the borders between a grammar's lexemes."""
    texts = [json.dumps({"name": f"n{i} \u00e4", "age": i, "kind": "cat"}) for i in range(400)]
    return train_bpe(iter([texts]), vocab_size=600)


def test_with_tokens_of_several_bytes(
    make_model: Make, make_engine: Make, run: Make, bpe: Tokenizer
) -> None:
    """A padded vocabulary, forced keys, and what stops is valid."""
    model = make_model(vocab_size=bpe.vocab_size + 7, eos_token_id=bpe.eos_token_id)
    engine = Engine(model, bpe, make_engine(model).config)
    answers = _ask(run, engine, _output("json_schema", PERSON))
    stopped = [a for a in answers.values() if a.finish_reason == "stop"]
    assert len(stopped) >= 6
    for answer in stopped:
        jsonschema.validate(json.loads(answer.text), PERSON)
        assert max(answer.token_ids) < bpe.vocab_size
    forced = [t for answer in stopped for t in answer.token_ids if b"name" in bpe.token_bytes(t)]
    assert forced, "a key is said in the tokens that the tokenizer has for it"


def test_with_stop_strings_limits_penalties_and_logprobs(
    make_model: Make, make_engine: Make, run: Make
) -> None:
    engine = make_engine(make_model())
    output = _output("regex", "[a-z]{20,}")
    cut = _ask(run, engine, output, max_tokens=7, logprobs=2, frequency_penalty=2.0)
    for answer in cut.values():
        assert answer.finish_reason == "length"
        assert re.fullmatch("[a-z]{7}", answer.text)
    stopped = _ask(run, engine, output, stop=("a", "e", "i", "o", "u"), max_tokens=80)
    for answer in stopped.values():
        assert answer.finish_reason == "stop"
        assert re.fullmatch("[b-df-hj-np-tv-z]*", answer.text)


def test_structured_and_free_answers_share_a_batch(
    make_model: Make, make_engine: Make, run: Make
) -> None:
    """The others say what they would have said; the seed repeats under preemption too."""
    model = make_model()
    free = [
        Request(id=f"free{i}", prompt_token_ids=[9, i], sampling=SamplingParams(seed=i))
        for i in range(3)
    ]
    alone = run(make_engine(model), *free)
    tied = Request(
        id="tied", prompt_token_ids=[3] * 20, n=4,
        sampling=SamplingParams(
            seed=5, max_tokens=60, structured=_output("regex", "([0-9]{3} )+")
        ),
    )  # fmt: skip
    expected = run(make_engine(model), tied)
    crowded = make_engine(model, num_blocks=33, max_batched_tokens=9)
    together = run(crowded, tied, *free)
    assert crowded.stats().preemptions > 0
    for key, answer in (alone | expected).items():
        assert together[key].token_ids == answer.token_ids


def test_it_ends_with_its_grammar_without_an_end_token(
    make_model: Make, make_engine: Make, run: Make
) -> None:
    answer = _ask(run, make_engine(make_model()), _output("regex", "abc"), n=1)["0", 0]
    assert (answer.text, answer.token_ids) == ("abc", [97, 98, 99])


def test_masks_are_computed_in_other_threads_while_the_model_runs(
    make_model: Make, make_engine: Make, run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each mask takes 0.1 s and each step of the model too; together little more than one."""
    model = make_model()
    threads: set[str] = set()
    forward, state = model.forward, GrammarState.__init__

    class Slow:
        def __init__(self, matcher: Any) -> None:
            self._matcher = matcher

        def compute_bitmask(self) -> bytes:
            threads.add(threading.current_thread().name)
            time.sleep(0.1)
            mask: bytes = self._matcher.compute_bitmask()
            return mask

        def __getattr__(self, name: str) -> Any:
            return getattr(self._matcher, name)

    def slow_forward(*inputs: Any, **options: Any) -> Any:
        time.sleep(0.1)
        return forward(*inputs, **options)

    monkeypatch.setattr(model, "forward", slow_forward)
    monkeypatch.setattr(
        GrammarState, "__init__", lambda self, matcher, pool: state(self, Slow(matcher), pool)
    )
    engine = make_engine(model)
    request = Request(
        id="r", prompt_token_ids=[1],
        sampling=SamplingParams(max_tokens=12, structured=_output("regex", "[a-z]+")),
    )  # fmt: skip
    began = time.monotonic()
    run(engine, request)
    seconds = time.monotonic() - began
    assert threads
    assert all(name.startswith("grammar") for name in threads)
    assert seconds < 12 * 0.2 * 0.9, "one after the other would take 2.4 s"


def test_aborted_while_its_grammar_compiles(make_model: Make, make_engine: Make) -> None:
    engine = make_engine(make_model())
    params = SamplingParams(structured=_output("regex", "a+"))
    engine.add(Request(id="r", prompt_token_ids=[1], n=2, sampling=params))
    engine.abort("r")
    assert [delta.finish_reason for delta in engine.step()] == ["abort", "abort"]
    assert not engine.has_work


def test_a_grammar_that_can_not_be_compiled_ends_its_request_alone(
    make_model: Make, make_engine: Make, run: Make
) -> None:
    params = SamplingParams(structured=_output("regex", "(a"))
    bad = Request(id="bad", prompt_token_ids=[1], sampling=params)
    good = Request(id="good", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=3))
    answers = run(make_engine(make_model()), good, bad)
    assert answers["bad", 0].finish_reason == "error"
    assert "unclosed group" in answers["bad", 0].deltas[-1].error
    assert answers["good", 0].finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        ("json_schema", {"allOf": [{"type": "string"}, {"type": "number"}]}, "Unsatisfiable"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "greater than maximum"),
        ("json_schema", {"enum": []}, "Unsatisfiable"),
        ("json_schema", {"not": {"type": "string"}}, "Unimplemented keys"),
        ("json_schema", {"x-guidance": {"lenient": True}, "not": {}}, "Unimplemented keys"),
        ("json_schema", {"type": "array", "uniqueItems": True}, "Unimplemented keys"),
        ("json_schema", {"type": "strin"}, "Invalid type"),
        ("json_schema", {"$ref": "http://example.com/schema"}, "not present"),
        ("json_schema", {"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ("json_schema", {"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}, "nothing"),
        ("regex", "(a", "unclosed group"),
        ("regex", r"(a)\1", "backreferences"),
        ("regex", r"[^\s\S]", "nothing can match it"),
        ("grammar", "start: other", "unknown name"),
        ("grammar", "$$$", "lexer error"),
        ("regex", "a" * (MAX_TEXT + 1), "at most 32768"),
    ],
)
def test_refusals_say_why(kind: Any, value: Any, why: str) -> None:
    with pytest.raises(RequestError, match=why) as refused:
        check_structured(_output(kind, value))
    assert refused.value.param == "response_format"
    assert refused.value.status == 400
    assert "\n" not in str(refused.value)


def _nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


def _doubling(rungs: int) -> dict[str, Any]:
    step = {"type": "object", "required": ["a", "b"]}
    defs: dict[str, Any] = {
        f"d{i}": step | {"properties": {key: {"$ref": f"#/$defs/d{i + 1}"} for key in "ab"}}
        for i in range(rungs)
    }
    return {"$defs": defs | {f"d{rungs}": {"type": "null"}}, "$ref": "#/$defs/d0"}


BOMBS: dict[str, tuple[str, Any]] = {
    "nested": ("json_schema", _nested(1000)),
    "doubling": ("json_schema", _doubling(40)),
    "properties": (
        "json_schema",
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}},
    ),
    "items": ("json_schema", {"type": "array", "minItems": 10**9, "items": PERSON}),
    "length": ("json_schema", {"type": "string", "minLength": 10**9}),
    "enum": ("json_schema", {"enum": [f"value {i}" for i in range(2000)]}),
    "repeats": ("regex", "((a{0,1000}){0,1000}){0,1000}"),
    "states": ("regex", "(.*a.{40}){4}"),
    "classes": ("regex", r"(\w{1,500}\p{L}{1,500}){1,50}"),
    "ambiguous": ("grammar", "start: s\ns: s s s | s s | /a*/ | /b?/"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_a_bounded_time(name: str) -> None:
    """Compiled or refused; the first masks are bounded too."""
    kind, value = BOMBS[name]
    began = time.thread_time()
    try:
        check_structured(_output(kind, value))
    except RequestError as error:
        assert error.param == "response_format"
    assert time.thread_time() - began < 5, "half a second of processor time on this machine"


def test_llguidance_is_imported_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    structured._byte_tokenizer.cache_clear()
    check_structured.cache_clear()
    with pytest.raises(RequestError, match="pip install llguidance"):
        check_structured(_output("regex", "a"))
