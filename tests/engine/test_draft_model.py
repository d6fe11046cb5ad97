"""A second model that drafts: answers stay those of the first."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt.api.requests import Request, SamplingParams
from minigpt.core.errors import ConfigError
from minigpt.engine.config import EngineConfig, SpeculativeConfig
from minigpt.engine.cost_model import StepWork
from minigpt.engine.engine import Engine
from minigpt.engine.preflight import plan_memory
from minigpt.engine.resolve import kv_bytes_per_token, resolve_memory
from minigpt.model.decoder import Decoder

Make = Callable[..., Any]
DRAFT = {"method": "draft", "draft_model": "beside"}


def _prompt(length: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(1, 250) for _ in range(length)]


def _request(name: str, prompt: list[int], n: int = 1, **sampling: Any) -> Request:
    params = SamplingParams(**({"ignore_eos": True, "seed": 5, "max_tokens": 25} | sampling))
    return Request(id=name, prompt_token_ids=prompt, n=n, sampling=params)


REQUESTS = [
    _request("greedy", _prompt(20, 1), temperature=0),
    _request("several", _prompt(17, 2), n=3, temperature=0.8),
    _request("nucleus", _prompt(9, 3), temperature=1.1, top_p=0.8, top_k=5),
    _request("scored", _prompt(30, 4), temperature=0.7, logprobs=2, prompt_logprobs=1),
    _request("penalized", _prompt(12, 5), frequency_penalty=0.3),
]


@pytest.fixture
def engines(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Engine, Engine]]:
    """Two engines alike, the second with drafts, which seem to cost it nothing."""

    def make(model: Decoder, draft: Decoder, **changes: Any) -> tuple[Engine, Engine]:
        plain = make_engine(model, speculative={"method": "none"}, **changes)
        drafting = make_engine(model, speculative=DRAFT, draft=draft, **changes)
        for _ in range(3):
            drafting._pacer.model.observe(StepWork(decode_rows=1), 1.0)
        monkeypatch.setattr(drafting._pacer.model, "observe", lambda work, seconds: None)
        return plain, drafting

    return make


def _relative(make_model: Make, model: Decoder, distance: float) -> Decoder:
    """A model whose weights lie near another's: often, but not always, of one mind with it."""
    draft: Decoder = make_model(1)
    with torch.no_grad():
        for ours, theirs in zip(draft.parameters(), model.parameters(), strict=True):
            ours.mul_(distance).add_(theirs, alpha=1 - distance)
    return draft


@pytest.mark.parametrize(("num_blocks", "budget"), [(300, 60), (40, 30)])
def test_answers_are_the_same(
    make_model: Make, engines: Make, run: Make, num_blocks: int, budget: int
) -> None:
    model = make_model()
    draft = _relative(make_model, model, 0.03)
    plain, drafting = engines(model, draft, num_blocks=num_blocks, max_batched_tokens=budget)
    expected, found = run(plain, *REQUESTS), run(drafting, *REQUESTS)
    for key, answer in expected.items():
        assert found[key].token_ids == answer.token_ids, key
        assert found[key].finish_reason == answer.finish_reason
    ours, theirs = (a["scored", 0].deltas[0].prompt_logprobs for a in (found, expected))
    assert [e.logprob for e in ours] == pytest.approx([e.logprob for e in theirs], abs=1e-4)
    stats = drafting.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.step <= plain.stats().step
    if num_blocks == 40:
        assert stats.preemptions > 0


def test_a_model_of_one_mind_is_always_right(make_model: Make, engines: Make, run: Make) -> None:
    """Greedy or drawn, after preemption too: its cache holds what it should, everywhere."""
    model = make_model()
    _, drafting = engines(model, model, num_blocks=40, max_batched_tokens=40)
    run(drafting, *REQUESTS[:4])
    run(drafting, _request("again", REQUESTS[0].prompt_token_ids, max_tokens=40))
    stats = drafting.stats()
    assert stats.prefix_cache_hits > 0
    assert stats.accepted_tokens == stats.drafted_tokens > 50


@pytest.mark.parametrize("raises", [False, True])
def test_a_broken_draft_model_costs_no_answer(
    make_model: Make, engines: Make, run: Make, raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, draft = make_model(), make_model(1)

    def fail(*inputs: Any, **options: Any) -> None:
        raise RuntimeError("unlucky")

    if raises:
        monkeypatch.setattr(draft, "forward", fail)
    else:
        with torch.no_grad():
            draft.model.embed_tokens.weight.fill_(float("nan"))
    plain, drafting = engines(model, draft)
    expected, found = run(plain, *REQUESTS), run(drafting, *REQUESTS)
    assert {k: a.token_ids for k, a in found.items()} == {
        k: a.token_ids for k, a in expected.items()
    }
    assert drafting.stats().drafted_tokens == 0


def test_it_is_loaded_beside_the_model(tiny_model: Path, run: Make) -> None:
    speculative = SpeculativeConfig(method="draft", draft_model=str(tiny_model))
    config = EngineConfig(dtype="float32", max_num_seqs=2, speculative=speculative)
    engine = Engine.load(tiny_model, config)
    answers = run(engine, _request("r", [1, 2, 3, 4], temperature=0, max_tokens=30))
    assert len(answers["r", 0].token_ids) == 30


def test_both_models_count_in_memory(tiny_model: Path, make_model: Make) -> None:
    alone = EngineConfig(device="cpu", dtype="float32", threads=1)
    speculative = SpeculativeConfig(method="draft", draft_model=str(tiny_model))
    both = alone.replace(speculative=speculative)
    plans = [
        plan_memory(tiny_model, config, available=1 << 33, report=lambda line: None)
        for config in (alone, both)
    ]
    assert plans[1].weight_bytes == 2 * plans[0].weight_bytes
    assert plans[1].kv_bytes_per_token == 2 * plans[0].kv_bytes_per_token
    shape = make_model().config
    assert kv_bytes_per_token(alone, shape, shape) == 2 * kv_bytes_per_token(alone, shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, "vocabulary has 300 tokens, the model's 259"),
        ({"context_length": 64}, "context is 64 tokens, the engine's 128"),
    ],
)
def test_a_model_that_does_not_match_is_refused(
    make_model: Make, changes: dict[str, int], message: str
) -> None:
    config = EngineConfig(device="cpu", dtype="float32", threads=1)
    with pytest.raises(ConfigError, match=message):
        resolve_memory(
            config,
            make_model().config,
            available=1 << 30,
            report=lambda line: None,
            draft=make_model(**changes).config,
        )


@pytest.mark.parametrize("changes", [{"method": "draft"}, {"draft_model": "somewhere"}])
def test_method_and_model_belong_together(changes: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="only there"):
        SpeculativeConfig.model_validate(changes)
