"""Sampling options, scores, embeddings and structured output through the REST API."""

from __future__ import annotations

import base64
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import openai
import pytest
import torch

from minigpt.data.tokenizer_build import bytes_tokenizer
from minigpt.model.attention import CausalAttention
from minigpt.model.weights import load_model

if TYPE_CHECKING:
    from tests.serve.conftest import ServerProcess

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}
HELLO: Any = [{"role": "user", "content": "hello"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def hidden_and_logprobs(tiny_model: Path) -> Any:
    """What the model itself says of tokens, without any engine."""
    model = load_model(tiny_model, dtype="float32", device="cpu").model

    @torch.inference_mode()
    def compute(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(len(tokens))[None]
        hidden = model(torch.tensor([tokens]), positions, CausalAttention())
        return hidden[0], model.logits(hidden)[0].log_softmax(-1)

    return compute


def complete(server: ServerProcess, **body: Any) -> dict[str, Any]:
    answer = server.http.post("/v1/completions", json=GREEDY | body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_logit_bias_min_tokens_and_penalties_have_their_effect(server: ServerProcess) -> None:
    body = {"prompt": "hello", "max_tokens": 30}
    biased = complete(server, **body, logit_bias={"122": 100})["choices"][0]
    assert biased["text"] == "z" * 30
    ended = complete(server, **body, logit_bias={"256": 100})["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    later = complete(server, **body, logit_bias={"256": 100}, min_tokens=7, logprobs=0)
    assert len(later["choices"][0]["logprobs"]["tokens"]) == 8
    assert later["choices"][0]["finish_reason"] == "stop"
    stops = complete(server, **body, logit_bias={"122": 100}, stop="z", min_tokens=7)["choices"][0]
    assert (stops["text"], stops["finish_reason"]) == ("z" * 6, "stop")
    # Against this bias of 10, the third "z" costs more than it brings.
    spread = complete(
        server, **body, logit_bias={"122": 10}, frequency_penalty=2, presence_penalty=2
    )["choices"][0]["text"]
    assert spread.startswith("z")
    assert spread.count("z") < 25
    free = complete(server, prompt="hello", max_tokens=40, ignore_eos=True, logprobs=0)
    unlike = complete(
        server, prompt="hello", max_tokens=40, ignore_eos=True, logprobs=0, repetition_penalty=10.0
    )
    kinds = [len(set(a["choices"][0]["logprobs"]["tokens"])) for a in (free, unlike)]
    assert kinds[1] > kinds[0]
    narrow = [
        complete(server, prompt="x", max_tokens=9, temperature=2, seed=s, min_p=1.0) for s in (1, 2)
    ]
    greedy = complete(server, prompt="x", max_tokens=9)
    assert {a["choices"][0]["text"] for a in narrow} == {greedy["choices"][0]["text"]}


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echoed_scores_are_the_models_own(
    server: ServerProcess, hidden_and_logprobs: Any, max_tokens: int
) -> None:
    """Texts and batched token lists; the prompts are longer than a step's budget of tokens."""
    texts = ["the old river", "a " * 180, "\u00e4\u00f6", "x"]
    lists = [[256, *text.encode()] for text in texts]
    for prompt in (texts, lists):
        answer = complete(server, prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens)
        assert answer["usage"]["completion_tokens"] == max_tokens * len(texts)
        for choice, text, tokens in zip(answer["choices"], texts, lists, strict=True):
            logprobs = hidden_and_logprobs(tokens)[1]
            found = choice["logprobs"]
            assert choice["text"].startswith(text)
            assert found["token_logprobs"][0] is None
            assert found["top_logprobs"][0] is None
            for name in found:
                assert len(found[name]) == len(tokens) + max_tokens
            expected = [logprobs[i, token].item() for i, token in enumerate(tokens[1:])]
            assert found["token_logprobs"][1 : len(tokens)] == pytest.approx(expected, abs=1e-4)
            assert found["tokens"][:2] == ["", bytes([tokens[1]]).decode("utf-8", "replace")]
            if max_tokens:
                assert found["text_offset"][-1] == len(text)
            best = logprobs.max(-1).values.tolist()
            for top, highest in zip(found["top_logprobs"][1:], best, strict=False):
                assert max(top.values()) == pytest.approx(highest, abs=1e-4)


def test_lm_eval_scores_over_the_api(server: ServerProcess, hidden_and_logprobs: Any) -> None:
    """The harness's own client, in batches of token lists of several lengths."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    harness = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="tiny", tokenizer_backend=None, batch_size=3,
    )  # fmt: skip
    # What a Hugging Face tokenizer would be there for is done: the requests are tokens.
    harness.tokenizer, harness.tokenized_requests = bytes_tokenizer(), True
    pairs = [("the old", " river"), ("a", "b"), ("some longer text of", " words"), ("q", "rst")]
    requests = [(pair, [256, *pair[0].encode()], [*pair[1].encode()]) for pair in pairs]
    scores = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, continuation), (total, greedy) in zip(requests, scores, strict=True):
        logprobs = hidden_and_logprobs(context + continuation)[1][len(context) - 1 :]
        expected = sum(logprobs[i, token].item() for i, token in enumerate(continuation))
        assert total == pytest.approx(expected, abs=1e-3)
        rows = logprobs[: len(continuation)].argmax(-1)
        assert greedy == (rows.tolist() == continuation)


def test_echoed_scores_in_a_stream(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": ["hello", "you"], "n": 2, "max_tokens": 4, "echo": True,
        "logprobs": 1, "seed": 5,
    }  # fmt: skip
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        tokens = [t for piece in mine if piece.logprobs for t in piece.logprobs.tokens or []]
        assert choice.logprobs is not None
        assert tokens == choice.logprobs.tokens


def test_prompt_logprobs_in_vllms_form(server: ServerProcess, hidden_and_logprobs: Any) -> None:
    tokens = [256, *b"abc"]
    logprobs = hidden_and_logprobs(tokens)[1]
    found = complete(server, prompt=[tokens, tokens], max_tokens=2, prompt_logprobs=3)
    chat = server.http.post(
        "/v1/chat/completions", json=GREEDY | {"messages": HELLO, "prompt_logprobs": 0, "n": 2}
    ).json()
    assert chat["prompt_logprobs"][0] is None
    assert all(len(entries) == 1 for entries in chat["prompt_logprobs"][1:])
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    for choice in found["choices"]:
        first, *others = choice["prompt_logprobs"]
        assert first is None
        assert choice["logprobs"] is None
        for i, entries in enumerate(others):
            chosen = entries[str(tokens[i + 1])]
            assert chosen["logprob"] == pytest.approx(logprobs[i, tokens[i + 1]].item(), abs=1e-4)
            assert chosen["decoded_token"] == chr(tokens[i + 1])
            assert {str(t) for t in logprobs[i].topk(3).indices.tolist()} <= set(entries)


@pytest.mark.parametrize("pooling", ["mean", "last", None])
def test_embeddings(
    server: ServerProcess, client: openai.OpenAI, hidden_and_logprobs: Any, pooling: str | None
) -> None:
    texts = ["hello", "a much longer text " * 20, ""]
    extra = {"pooling": pooling} if pooling else {}
    answer = client.embeddings.create(model="tiny", input=texts, extra_body=extra)
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == sum(len(text) + 1 for text in texts)
    for text, item in zip(texts, answer.data, strict=True):
        hidden = hidden_and_logprobs([256, *text.encode()])[0]
        expected = hidden[-1] if pooling == "last" else hidden.mean(0)
        assert item.embedding == pytest.approx((expected / expected.norm()).tolist(), abs=1e-4)
        plain: Any = server.http.post(
            "/v1/embeddings", json={"model": "tiny", "input": text, "normalize": False} | extra
        ).json()
        assert plain["data"][0]["embedding"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_embeddings_in_base64_and_refusals(server: ServerProcess) -> None:
    def ask(**body: Any) -> Any:
        return server.http.post("/v1/embeddings", json={"model": "tiny"} | body)

    numbers = ask(input="hello").json()["data"][0]["embedding"]
    packed = ask(input=[[256, *b"hello"]], encoding_format="base64").json()["data"][0]["embedding"]
    found = np.frombuffer(base64.b64decode(packed), dtype="<f4")
    assert found == pytest.approx(np.array(numbers), abs=1e-5)
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"input": []}, "input"),
        ({"input": "x" * 600}, "prompt"),
        ({"input": "x", "dimensions": 5}, "dimensions"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": "x", "temperature": 1}, "temperature"),
    ]
    for body, param in refusals:
        answer = ask(**body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert ask(input="x", model="other").status_code == 404


def test_json_schema_and_json_object(client: openai.OpenAI) -> None:
    stopped = 0
    forms: list[Any] = [
        {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
        {"type": "json_object"},
    ]
    for form in forms:
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, n=6, seed=4, max_tokens=120, response_format=form,
            logit_bias={"125": 4},
        )  # fmt: skip
        for choice in answer.choices:
            if choice.finish_reason == "stop":
                stopped += 1
                value = json.loads(choice.message.content or "")
                jsonschema.validate(value, SCHEMA if form is forms[0] else {"type": "object"})
    assert stopped >= 6


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-c]{1,9}x"}, "[0-9]{3}-[a-c]{1,9}x"),
        ({"structured_outputs": {"regex": "(ab|cd){2,9}"}}, "(ab|cd){2,9}"),
        ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
        ({"guided_choice": ["red", "green"]}, "red|green"),
        ({"structured_outputs": {"grammar": 'start: "a" | "b" start'}}, "b*a"),
        ({"guided_grammar": 'start: "a" | "b" start'}, "b*a"),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, "true|false"),
        ({"guided_json": {"const": [1, "x"]}}, r'\[[ \n]*1[ \n]*,[ \n]*"x"[ \n]*\]'),
    ],
)
def test_vllms_extensions(server: ServerProcess, fields: dict[str, Any], pattern: str) -> None:
    answer = complete(
        server, prompt="x", n=4, max_tokens=60, temperature=1, seed=2, stream=False, **fields
    )
    for choice in answer["choices"]:
        assert choice["finish_reason"] == "stop" or choice["text"].count("b") > 20
        assert choice["finish_reason"] == "length" or re.fullmatch(pattern, choice["text"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"enum": []}},
                }
            },
            "response_format",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"not": {"type": "string"}}},
                }
            },
            "response_format",
        ),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_json": "{"}, "guided_json"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
        ({"guided_regex": "a", "min_tokens": 2, "max_tokens": 5}, "min_tokens"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_json": {"enum": ["x" * 40_000]}}, "guided_json"),
    ],
)
def test_what_can_not_be_kept_to_is_refused(
    server: ServerProcess, fields: dict[str, Any], param: str
) -> None:
    answer = server.http.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": HELLO} | fields
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert server.metric("vllm:num_requests_running") == 0


def test_a_schema_bomb_holds_up_no_stream(server: ServerProcess) -> None:
    """It is compiled beside the event loop: another stream's tokens still come."""
    bomb = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(900)}}
    body = {"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    gaps: list[float] = []
    with server.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = (line for line in stream.iter_lines() if line.startswith("data: {"))
        next(lines)
        answer = server.http.post(
            "/v1/completions", json=GREEDY | {"prompt": "x", "guided_json": bomb, "max_tokens": 2}
        )
        last = time.monotonic()
        for _ in lines:
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
    assert answer.status_code == 400
    assert "too complex" in answer.json()["error"]["message"]
    assert len(gaps) > 10
    assert max(gaps) < 5
