"""Scores and embeddings of prompts equal those of a full forward pass, however it was cut."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from minigpt.api.requests import Request, SamplingParams
from minigpt.engine import prompt_scores
from minigpt.engine.prompt_scores import score
from minigpt.model.attention import CausalAttention
from minigpt.model.decoder import Decoder

Make = Callable[..., Any]


def _prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1, 256) for _ in range(length)]


@torch.inference_mode()
def _hidden(model: Decoder, tokens: list[int]) -> torch.Tensor:
    attention = CausalAttention(sliding_window=model.config.sliding_window)
    positions = torch.arange(len(tokens))[None]
    hidden: torch.Tensor = model(torch.tensor([tokens]), positions, attention)
    return hidden[0]


@pytest.mark.parametrize("rows", [3, 32])
@pytest.mark.parametrize("max_tokens", [0, 1, 12])
def test_scores_equal_the_full_forward(
    make_model: Make, make_engine: Make, run: Make, full_logits: Make,
    monkeypatch: pytest.MonkeyPatch, max_tokens: int, rows: int,
) -> None:  # fmt: skip
    """Beside streams that decode, in chunks of at most 9 tokens, with preemptions."""
    monkeypatch.setattr(prompt_scores, "_ROWS", rows)
    model = make_model()
    engine = make_engine(model, num_blocks=40, max_batched_tokens=9)
    prompts = [_prompt(length, length) for length in (1, 2, 9, 25, 50, 70)]
    requests = [
        Request(
            id=str(i), prompt_token_ids=prompt, n=2,
            sampling=SamplingParams(
                max_tokens=max_tokens, prompt_logprobs=3, seed=i, ignore_eos=True, logprobs=0
            ),
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    stream = Request(
        id="stream", prompt_token_ids=[5], sampling=SamplingParams(max_tokens=99, ignore_eos=True)
    )
    answers = run(engine, stream, *requests)
    if max_tokens == 12:
        assert engine.stats().preemptions > 0
    for i, prompt in enumerate(prompts):
        logprobs = full_logits(model, prompt).log_softmax(-1)
        for index in range(2):
            answer = answers[str(i), index]
            assert answer.finish_reason == "length"
            assert len(answer.token_ids) == max_tokens
            first, *later = answer.deltas
            assert all(delta.prompt_logprobs is None for delta in later)
            assert [entry.token_id for entry in first.prompt_logprobs] == prompt[1:]
            for position, entry in enumerate(first.prompt_logprobs):
                expected = logprobs[position]
                assert entry.logprob == pytest.approx(
                    expected[prompt[position + 1]].item(), abs=1e-4
                )
                best = expected.topk(3)
                assert [token for token, _, _ in entry.top] == best.indices.tolist()
                assert [v for _, _, v in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_no_more_logits_exist_at_once_than_needed(
    make_model: Make, make_engine: Make, run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    sizes: list[int] = []
    project = model.logits

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(hidden.shape[0])
        logits: torch.Tensor = project(hidden)
        return logits

    monkeypatch.setattr(model, "logits", watched)
    engine = make_engine(model, max_batched_tokens=128)
    run(
        engine,
        Request(
            id="r", prompt_token_ids=_prompt(100, 1),
            sampling=SamplingParams(max_tokens=0, prompt_logprobs=0),
        ),
    )  # fmt: skip
    assert max(sizes) == 32
    assert sum(sizes) == 99 + 1


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_equal_the_full_forward(
    make_model: Make, make_engine: Make, run: Make, pooling: Any
) -> None:
    model = make_model()
    engine = make_engine(model, num_blocks=40, max_batched_tokens=9)
    prompts = [_prompt(length, length) for length in (1, 9, 30, 64)]
    requests = [
        Request(
            id=str(i), prompt_token_ids=prompt, pooling=pooling,
            sampling=SamplingParams(max_tokens=0),
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    answers = run(engine, *requests)
    for i, prompt in enumerate(prompts):
        hidden = _hidden(model, prompt)
        expected = hidden.mean(0) if pooling == "mean" else hidden[-1]
        (delta,) = answers[str(i), 0].deltas
        assert (delta.finish_reason, delta.token_ids) == ("stop", [])
        assert delta.embedding == pytest.approx(expected.tolist(), abs=1e-4)
    assert engine.stats().prompt_tokens == sum(map(len, prompts))
    assert engine.stats().generation_tokens == 0


def test_a_prompt_that_fills_the_context_can_be_scored(
    make_model: Make, make_engine: Make, run: Make
) -> None:
    engine = make_engine(make_model(), num_blocks=32)
    request = Request(
        id="r", prompt_token_ids=_prompt(128, 2),
        sampling=SamplingParams(max_tokens=0, prompt_logprobs=0),
    )  # fmt: skip
    assert len(run(engine, request)["r", 0].deltas[0].prompt_logprobs) == 127


def test_broken_logits_in_a_prompt_fail_that_request_alone(
    make_model: Make, make_engine: Make, run: Make
) -> None:
    model = make_model(sliding_window=4)
    # Greedy, for a draw might take the broken token, or end the text.
    sure = SamplingParams(temperature=0)
    good = Request(id="good", prompt_token_ids=_prompt(20, 1), sampling=sure)
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = float("nan")
    scored = SamplingParams(max_tokens=0, prompt_logprobs=0)
    # The window has left the broken token behind where the prompt ends.
    bad = Request(id="bad", prompt_token_ids=[0, *_prompt(40, 2)], sampling=scored)
    also = Request(id="also", prompt_token_ids=_prompt(30, 3), sampling=scored)
    answers = run(make_engine(model), good, bad, also)
    assert answers["bad", 0].finish_reason == "error"
    assert "not finite" in answers["bad", 0].deltas[-1].error
    assert answers["good", 0].finish_reason == "length"
    assert len(answers["also", 0].deltas[0].prompt_logprobs) == 29


def test_score_of_given_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, -1.0, 0.0]])
    first, second = score(logits, [2, 1], 2)
    expected = logits.log_softmax(-1)
    assert first.logprob == pytest.approx(expected[0, 2].item())
    assert second.logprob == pytest.approx(expected[1, 1].item())
    assert [token for token, _ in second.top] == [0, 2]
    with pytest.raises(FloatingPointError):
        score(torch.tensor([[0.0, float("nan")]]), [0], 0)
