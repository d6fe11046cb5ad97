"""Answers with drafted tokens are those without, whatever happens to them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.distribution import check_distribution

from minigpt.api.requests import Request, SamplingParams, StructuredOutput
from minigpt.engine.cost_model import StepWork
from minigpt.engine.engine import Engine
from minigpt.model.decoder import Decoder

Make = Callable[..., Any]


@pytest.fixture
def engines(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Engine, Engine]]:
    """Two engines alike, the first without drafts; to the second they seem to cost nothing."""

    def make(model: Decoder, **changes: Any) -> tuple[Engine, Engine]:
        plain = make_engine(model, speculative={"method": "none"}, **changes)
        drafting = make_engine(model, speculative={"method": "ngram"}, **changes)
        for _ in range(3):
            drafting._pacer.model.observe(StepWork(decode_rows=1), 1.0)
        monkeypatch.setattr(drafting._pacer.model, "observe", lambda work, seconds: None)
        return plain, drafting

    return make


def _words(length: int, seed: int, alphabet: int = 6) -> list[int]:
    chance = random.Random(seed)
    return [1 + chance.randrange(alphabet) for _ in range(length)]


def _request(name: str, prompt: list[int], n: int = 1, **sampling: Any) -> Request:
    params = SamplingParams(**({"ignore_eos": True, "seed": 5} | sampling))
    return Request(id=name, prompt_token_ids=prompt, n=n, sampling=params)


@pytest.fixture
def make_narrow(make_model: Make) -> Make:
    """Models of few tokens: guesses are often right, and often wrong."""

    def make(alphabet: int = 8, **changes: Any) -> Decoder:
        model: Decoder = make_model(vocab_size=alphabet, eos_token_id=None, **changes)
        with torch.no_grad():
            assert model.lm_head is not None
            model.lm_head.weight.mul_(0.5)
        return model

    return make


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("num_blocks", [300, 33])
def test_answers_are_the_same(
    make_narrow: Make, engines: Make, run: Make, window: int | None, num_blocks: int
) -> None:
    """Greedy and drawn, alone and crowded out, with log-probabilities, n and penalties."""
    model = make_narrow(qk_norm=False, sliding_window=window)
    requests = [
        _request("greedy", _words(20, 1), temperature=0, max_tokens=40),
        _request("several", _words(17, 2), n=3, temperature=0.8, max_tokens=40),
        _request("nucleus", _words(9, 3), temperature=1.1, top_p=0.8, top_k=5, max_tokens=60),
        _request("scored", _words(30, 4), temperature=0.7, logprobs=3, max_tokens=30),
        _request("penalized", _words(12, 5), frequency_penalty=0.3, max_tokens=30),
        _request("short", _words(12, 6), max_tokens=2),
    ]
    plain, drafting = engines(model, num_blocks=num_blocks, max_batched_tokens=40)
    expected, found = run(plain, *requests), run(drafting, *requests)
    assert found.keys() == expected.keys()
    for key, answer in found.items():
        assert answer.token_ids == expected[key].token_ids, key
        assert answer.text == expected[key].text
        assert answer.finish_reason == expected[key].finish_reason
    for name in ("scored",):
        ours, theirs = (
            [e for d in a[name, 0].deltas for e in d.logprobs] for a in (found, expected)
        )
        assert [e.token_id for e in ours] == [e.token_id for e in theirs]
        assert [e.logprob for e in ours] == pytest.approx([e.logprob for e in theirs], abs=1e-4)
    stats = drafting.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.step < plain.stats().step
    assert plain.stats().drafted_tokens == 0
    assert stats.generation_tokens == plain.stats().generation_tokens
    if num_blocks == 33:
        assert stats.preemptions > 0


def test_what_shapes_the_logits_is_not_drafted_for(
    make_narrow: Make, engines: Make, run: Make
) -> None:
    model = make_narrow()
    cases: list[dict[str, Any]] = [
        {"repetition_penalty": 1.1},
        {"min_tokens": 5},
        {"logit_bias": {3: 1.0}},
        {
            "structured": StructuredOutput(kind="regex", text="[\\x01-\\x05]{30}"),
            "ignore_eos": False,
        },
    ]
    for number, sampling in enumerate(cases):
        plain, drafting = engines(model)
        request = _request(str(number), _words(20, 1), max_tokens=30, **sampling)
        expected, found = run(plain, request), run(drafting, request)
        assert found[request.id, 0].text == expected[request.id, 0].text
        assert drafting.stats().drafted_tokens == 0


def test_ends_within_what_was_drafted(make_narrow: Make, engines: Make, run: Make) -> None:
    """A stop string, a stop token and the limit fall where they fall without drafts."""
    model = make_narrow()
    free = run(engines(model)[0], _request("r", _words(20, 1), temperature=0, max_tokens=60))
    said = free["r", 0].token_ids
    for place in range(20, 40):
        stop = bytes(said[place - 2 : place + 1]).decode()
        for sampling in (
            {"max_tokens": place},
            {"stop": (stop,), "max_tokens": 60},
            {"stop_token_ids": (said[place],), "max_tokens": 60, "logprobs": 0},
        ):
            plain, drafting = engines(model)
            request = _request("r", _words(20, 1), temperature=0, **sampling)
            expected, found = run(plain, request)["r", 0], run(drafting, request)["r", 0]
            assert found.token_ids == expected.token_ids
            assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)


def test_later_prompts_find_what_was_drafted_in_the_cache(
    make_narrow: Make, engines: Make, run: Make
) -> None:
    """A prompt that continues an answer takes its blocks over: they hold no refused token."""
    model = make_narrow()
    plain, drafting = engines(model, num_blocks=200)
    prompt = _words(20, 7)
    for turn in range(4):
        request = _request(str(turn), prompt, temperature=0.6, max_tokens=22, seed=turn)
        answer = run(drafting, request)[str(turn), 0].token_ids
        assert answer == run(plain, request)[str(turn), 0].token_ids
        prompt = prompt + answer
    assert drafting.stats().prefix_cache_hits == plain.stats().prefix_cache_hits > 0
    assert drafting.stats().accepted_tokens > 0


def test_the_distribution_is_the_models(
    make_narrow: Make, engines: Make, full_logits: Make
) -> None:
    model = make_narrow(4)
    _, drafting = engines(model, num_blocks=600, max_num_seqs=100, max_batched_tokens=400)
    check_distribution(drafting, model, full_logits)


class Brittle(Decoder):
    """Computes no number at token 5, or raises at it."""

    raises = False

    def forward(self, *inputs: Any, **options: Any) -> Any:
        if self.raises and (inputs[0] == 5).any():
            raise RuntimeError("unlucky")
        return super().forward(*inputs, **options)


@pytest.mark.parametrize("raises", [False, True])
def test_a_drafted_token_that_breaks_the_model_is_given_up(
    make_narrow: Make, engines: Make, run: Make, raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer, which never needed it, goes on; and the others do not notice."""
    base = make_narrow(6)
    with torch.no_grad():
        base.lm_head.weight[5] = 0
    model = Brittle(base.config)
    model.load_state_dict(base.state_dict())
    prompt, other = _words(20, 1, 4), _words(16, 2, 4)
    requests = [
        _request(name, prompt, temperature=0, max_tokens=30)
        for name, prompt in (("r", prompt), ("other", other))
    ]
    plain, drafting = engines(model.eval())
    expected = run(plain, *requests)
    assert not any(5 in answer.token_ids for answer in expected.values())
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    model.raises = raises

    def misled(sequence: Any, count: int) -> tuple[int, ...]:
        drafts = sequence.request_id == "r" and sequence.drafting.allowed
        return (1, 5, 2)[:count] if drafts else ()

    monkeypatch.setattr(drafting._speculator, "_propose", misled)
    found = run(drafting, *requests)
    for key, answer in expected.items():
        assert found[key].finish_reason == "length"
        assert found[key].token_ids == answer.token_ids
