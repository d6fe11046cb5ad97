"""The REST API as its clients see it: a real server, the public `openai` client, plain HTTP."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from tests.serve.conftest import ServerProcess

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}
HELLO: Any = [{"role": "user", "content": "hello"}]


def test_models_are_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "minigpt")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt="hello", max_tokens=12, **GREEDY)
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason) == (0, "length")
    assert choice.text
    assert answer.usage is not None
    # The byte tokenizer: five letters after the token that begins every text.
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == 18


def test_all_forms_of_a_prompt_agree(client: openai.OpenAI) -> None:
    tokens = client.post("/../tokenize", body={"prompt": "ab"}, cast_to=object)
    assert tokens == {"tokens": [256, 97, 98], "count": 3}
    forms: list[Any] = ["ab", ["ab"], [256, 97, 98], [[256, 97, 98]]]
    texts = set()
    for form in forms:
        answer = client.completions.create(prompt=form, max_tokens=8, **GREEDY)
        texts.add(answer.choices[0].text)
    assert len(texts) == 1


def test_prompts_times_n_make_numbered_choices(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["ab", "cd", "ef"], n=2, max_tokens=6, seed=3
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    alone = client.completions.create(model="tiny", prompt="cd", n=2, max_tokens=6, seed=3)
    assert [c.text for c in answer.choices[2:4]] == [c.text for c in alone.choices]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 9
    assert answer.usage.completion_tokens == 36


@pytest.mark.parametrize("logprobs", [None, 2])
def test_joined_stream_is_the_whole_answer(client: openai.OpenAI, logprobs: int | None) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": ["hello", "world"], "n": 2, "seed": 11, "max_tokens": 40,
        "logprobs": logprobs,
    }  # fmt: skip
    whole = client.completions.create(**asked)
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    *pieces, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    for choice in whole.choices:
        mine = [c for chunk in pieces for c in chunk.choices if c.index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        assert [p.finish_reason for p in mine if p.finish_reason] == [choice.finish_reason]
        assert mine[-1].finish_reason == choice.finish_reason
        if logprobs is not None:
            assert choice.logprobs is not None
            joined: list[Any] = []
            for piece in mine:
                assert piece.logprobs is not None
                joined += piece.logprobs.token_logprobs or []
            # Batched with others at other times: equal up to rounding.
            assert joined == pytest.approx(choice.logprobs.token_logprobs, abs=1e-3)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_stream_without_usage_has_none(client: openai.OpenAI) -> None:
    stream = client.completions.create(prompt="hello", max_tokens=4, stream=True, **GREEDY)
    chunks = list(stream)
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)


def test_events_end_with_done(server: ServerProcess) -> None:
    body = {**GREEDY, "prompt": "hello", "max_tokens": 3, "stream": True}
    answer = server.http.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_seed_repeats_and_seeds_differ(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        answer = client.completions.create(model="tiny", prompt="x", max_tokens=24, seed=seed)
        return answer.choices[0].text

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_stop_ends_the_text_before_it(client: openai.OpenAI) -> None:
    free = client.completions.create(model="tiny", prompt="abc", max_tokens=60, seed=5)
    text = free.choices[0].text
    stop = text[20:22]
    cut = text[: text.index(stop)]
    answer = client.completions.create(
        model="tiny", prompt="abc", max_tokens=60, seed=5, stop=[stop, "never there"]
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (cut, "stop")
    stream = client.completions.create(
        model="tiny", prompt="abc", max_tokens=60, seed=5, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == cut


def test_echo_puts_the_prompt_first(client: openai.OpenAI) -> None:
    plain = client.completions.create(prompt=["hello", "you"], max_tokens=5, **GREEDY)
    echoed = client.completions.create(prompt=["hello", "you"], max_tokens=5, echo=True, **GREEDY)
    assert [c.text for c in echoed.choices] == [
        "hello" + plain.choices[0].text,
        "you" + plain.choices[1].text,
    ]
    stream = client.completions.create(
        prompt="hello", max_tokens=5, echo=True, stream=True, **GREEDY
    )
    assert "".join(c.choices[0].text for c in stream) == echoed.choices[0].text


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(prompt="hello", max_tokens=6, logprobs=3, **GREEDY)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None and logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None and logprobs.text_offset is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 6
    for logprob, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        # Greedy: the chosen one is the most likely.
        assert logprob == max(top.values()) <= 0


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=HELLO, max_tokens=10, **GREEDY)
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert choice.message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 10


def test_chat_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": HELLO, "n": 3, "seed": 2, "max_completion_tokens": 20,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert [c.delta.role for c in mine if c.delta.role] == ["assistant"]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        streamed = [t for c in mine if c.logprobs for t in c.logprobs.content or []]
        assert [t.token for t in streamed] == [t.token for t in choice.logprobs.content]
        assert len(streamed) == 20
        assert all(len(t.top_logprobs) == 2 and t.bytes is not None for t in streamed)


def test_chat_runs_to_the_end_of_the_context_without_a_limit(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=HELLO, extra_body={"ignore_eos": True}, **GREEDY
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 512
    assert answer.choices[0].finish_reason == "length"


def test_async_client(server: ServerProcess) -> None:
    async def both() -> tuple[str, str]:
        options: Any = {"api_key": "none", "max_retries": 0}
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", **options) as client:
            whole = client.chat.completions.create(messages=HELLO, max_tokens=16, **GREEDY)
            stream = await client.chat.completions.create(
                messages=HELLO, max_tokens=16, stream=True, **GREEDY
            )
            joined = "".join([c.choices[0].delta.content or "" async for c in stream])
            return (await whole).choices[0].message.content or "", joined

    whole, joined = asyncio.run(both())
    assert whole == joined


def test_many_at_once_answer_as_alone(server: ServerProcess, client: openai.OpenAI) -> None:
    prompts = [f"prompt number {number}" for number in range(24)]

    async def all_at_once() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            bodies = [{"model": "tiny", "prompt": p, "seed": 7, "max_tokens": 16} for p in prompts]
            answers = await asyncio.gather(
                *(http.post("/v1/completions", json=body) for body in bodies)
            )
            return [answer.json()["choices"][0]["text"] for answer in answers]

    together = asyncio.run(all_at_once())
    for number in (0, 11, 23):
        alone = client.completions.create(
            model="tiny", prompt=prompts[number], seed=7, max_tokens=16
        )
        assert alone.choices[0].text == together[number]


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"frequency_penalty": 2.5}, "frequency_penalty", "invalid_value"),
        ({"logit_bias": {"5": 200}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5000": 1}}, "logit_bias", None),
        ({"best_of": 3}, "best_of", "invalid_value"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"min_p": 2}, "min_p", "invalid_value"),
        ({"min_tokens": 20}, "min_tokens", None),
        ({"typical_p": 0.1}, "typical_p", "unknown_parameter"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [5, "five"]}, "prompt", "invalid_value"),
        ({"prompt": [5, 700]}, "prompt", None),
        ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
        ({"stop_token_ids": [9999]}, "stop_token_ids", None),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
        ({"guided_regex": "(a"}, "guided_regex", "invalid_value"),
        ({"guided_choice": []}, "guided_choice", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"max_tokens": 512}, "max_tokens", "context_length_exceeded"),
        ({"prompt": "x" * 600}, "prompt", "context_length_exceeded"),
    ],
)
def test_refusals_name_the_parameter(
    server: ServerProcess, changes: dict[str, Any], param: str, code: str | None
) -> None:
    body = {"model": "tiny", "prompt": "hello"} | changes
    answer = server.http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert param.split("[")[0] in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"prompt": "hello"}, "prompt"),
    ],
)
def test_chat_refusals_name_the_parameter(
    server: ServerProcess, changes: dict[str, Any], param: str
) -> None:
    body = {"model": "tiny", "messages": HELLO} | changes
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_the_client_raises_what_the_server_refuses(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="a", presence_penalty=3.0)
    assert refused.value.param == "presence_penalty"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x" * 600}]
        )
    assert long.value.code == "context_length_exceeded"


def test_parameters_without_an_effect_are_taken(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(messages=HELLO, max_tokens=4, **GREEDY)
    assistant: Any = plain.choices[0].message.model_dump()
    answer = client.chat.completions.create(
        messages=[*HELLO, assistant, *HELLO],
        max_tokens=4,
        n=1,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        user="someone",
        store=False,
        metadata={"job": "7"},
        response_format={"type": "text"},
        tool_choice="none",
        service_tier="auto",
        **GREEDY,
    )
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "body", [b"{", b"", b"\xff\xfe", b'{"model": "tiny", "prompt": "\\ud800"}']
)
def test_malformed_json_is_refused(server: ServerProcess, body: bytes) -> None:
    answer = server.http.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


def test_deep_nesting_is_refused(server: ServerProcess) -> None:
    body = b'{"model": "tiny", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert server.http.post("/v1/completions", content=body).status_code == 400


@pytest.mark.parametrize("body", [b"[]", b"5", b'"text"'])
def test_other_json_is_refused(server: ServerProcess, body: bytes) -> None:
    answer = server.http.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_type"


def test_unknown_paths_and_methods(server: ServerProcess) -> None:
    lost = server.http.get("/v2/completions")
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, "not_found")
    wrong = server.http.get("/v1/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")


def test_detokenize(server: ServerProcess) -> None:
    answer = server.http.post("/detokenize", json={"tokens": [256, 104, 105]})
    assert answer.json() == {"prompt": "hi"}
    refused = server.http.post("/detokenize", json={"tokens": [999]})
    assert refused.json()["error"]["param"] == "tokens"


def test_health_ready_version_and_schema(server: ServerProcess) -> None:
    assert server.http.get("/health").json() == {"status": "ready"}
    assert server.http.get("/ready").json() == {"status": "ready"}
    assert server.http.get("/version").json()["version"]
    schema = server.http.get("/openapi.json").json()
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]
    assert "prompt" in body["content"]["application/json"]["schema"]["properties"]
