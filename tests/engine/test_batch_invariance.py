"""An answer's last bits follow from weights and request, whatever was computed beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.conftest import Answer, ByteVocabulary, Run
from tests.engine.test_native import FAMILIES
from tests.engine.test_native import make_model as make_family

from minigpt.api.requests import Request, SamplingParams
from minigpt.core.errors import ConfigError
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.kernels import library
from minigpt.model.decoder import Decoder

pytestmark = pytest.mark.skipif(library.loaded() is None, reason="no kernels here")

STYLES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.0, "seed": 4, "top_p": 0.8, "top_k": 40},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0.7, "seed": 5, "min_p": 0.05, "presence_penalty": 0.4},
]

loads = st.lists(
    st.tuples(st.integers(1, 90), st.sampled_from(STYLES), st.integers(1, 2), st.integers(0, 6)),
    min_size=2,
    max_size=6,
)
"""Prompt length, style, answers and step of arrival of each request."""


def _model(family: str, quantized: bool) -> Decoder:
    model = make_family(FAMILIES[family].replace(vocab_size=259), quantized=quantized)
    assert model.config.eos_token_id is None
    return model


def _engine(family: str, quantized: bool = False, **changes: Any) -> Engine:
    config = {
        "device": "cpu", "dtype": "bfloat16", "threads": 1, "context_length": 128,
        "max_num_seqs": 8, "max_batched_tokens": 64, "kv_cache_bytes": 1 << 22,
    }  # fmt: skip
    engine = Engine(
        _model(family, quantized), ByteVocabulary(), EngineConfig.model_validate(config | changes)
    )
    assert engine.runner_name == "kernels"
    return engine


def _requests(load: list[tuple[int, dict[str, Any], int, int]]) -> list[Request]:
    made = []
    for number, (length, style, n, _) in enumerate(load):
        # Half of the prompts begin alike, and repeat themselves: cache hits, drafts.
        step = 1 if number % 2 else 7
        prompt = [(step * (i % 11) + 13 * (number // 2 if i > 40 else 0)) % 256
                  for i in range(length)]  # fmt: skip
        sampling = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3, **style)
        made.append(Request(id=str(number), prompt_token_ids=prompt, sampling=sampling, n=n))
    return made


def _run(engine: Engine, arrivals: list[tuple[int, Request]]) -> dict[tuple[str, int], Answer]:
    answers: dict[tuple[str, int], Answer] = {}
    waiting, step = sorted(arrivals, key=lambda pair: pair[0]), 0
    while waiting or engine.has_work:
        while waiting and waiting[0][0] <= step:
            engine.add(waiting.pop(0)[1])
        for delta in engine.step():
            answers.setdefault((delta.request_id, delta.index), Answer()).deltas.append(delta)
        step += 1
    return answers


def _bits(answer: Answer) -> list[Any]:
    assert answer.finish_reason == "length"
    return [answer.token_ids, *(token for delta in answer.deltas for token in delta.logprobs or ())]


@settings(max_examples=25, deadline=None)
@given(
    load=loads,
    family=st.sampled_from(sorted(FAMILIES)),
    quantized=st.booleans(),
    budget=st.integers(8, 96),
    contexts=st.integers(1, 4),
    method=st.sampled_from(["none", "ngram"]),
    prefix_cache=st.booleans(),
)
def test_shared_with_others_or_alone(
    load: list[tuple[int, dict[str, Any], int, int]],
    family: str,
    quantized: bool,
    budget: int,
    contexts: int,
    method: str,
    prefix_cache: bool,
) -> None:
    alone = _engine(family, quantized, prefix_cache=False, speculative={"method": "none"})
    per_token = alone.config.kv_cache_bytes
    assert per_token != "auto"
    blocks = alone.stats().kv_blocks_total
    size = per_token // blocks * 8 * contexts  # of 128 tokens in blocks of 16: preemption too
    shared = _engine(
        family, quantized, max_batched_tokens=budget, kv_cache_bytes=size,
        prefix_cache=prefix_cache, speculative={"method": method},
    )  # fmt: skip
    requests = _requests(load)
    arrivals = [(entry[3], request) for entry, request in zip(load, requests, strict=True)]
    together = _run(shared, arrivals)
    for request in requests:
        for key, answer in _run(alone, [(0, request)]).items():
            assert _bits(together[key]) == _bits(answer)


def test_torch_is_refused(tiny_model: Path) -> None:
    config = EngineConfig(device="cpu", dtype="float32", batch_invariant=True)
    with pytest.raises(ConfigError, match=r"batch_invariant = true .*float32 is torch's"):
        Engine.load(tiny_model, config)


def test_the_kernels_are_taken(tiny_model: Path) -> None:
    config = EngineConfig(device="cpu", dtype="bfloat16", threads=1, batch_invariant=True)
    engine = Engine.load(tiny_model, config)
    assert engine.runner_name == "kernels"


def test_threads_change_nothing(run: Run) -> None:
    request = Request(
        id="a",
        prompt_token_ids=list(range(70)),
        sampling=SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=3),
    )
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(_bits(run(_engine("llama"), request)["a", 0]))
    torch.set_num_threads(1)
    assert found[0] == found[1]
