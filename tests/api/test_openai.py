from __future__ import annotations

import json
from typing import Any

import openai.types.chat.completion_create_params as chat_params
import openai.types.completion_create_params as completion_params
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.api.body import parse_body
from minigpt.api.openai import ChatCompletionBody, CompletionBody
from minigpt.api.requests import SamplingParams, StructuredOutput
from minigpt.core.errors import RequestError

MESSAGES = [{"role": "user", "content": "hi"}]


def completion(**more: Any) -> CompletionBody:
    return parse_body(CompletionBody, json.dumps({"model": "m", "prompt": "p"} | more).encode())


def chat(**more: Any) -> ChatCompletionBody:
    body = {"model": "m", "messages": MESSAGES} | more
    return parse_body(ChatCompletionBody, json.dumps(body).encode())


def test_every_parameter_of_the_public_client_is_known() -> None:
    """Known is not supported: but each is refused or taken by name, none is a surprise."""
    asked = set(completion_params.CompletionCreateParamsBase.__annotations__)
    assert asked <= set(CompletionBody.model_fields)
    asked = set(chat_params.CompletionCreateParamsBase.__annotations__)
    assert asked <= set(ChatCompletionBody.model_fields)


def test_null_is_as_good_as_absent() -> None:
    optional = set(CompletionBody.model_fields) - {"model", "prompt"}
    assert completion(**dict.fromkeys(optional)) == completion()
    optional = set(ChatCompletionBody.model_fields) - {"model", "messages"}
    assert chat(**dict.fromkeys(optional)) == chat()


def test_sampling_takes_over_everything() -> None:
    body = completion(
        temperature=0, top_p=0.5, top_k=-1, seed=-5, stop="end", stop_token_ids=[3],
        ignore_eos=True, logprobs=2, min_p=0.1, repetition_penalty=1.5, frequency_penalty=0.5,
        presence_penalty=-1, min_tokens=4, guided_regex="a+",
    )  # fmt: skip
    sampling = body.sampling(7)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (7, 0.0, 0.5)
    assert (sampling.top_k, sampling.seed, sampling.stop) == (0, -5, ("end",))
    assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.logprobs) == ((3,), True, 2)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.min_tokens) == (0.1, 1.5, 4)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -1)
    assert sampling.structured == StructuredOutput(kind="regex", text="a+", param="guided_regex")
    assert completion().sampling(16) == SamplingParams()


def test_chat_logprobs() -> None:
    assert chat().sampling(1).logprobs is None
    assert chat(logprobs=True).sampling(1).logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).sampling(1).logprobs == 4


def test_both_names_of_the_token_limit() -> None:
    assert chat().token_limit is None
    assert chat(max_tokens=3).token_limit == 3
    assert chat(max_completion_tokens=4).token_limit == 4
    assert chat(max_tokens=4, max_completion_tokens=4).token_limit == 4


def test_content_may_come_in_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(messages=[{"role": "user", "content": parts}])
    assert body.messages[0].text == "ab"
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(RequestError) as refused:
        chat(messages=[*MESSAGES, {"role": "user", "content": image}])
    assert refused.value.param == "messages[1].content[0].type"


@pytest.mark.parametrize("value", ["", None])
def test_neutral_values_are_taken(value: Any) -> None:
    assert completion(suffix=value).suffix == value


@pytest.mark.parametrize("value", [False, "0", [], 0, {"a": 1}])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(RequestError) as refused:
        completion(suffix=value)
    assert refused.value.code == "unsupported_parameter"


def test_logit_bias_has_token_ids_for_keys() -> None:
    assert completion(logit_bias={"5": 1, "7": -100}).sampling(1).logit_bias == {5: 1.0, 7: -100.0}
    for bad in ({"a": 1}, {"-1": 1}, {"5": 101}, {"5": True}, {"5": "1"}, [5], {"\u0665": 1}):
        with pytest.raises(RequestError, match="must map token ids") as refused:
            completion(logit_bias=bad)
        assert refused.value.param == "logit_bias"


def test_echo_asks_for_the_prompts_logprobs() -> None:
    assert completion(logprobs=3).sampling(1).prompt_logprobs is None
    assert completion(echo=True).sampling(1).prompt_logprobs is None
    assert completion(echo=True, logprobs=3).sampling(0).prompt_logprobs == 3
    assert completion(echo=True, logprobs=3, prompt_logprobs=5).sampling(0).prompt_logprobs == 5
    assert chat(prompt_logprobs=2).sampling(1).prompt_logprobs == 2
    assert completion(max_tokens=0).max_tokens == 0
    with pytest.raises(RequestError):
        chat(max_tokens=0)


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(RequestError) as refused:
        completion(temperature="x" * 10_000)
    assert len(str(refused.value)) < 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = sorted({*CompletionBody.model_fields, *ChatCompletionBody.model_fields, "unknown"})


@given(body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6) | JSON)
def test_any_json_is_a_body_or_a_refusal(body: Any) -> None:
    for cls in (CompletionBody, ChatCompletionBody):
        try:
            parse_body(cls, json.dumps(body).encode())
        except RequestError as error:
            assert error.status == 400
            assert "\n" not in str(error)
            assert error.param is not None or not isinstance(body, dict)


@given(raw=st.binary(max_size=40))
def test_any_bytes_are_a_body_or_a_refusal(raw: bytes) -> None:
    with pytest.raises(RequestError):
        parse_body(CompletionBody, raw)
