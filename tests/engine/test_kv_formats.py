"""A KV cache of another format than the activations: near, exact in bytes, and itself alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from minigpt.api.requests import Request, SamplingParams
from minigpt.core.errors import ConfigError
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.engine.native import NativeRunner
from minigpt.engine.preflight import plan_memory
from minigpt.engine.resolve import kv_bytes_per_token
from minigpt.kernels import library
from minigpt.kernels.cache_format import CacheFormat
from minigpt.kernels.kv_layout import KVLayout
from minigpt.model.decoder import Decoder
from minigpt.model.weights import LoadedModel

if TYPE_CHECKING:
    from tests.engine.conftest import MakeEngine, MakeModel, Run

FORMATS: list[CacheFormat] = ["float32", "bfloat16", "int8"]
TEXT = list(b"The old river followed a quiet town, and the old river followed a road. ")
needs_kernels = pytest.mark.skipif(library.loaded() is None, reason="no kernels here")


@pytest.fixture
def model(make_model: MakeModel) -> Decoder:
    return make_model(head_dim=16, context_length=256).bfloat16()


@pytest.fixture
def serve(make_engine: MakeEngine, model: Decoder) -> Any:
    """Make engines of the same weights; each takes its own copy."""

    def make(kv_cache_dtype: str, **changes: Any) -> Engine:
        settings: dict[str, Any] = {"dtype": "bfloat16", "block_size": 16, "num_blocks": 64}
        settings |= {"max_batched_tokens": 48, "kv_cache_dtype": kv_cache_dtype}
        draft = changes.pop("draft", None)
        return make_engine(copy.deepcopy(model), **(settings | changes), draft=copy.deepcopy(draft))

    return make


def ask(name: str, prompt: list[int], **sampling: Any) -> Request:
    given: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    n = sampling.pop("n", 1)
    params = SamplingParams(**(given | sampling))
    return Request(id=name, prompt_token_ids=prompt, n=n, sampling=params)


@needs_kernels
def test_answers_are_near_those_of_bfloat16(serve: Any, run: Run) -> None:
    """Float32 keeps the rounded keys and values as they are, int8 rounds them a little more."""

    def logprobs(kv_cache_dtype: str) -> torch.Tensor:
        engine = serve(kv_cache_dtype)
        assert engine.runner_name == "kernels"
        score = ask("score", TEXT * 3, max_tokens=0, prompt_logprobs=0)
        (answer,) = run(engine, score).values()
        scores = [s for delta in answer.deltas for s in delta.prompt_logprobs or () if s]
        assert len(scores) == 3 * len(TEXT) - 1
        return torch.tensor([score.logprob for score in scores])

    exact, rounded, eight = (logprobs(name) for name in FORMATS)
    of_bfloat16, of_int8 = ((other - exact).abs() for other in (rounded, eight))
    assert of_bfloat16.max() < 0.1
    assert 1e-4 < of_int8.max() < 0.25
    assert of_int8.mean() < 0.05


@needs_kernels
@pytest.mark.parametrize("kv_cache_dtype", ["float32", "int8"])
@pytest.mark.parametrize("method", ["none", "ngram"])
def test_an_answer_is_the_same_shared_copied_and_preempted(
    serve: Any, run: Run, kv_cache_dtype: str, method: str
) -> None:
    prompts = [TEXT * 2, TEXT * 2 + [65], [*TEXT, 66], list(range(40, 75))]
    speculative = {"method": method}

    def alone(prompt: list[int], **sampling: Any) -> list[list[int]]:
        engine = serve(kv_cache_dtype, prefix_cache=False, speculative={"method": "none"})
        answers = run(engine, ask("alone", prompt, **sampling))
        return [answers["alone", index].token_ids for index in range(len(answers))]

    expected = [alone(prompt) for prompt in prompts]
    several = {"n": 3, "temperature": 1.0, "seed": 5}
    drawn = alone(prompts[0], **several)
    assert len({tuple(tokens) for tokens in drawn}) > 1

    roomy = serve(kv_cache_dtype, speculative=speculative)
    for _ in range(2):  # the second time out of the prefix cache
        requests = [ask(str(number), prompt) for number, prompt in enumerate(prompts)]
        answers = run(roomy, *requests, ask("drawn", prompts[0], **several))
        found = [[answers[str(number), 0].token_ids] for number in range(len(prompts))]
        assert found == expected
        assert [answers["drawn", index].token_ids for index in range(3)] == drawn
    stats = roomy.stats()
    assert stats.prefix_cache_hits > 0 and stats.preemptions == 0

    tight = serve(kv_cache_dtype, num_blocks=20, speculative=speculative)
    longer = [ask(str(number), prompt, max_tokens=60) for number, prompt in enumerate(prompts)]
    answers = run(tight, *longer)
    assert tight.stats().preemptions > 0
    for number, prompt in enumerate(prompts):
        assert [answers[str(number), 0].token_ids] == alone(prompt, max_tokens=60)


@needs_kernels
@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
def test_bytes_are_those_that_are_allocated(
    serve: Any, make_model: MakeModel, model: Decoder, kv_cache_dtype: CacheFormat
) -> None:
    draft = make_model(seed=1, head_dim=32, num_layers=1, context_length=256).bfloat16()
    speculative = {"method": "draft", "draft_model": "x"}
    engine = serve(kv_cache_dtype, num_blocks=16, draft=draft, speculative=speculative)
    runners = engine._executor._runners
    assert all(isinstance(runner, NativeRunner) for runner in runners)
    caches = [cache for runner in runners for cache in runner._caches]
    assert sum(cache.nbytes for cache in caches) == engine.config.kv_cache_bytes
    layouts = [KVLayout(kv_cache_dtype, 16, 2, 16), KVLayout(kv_cache_dtype, 16, 2, 32)]
    per_token = 2 * layouts[0].token_bytes + layouts[1].token_bytes
    assert kv_bytes_per_token(engine.config, model.config, draft.config) == per_token
    width = {"float32": 4, "bfloat16": 2, "int8": 1}[kv_cache_dtype]
    scales = 2 * 4 * (2 * 2 + 2) if kv_cache_dtype == "int8" else 0
    assert per_token == 2 * width * (2 * 2 * 16 + 2 * 32) + scales


@needs_kernels
def test_a_draft_model_drafts_from_an_int8_cache(serve: Any, model: Decoder, run: Run) -> None:
    """The model drafting for itself is nearly always right, and answers stay what they are."""
    speculative = {"method": "draft", "draft_model": "x"}
    drafting = serve("int8", draft=model, speculative=speculative)
    request = ask("a", TEXT, max_tokens=40)
    answer = run(drafting, request)["a", 0].token_ids
    assert answer == run(serve("int8", speculative={"method": "none"}), request)["a", 0].token_ids
    stats = drafting.stats()
    assert stats.accepted_tokens > 0.9 * stats.drafted_tokens > 0


@needs_kernels
def test_copied_blocks_take_their_scales_along_and_cleared_ones_hold_nothing(
    model: Decoder,
) -> None:
    runner = NativeRunner(
        model, num_blocks=4, block_size=16, dtype=torch.bfloat16, cache_format="int8"
    )
    layout = KVLayout("int8", 16, 2, 16)
    made = torch.randn(16, 2, 16, generator=torch.Generator().manual_seed(0))
    for cache in runner._caches:
        layout.write(cache, torch.arange(16), made, -made)
        cache[2] = 255  # scales that are NaN
    runner.copy_blocks([(0, 1)])
    runner.clear([2])
    for cache in runner._caches:
        keys, values = layout.read(cache, torch.tensor([1]))
        assert torch.allclose(keys, made, atol=0.02) and torch.equal(keys, -values)
        assert not cache[2].any()


def test_other_formats_are_refused_where_torch_serves(
    make_engine: MakeEngine, make_model: MakeModel, tiny_model: Path
) -> None:
    message = (
        "kv_cache_dtype = int8 beside dtype = float32 .*torch serves here: .*to auto, which is"
    )
    with pytest.raises(ConfigError, match=message):
        make_engine(make_model(), kv_cache_dtype="int8")
    config = EngineConfig(device="cpu", dtype="bfloat16", kv_cache_dtype="int8", threads=1)
    for changes, reason in (({"dtype": "float32"}, "dtype = float32"), ({"adapters": True}, "ada")):
        with pytest.raises(ConfigError, match=f"torch serves here: .*{reason}"):
            plan_memory(
                tiny_model, config.replace(**changes), available=1 << 30, report=lambda line: None
            )
        with pytest.raises(ConfigError, match=f"torch serves here: .*{reason}"):
            Engine.load(tiny_model, config.replace(**changes))
    plan = plan_memory(tiny_model, config, available=1 << 30, report=lambda line: None)
    assert (plan.kv_cache_dtype, plan.kv_bytes_per_token) == ("int8", 2 * 2 * 2 * (16 + 4))


@needs_kernels
def test_a_draft_model_that_torch_would_run_is_named(
    make_engine: MakeEngine, make_model: MakeModel, model: Decoder
) -> None:
    with pytest.raises(ConfigError, match=r"heads of 8, .* \(the draft model\)"):
        make_engine(
            model, draft=make_model(context_length=256).bfloat16(), dtype="bfloat16",
            block_size=16, kv_cache_dtype="int8",
            speculative={"method": "draft", "draft_model": "x"},
        )  # fmt: skip


@needs_kernels
def test_other_weights_are_swapped_into_the_same_cache(serve: Any, model: Decoder) -> None:
    engine = serve("int8")
    runner = engine._weights.runner
    swapped = runner.with_model(LoadedModel(copy.deepcopy(model), model.config, Path(), ""))
    assert swapped._step._plan.layout.format == "int8"
    assert swapped._caches is runner._caches


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype"):
        EngineConfig.model_validate({"kv_cache_dtype": "fp8"})
