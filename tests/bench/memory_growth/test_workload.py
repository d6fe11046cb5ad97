from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from bench.memory_growth.workload import CONTEXT_LENGTH, KINDS, Call, encode, make_call

from minigpt.api.body import Body, parse_body
from minigpt.api.embeddings import EmbeddingBody
from minigpt.api.openai import ChatCompletionBody, CompletionBody
from minigpt.core.errors import RequestError
from minigpt.engine.structured import check_structured

BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatCompletionBody,
    "/v1/embeddings": EmbeddingBody,
}
CALLS = [make_call(number) for number in range(40 * len(KINDS))]


def test_kinds_take_turns() -> None:
    assert Counter(call.kind for call in CALLS) == dict.fromkeys(KINDS, 40)
    assert [call.kind for call in CALLS[: len(KINDS)]] == list(KINDS)


def test_the_same_number_is_the_same_call() -> None:
    assert [make_call(number) for number in range(len(CALLS))] == CALLS


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("refused", "read")])
def test_what_should_be_answered_is_a_valid_body_that_fits(kind: str) -> None:
    for call in CALLS:
        if call.kind != kind:
            continue
        raw = encode(call)
        assert raw is not None
        body = parse_body(BODIES[call.path], raw)
        if isinstance(body, CompletionBody):
            longest = max(map(len, body.prompt))
            assert longest + (body.max_tokens or 0) <= CONTEXT_LENGTH
        if isinstance(body, CompletionBody) and body.structured is not None:
            check_structured(body.structured)


def test_some_refusals_are_of_the_schema_and_some_come_later() -> None:
    def refused_at_once(call: Call) -> bool:
        raw = encode(call)
        assert raw is not None
        try:
            parse_body(CompletionBody, raw)
        except RequestError:
            return True
        return False

    refused = Counter(refused_at_once(call) for call in CALLS if call.kind == "refused")
    assert min(refused[True], refused[False]) > 5


def test_prompts_are_unlike_and_the_shared_prefix_is_shared() -> None:
    def prompts(kind: str) -> list[Any]:
        return [call.body["prompt"] for call in CALLS if call.kind == kind]

    assert len(set(prompts("greedy"))) > 35
    shared = prompts("shared prefix")
    assert len({text[:240] for text in shared}) == 1
    assert len(set(shared)) > 35


def test_clients_leave_at_both_moments() -> None:
    assert {call.leaves for call in CALLS if call.kind == "client leaves"} == {
        "before the first token", "during the stream",
    }  # fmt: skip
