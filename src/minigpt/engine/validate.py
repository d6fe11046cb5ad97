"""Refuse requests that can't be served, before they take part in anything; no torch here."""

from __future__ import annotations

import math

from minigpt.api.requests import Request, SamplingParams
from minigpt.core.errors import RequestError

MAX_N = 128
"""Most answers to one request, OpenAI's own limit."""

MAX_BIASES = 1024
"""Most tokens in one request's `logit_bias`."""


def check_request(
    request: Request, *, vocab_size: int, context_length: int, max_logprobs: int
) -> None:
    """Check every field of a request.

    Args:
        request: What came over the wire.
        vocab_size: Token ids must be below this.
        context_length: Prompt and max_tokens together may not exceed this.
        max_logprobs: Most alternatives with each token.

    Raises:
        RequestError: Names the field, its value and the rule.
    """
    prompt = request.prompt_token_ids
    if not prompt:
        raise RequestError("the prompt is empty: it must have at least 1 token", param="prompt")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        bad = next(token for token in prompt if not 0 <= token < vocab_size)
        raise RequestError(
            f"prompt: token id {bad} is outside the vocabulary of {vocab_size}", param="prompt"
        )
    if not 1 <= request.n <= MAX_N:
        raise RequestError(f"n = {request.n}: must be from 1 to {MAX_N}", param="n")
    _check_sampling(request.sampling, vocab_size=vocab_size, max_logprobs=max_logprobs)
    _check_ends(request.sampling, vocab_size=vocab_size)
    _check_penalties(request.sampling, vocab_size=vocab_size)
    if request.pooling is not None and request.sampling.max_tokens:
        raise _bad("max_tokens", request.sampling.max_tokens, "0 for an embedding")
    length = len(prompt) + request.sampling.max_tokens
    if length > context_length:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens and max_tokens = {request.sampling.max_tokens}: "
            f"together {length}, the context holds {context_length}",
            param="prompt" if len(prompt) >= context_length else "max_tokens",
            code="context_length_exceeded",
            remedy="shorten the prompt or lower max_tokens",
        )


def _check_sampling(sampling: SamplingParams, *, vocab_size: int, max_logprobs: int) -> None:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise _bad("temperature", sampling.temperature, "finite and at least 0")
    if not 0 <= sampling.top_p <= 1:
        raise _bad("top_p", sampling.top_p, "from 0 to 1")
    if sampling.top_k < 0:
        raise _bad("top_k", sampling.top_k, "at least 0 (0 is all)")
    if not 0 <= sampling.min_p <= 1:
        raise _bad("min_p", sampling.min_p, "from 0 to 1")
    for param in ("logprobs", "prompt_logprobs"):
        count = getattr(sampling, param)
        if count is not None and not 0 <= count <= max_logprobs:
            raise _bad(param, count, f"from 0 to {max_logprobs}")


def _check_ends(sampling: SamplingParams, *, vocab_size: int) -> None:
    if sampling.max_tokens < 0:
        raise _bad("max_tokens", sampling.max_tokens, "at least 0 (0 reads the prompt alone)")
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        rule = f"from 0 to max_tokens = {sampling.max_tokens}"
        raise _bad("min_tokens", sampling.min_tokens, rule)
    if not all(sampling.stop):
        raise _bad("stop", list(sampling.stop), "non-empty texts")
    if not all(0 <= token < vocab_size for token in sampling.stop_token_ids):
        rule = f"below the vocabulary's size of {vocab_size}"
        raise _bad("stop_token_ids", list(sampling.stop_token_ids), rule)
    if sampling.structured is not None:
        rule = "left out of a structured answer, which ends where its grammar does"
        if sampling.min_tokens:
            raise _bad("min_tokens", sampling.min_tokens, rule)
        if sampling.ignore_eos:
            raise _bad("ignore_eos", sampling.ignore_eos, rule)


def _check_penalties(sampling: SamplingParams, *, vocab_size: int) -> None:
    for param in ("frequency_penalty", "presence_penalty"):
        if not -2 <= getattr(sampling, param) <= 2:
            raise _bad(param, getattr(sampling, param), "from -2 to 2")
    repetition = sampling.repetition_penalty
    if not (math.isfinite(repetition) and repetition > 0):
        raise _bad("repetition_penalty", repetition, "finite and more than 0 (1 is none)")
    biases = sampling.logit_bias
    if len(biases) > MAX_BIASES:
        raise RequestError(
            f"logit_bias has {len(biases)} tokens: at most {MAX_BIASES}", param="logit_bias"
        )
    for token, bias in biases.items():
        if not 0 <= token < vocab_size:
            rule = f"for tokens below the vocabulary's size of {vocab_size}"
            raise _bad("logit_bias", {token: bias}, rule)
        if not -100 <= bias <= 100:
            raise _bad("logit_bias", {token: bias}, "from -100 to 100")


def _bad(param: str, value: object, rule: str) -> RequestError:
    return RequestError(f"{param} = {value!r}: must be {rule}", param=param)
