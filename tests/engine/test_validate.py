from __future__ import annotations

import math
from typing import Any

import pytest

from minigpt.api.requests import Request, SamplingParams
from minigpt.core.errors import RequestError
from minigpt.engine.validate import check_request


def _check(prompt: list[int], n: int = 1, **sampling: Any) -> None:
    request = Request(id="r", prompt_token_ids=prompt, n=n, sampling=SamplingParams(**sampling))
    check_request(request, vocab_size=100, context_length=32, max_logprobs=5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 128},
        {"max_tokens": 31},
        {"temperature": 0},
        {"top_p": 0},
        {"top_k": 10**9},
        {"logprobs": 0},
        {"logprobs": 5},
        {"stop_token_ids": (0, 99)},
    ],
)
def test_accepts_the_limits(fields: dict[str, Any]) -> None:
    _check([0], **fields)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": []}, "prompt", "the prompt is empty"),
        ({"prompt": [1, 100]}, "prompt", "token id 100 is outside the vocabulary of 100"),
        ({"prompt": [-1]}, "prompt", "token id -1 is outside"),
        ({"n": 0}, "n", "n = 0: must be from 1 to 128"),
        ({"n": 129}, "n", "n = 129"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens = -1: must be at least 0"),
        ({"max_tokens": 32}, "max_tokens", "together 33, the context holds 32"),
        ({"prompt": [1] * 32}, "prompt", "the prompt has 32 tokens"),
        ({"temperature": -0.1}, "temperature", "temperature = -0.1: must be finite"),
        ({"temperature": math.nan}, "temperature", "temperature = nan"),
        ({"temperature": math.inf}, "temperature", "temperature = inf"),
        ({"top_p": 1.1}, "top_p", "top_p = 1.1: must be from 0 to 1"),
        ({"top_p": math.nan}, "top_p", "top_p = nan"),
        ({"top_k": -1}, "top_k", "top_k = -1: must be at least 0"),
        ({"logprobs": 6}, "logprobs", "logprobs = 6: must be from 0 to 5"),
        ({"logprobs": -1}, "logprobs", "logprobs = -1"),
        ({"stop": ("a", "")}, "stop", "must be non-empty texts"),
        ({"stop_token_ids": (100,)}, "stop_token_ids", "must be below the vocabulary's size"),
    ],
)
def test_refuses_and_names_the_field(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("(", r"\(")) as caught:
        _check(**({"prompt": [1]} | fields))
    assert caught.value.param == param
    assert caught.value.status == 400
