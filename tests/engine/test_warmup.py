"""What an engine knows before its first request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.engine.conftest import MakeEngine, MakeModel

from minigpt.api.requests import Request, SamplingParams
from minigpt.engine.cost_model import StepWork
from minigpt.kernels import library


def test_answers_do_not_depend_on_it(
    make_engine: MakeEngine, make_model: MakeModel, run: Callable[..., Any]
) -> None:
    answers = []
    for warm in (False, True):
        engine = make_engine(make_model())
        if warm:
            engine.warm_up()
        sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        request = Request(id="a", prompt_token_ids=[1, 2, 3], sampling=sampling)
        answers.append(run(engine, request)["a", 0].token_ids)
        assert engine.stats().generation_tokens == 8
        assert engine.stats().prompt_tokens == 3
        assert engine.stats().kv_blocks_used == 0
    assert answers[0] == answers[1]


def test_steps_are_predicted_before_the_first_request(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    engine = make_engine(make_model())
    assert engine.stats().largest_step_seconds == 0
    engine.warm_up()
    assert engine.stats().largest_step_seconds > 0
    assert 0 < engine._pacer.model.predict(StepWork(0, 0, 1, 65)) < 1


def test_utilization_is_measured(
    make_engine: MakeEngine, make_model: MakeModel, run: Callable[..., Any]
) -> None:
    engine = make_engine(make_model())
    engine.warm_up()
    assert engine.stats().utilization == []
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    run(engine, Request(id="a", prompt_token_ids=[1, 2, 3], sampling=sampling))
    shown = engine.stats().utilization
    if library.loaded() is None:
        assert shown == []
        return
    assert [each.phase for each in shown] == ["prefill", "decode"]
    assert all(0 < each.memory_bandwidth < 1 and 0 < each.arithmetic < 1 for each in shown)
