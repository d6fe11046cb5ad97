"""Heads that draft for their own model: answers stay the model's."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.distribution import check_distribution

from minigpt.api.requests import Request, SamplingParams
from minigpt.core.artifact import Artifact, create_artifact
from minigpt.core.errors import ModelError
from minigpt.engine.config import EngineConfig, SpeculativeConfig
from minigpt.engine.cost_model import StepWork
from minigpt.engine.engine import Engine
from minigpt.engine.preflight import plan_memory
from minigpt.kernels import library
from minigpt.model.attention import CausalAttention
from minigpt.model.decoder import Decoder
from minigpt.model.draft_heads import (
    DraftHeads,
    DraftHeadsConfig,
    count_parameters,
    save_draft_heads,
)
from minigpt.model.weights import load_model, save_model

Make = Callable[..., Any]
HEADS = {"method": "heads", "draft_heads": "beside", "max_draft_tokens": 4}


def _prompt(length: int, seed: int, alphabet: int = 250) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(1, alphabet) for _ in range(length)]


def _request(name: str, prompt: list[int], n: int = 1, **sampling: Any) -> Request:
    params = SamplingParams(**({"ignore_eos": True, "seed": 5, "max_tokens": 25} | sampling))
    return Request(id=name, prompt_token_ids=prompt, n=n, sampling=params)


def _heads(model: Decoder, dtype: torch.dtype = torch.float32) -> DraftHeads:
    heads = DraftHeads(model.config.hidden_size, model.config.norm_eps)
    heads.init_weights(torch.Generator().manual_seed(3))
    return heads.to(dtype).eval().requires_grad_(False)


@pytest.fixture
def engines(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Engine, Engine]]:
    """Two engines alike, the second with heads, which seem to cost it nothing."""

    def make(model: Decoder, **changes: Any) -> tuple[Engine, Engine]:
        heads = _heads(model, getattr(torch, changes.get("dtype", "float32")))
        plain = make_engine(copy.deepcopy(model), speculative={"method": "none"}, **changes)
        drafting = make_engine(model, speculative=HEADS, heads=heads, **changes)
        for _ in range(3):
            drafting._pacer.model.observe(StepWork(decode_rows=1), 1.0)
        monkeypatch.setattr(drafting._pacer.model, "observe", lambda work, seconds: None)
        return plain, drafting

    return make


@pytest.fixture
def make_narrow(make_model: Make) -> Make:
    """Models of few tokens: even untrained heads are often right, and often wrong."""

    def make(alphabet: int = 6, **changes: Any) -> Decoder:
        model: Decoder = make_model(vocab_size=alphabet, eos_token_id=None, **changes)
        with torch.no_grad():
            assert model.lm_head is not None
            model.lm_head.weight.mul_(0.2)
        return model

    return make


@pytest.mark.parametrize(("num_blocks", "budget"), [(300, 60), (33, 30)])
def test_answers_are_the_same(
    make_narrow: Make, engines: Make, run: Make, num_blocks: int, budget: int
) -> None:
    """Greedy and drawn, alone and crowded out, several of a prompt, scored and penalized."""
    model = make_narrow()
    requests = [
        _request("greedy", _prompt(20, 1, 6), temperature=0, max_tokens=40),
        _request("several", _prompt(17, 2, 6), n=3, temperature=0.8, max_tokens=40),
        _request("nucleus", _prompt(9, 3, 6), temperature=1.1, top_p=0.8, top_k=5, max_tokens=60),
        _request("scored", _prompt(30, 4, 6), temperature=0.7, logprobs=2, prompt_logprobs=1),
        _request("penalized", _prompt(12, 5, 6), frequency_penalty=0.3),
        _request("short", _prompt(12, 6, 6), max_tokens=2),
    ]
    plain, drafting = engines(model, num_blocks=num_blocks, max_batched_tokens=budget)
    expected, found = run(plain, *requests), run(drafting, *requests)
    assert found.keys() == expected.keys()
    for key, answer in expected.items():
        assert found[key].token_ids == answer.token_ids, key
        assert found[key].finish_reason == answer.finish_reason
    ours, theirs = (a["scored", 0].deltas[0].prompt_logprobs for a in (found, expected))
    assert [e.logprob for e in ours] == pytest.approx([e.logprob for e in theirs], abs=1e-4)
    stats = drafting.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.step < plain.stats().step
    if num_blocks == 33:
        assert stats.preemptions > 0


def test_part_of_the_vocabulary_suffices(
    make_narrow: Make, engines: Make, run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens beyond it are never drafted, and answered all the same."""
    model = make_narrow()
    requests = [
        _request("greedy", _prompt(20, 1, 6), temperature=0, max_tokens=40),
        _request("drawn", _prompt(17, 2, 6), n=2, temperature=0.8, logprobs=1, max_tokens=40),
    ]
    plain, drafting = engines(model, num_blocks=300, max_batched_tokens=60)
    drafter: Any = drafting._executor._drafter
    drafter._heads.use_output(model.output_weight[:3])
    drafted: list[int] = []
    fill = drafter.fill

    def watch(chunks: list[Any]) -> list[Any]:
        filled: list[Any] = fill(chunks)
        drafted.extend(token for chunk in filled for token in chunk.drafted)
        return filled

    monkeypatch.setattr(drafter, "fill", watch)
    expected, found = run(plain, *requests), run(drafting, *requests)
    for key, answer in expected.items():
        assert found[key].token_ids == answer.token_ids, key
    assert set(drafted) <= {0, 1, 2}
    assert drafting.stats().accepted_tokens > 0
    assert any(max(answer.token_ids) > 2 for answer in found.values())


class Oracle(DraftHeads):
    """Knows the state that the model will have, if it is told the right one before it."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model.config.hidden_size, model.config.norm_eps)
        self.known: dict[tuple[float, ...], tuple[int, torch.Tensor]] = {}

    def learn(self, tokens: list[int], hidden: torch.Tensor) -> None:
        for place in range(len(tokens) - 1):
            self.known[self.key(hidden[place])] = (place, hidden[place + 1])

    @staticmethod
    def key(state: torch.Tensor) -> tuple[float, ...]:
        return tuple(round(value, 2) for value in state[:6].tolist())

    def forward(self, state: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.known[self.key(row)][1] for row in state])


def test_heads_see_the_last_verified_state(
    make_model: Make, make_engine: Make, run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that map each true state to the next one are always right: none is off by a place."""
    model = make_model()
    prompt = _prompt(20, 1)
    plain = make_engine(model, speculative={"method": "none"}, num_blocks=100)
    answer = run(plain, _request("r", prompt, temperature=0))["r", 0].token_ids
    text = prompt + answer
    oracle = Oracle(model)
    with torch.inference_mode():
        positions = torch.arange(len(text))[None]
        hidden = model(torch.tensor([text]), positions, CausalAttention())[0]
    oracle.learn(text, hidden)
    drafting = make_engine(
        model, speculative=HEADS, heads=oracle, num_blocks=100, max_batched_tokens=60
    )
    for _ in range(3):
        drafting._pacer.model.observe(StepWork(decode_rows=1), 1.0)
    monkeypatch.setattr(drafting._pacer.model, "observe", lambda work, seconds: None)
    assert run(drafting, _request("r", prompt, temperature=0))["r", 0].token_ids == answer
    stats = drafting.stats()
    assert stats.accepted_tokens == stats.drafted_tokens >= 15


def test_the_kernels_hand_over_the_same_states(make_model: Make, engines: Make, run: Make) -> None:
    """In bfloat16, beside a prompt whose states are read as well; each draft is verified."""
    if library.loaded() is None:
        pytest.skip("no kernels here")
    model = make_model(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16)
    model = model.bfloat16()
    plain, drafting = engines(
        model, dtype="bfloat16", block_size=16, num_blocks=60, max_batched_tokens=60
    )
    assert drafting.runner_name == "kernels"
    requests = [
        _request("greedy", _prompt(20, 1), temperature=0),
        _request("drawn", _prompt(17, 2), temperature=0.8, prompt_logprobs=1),
    ]
    expected, found = run(plain, *requests), run(drafting, *requests)
    for key, answer in expected.items():
        assert found[key].token_ids == answer.token_ids
    assert drafting.stats().drafted_tokens > 0


def test_the_distribution_is_the_models(
    make_narrow: Make, engines: Make, full_logits: Make
) -> None:
    model = make_narrow(4)
    _, drafting = engines(model, num_blocks=600, max_num_seqs=100, max_batched_tokens=500)
    check_distribution(drafting, model, full_logits)


@pytest.mark.parametrize("raises", [False, True])
def test_broken_heads_cost_no_answer(
    make_model: Make, engines: Make, run: Make, raises: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: DraftHeads, state: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        if raises:
            raise RuntimeError("unlucky")
        return torch.full_like(state, float("nan"))

    monkeypatch.setattr(DraftHeads, "forward", fail)
    plain, drafting = engines(make_model())
    request = _request("r", _prompt(20, 1), temperature=0)
    assert run(drafting, request)["r", 0].token_ids == run(plain, request)["r", 0].token_ids
    assert drafting.stats().drafted_tokens == 0


@pytest.fixture
def heads_artifact(tiny_model: Path, tmp_path: Path) -> Artifact:
    """Untrained heads for the tiny model."""
    loaded = load_model(tiny_model)
    config = DraftHeadsConfig(
        base=loaded.id, depth=2, hidden_size=loaded.config.hidden_size, norm_eps=1e-6
    )
    with create_artifact(tmp_path / "heads", kind="draft-heads") as draft:
        save_draft_heads(draft.path, _heads(loaded.model), config)
    assert draft.artifact is not None
    return draft.artifact


def _config(heads: Artifact) -> EngineConfig:
    speculative = SpeculativeConfig(method="heads", draft_heads=str(heads.path))
    return EngineConfig(
        device="cpu", dtype="float32", threads=1, max_num_seqs=2, speculative=speculative
    )


def test_they_end_with_the_weights_that_they_are_for(
    tiny_model: Path,
    heads_artifact: Artifact,
    tmp_path: Path,
    run: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a swap to others nothing is drafted; answers go on."""
    loaded = load_model(tiny_model)
    others = {name: tensor * 1.01 for name, tensor in loaded.model.state_dict().items()}
    with create_artifact(tmp_path / "others", kind="model") as draft:
        save_model(draft.path, others, loaded.config, tiny_model)
    engine = Engine.load(tiny_model, _config(heads_artifact))
    monkeypatch.setattr(
        engine._speculator,
        "_lengths",
        lambda rows, proposals, work: dict.fromkeys(proposals, 2),
    )
    request = _request("r", [1, 2, 3, 4], temperature=0, max_tokens=30)
    assert len(run(engine, request)["r", 0].token_ids) == 30
    drafted = engine.stats().drafted_tokens
    assert drafted > 0
    engine.swap(tmp_path / "others")
    while engine._exchange.under_way:
        engine.step()
    assert len(run(engine, request)["r", 0].token_ids) == 30
    assert engine.stats().drafted_tokens == drafted


def test_heads_of_other_weights_are_refused(
    tiny_model: Path, heads_artifact: Artifact, tmp_path: Path
) -> None:
    config = heads_artifact.path / "draft_heads.json"
    wrong = DraftHeadsConfig.model_validate_json(config.read_text()).replace(base="f" * 64)
    loaded = load_model(tiny_model)
    with create_artifact(tmp_path / "others", kind="draft-heads") as draft:
        save_draft_heads(draft.path, _heads(loaded.model), wrong)
    assert draft.artifact is not None
    with pytest.raises(ModelError, match="for the weights ffffffffffff, not for"):
        Engine.load(tiny_model, _config(draft.artifact))


def test_heads_count_in_memory(tiny_model: Path, heads_artifact: Artifact) -> None:
    config = _config(heads_artifact)
    alone = config.replace(speculative=SpeculativeConfig())
    plans = [
        plan_memory(tiny_model, each, available=1 << 33, report=lambda line: None)
        for each in (alone, config)
    ]
    elements = count_parameters(load_model(tiny_model).config)
    assert plans[1].weight_bytes - plans[0].weight_bytes == 4 * elements
    assert plans[1].kv_bytes_per_token == plans[0].kv_bytes_per_token


@pytest.mark.parametrize(
    "changes", [{"method": "heads"}, {"draft_heads": "x"}, {"draft_vocabulary": 9}]
)
def test_method_and_heads_belong_together(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="only there"):
        SpeculativeConfig.model_validate(changes)
