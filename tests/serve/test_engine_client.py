from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest

from minigpt.api.requests import Abort, Delta, Ready, Request
from minigpt.core.clock import ManualClock
from minigpt.core.errors import RequestError
from minigpt.serve.engine_client import EngineClient, Generation, Update
from minigpt.serve.health import ProgressMonitor
from minigpt.serve.metrics import ServeMetrics
from minigpt.serve.wire import ToEngine

READY = Ready(
    model_id="m", vocab_size=8, context_length=64, kv_blocks_total=4, block_size=16,
    eos_token_id=0, load_seconds=0.1,
)  # fmt: skip


def on_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    @wraps(test)
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 10))

    return run


class Engine:
    """A client with a connection that keeps what is sent."""

    def __init__(self) -> None:
        clock = ManualClock()
        self.monitor = ProgressMonitor(clock, factor=10, floor_seconds=1, first_step_seconds=1)
        self.metrics = ServeMetrics("m")
        self.client = EngineClient(self.metrics, self.monitor, clock)
        self.sent: list[ToEngine] = []
        self.client.connect(self.sent.append, READY)

    def finished(self, reason: str) -> float:
        labels = {"model_name": "m", "engine": "0", "finished_reason": reason}
        value = self.metrics.registry.get_sample_value("vllm:request_success_total", labels)
        return value or 0.0


def request(name: str, n: int = 1) -> Request:
    return Request(id=name, prompt_token_ids=[1, 2, 3], n=n)


def delta(name: str, text: str, index: int = 0, **more: Any) -> Delta:
    return Delta(request_id=name, index=index, token_ids=[1], text=text, **more)


async def texts(generation: Generation) -> dict[int, str]:
    collected: dict[int, str] = {}
    async for updates in generation:
        for choice, update in updates:
            collected[choice] = collected.get(choice, "") + update.text
    return collected


@on_loop
async def test_choices_are_numbered_across_requests() -> None:
    engine = Engine()
    generation = engine.client.submit([request("a", n=2), request("b", n=2)])
    assert [getattr(m, "id", None) for m in engine.sent] == ["a", "b"]
    assert generation.prompt_tokens == 6
    for name in ("b", "a"):
        for index in (1, 0):
            text = f"{name}{index}"
            engine.client.deliver([delta(name, text, index, finish_reason="stop")])
    assert await texts(generation) == {0: "a0", 1: "a1", 2: "b0", 3: "b1"}
    assert engine.client.in_flight == 0
    assert engine.finished("stop") == 4


@on_loop
async def test_a_slow_reader_gets_fewer_and_longer_updates() -> None:
    engine = Engine()
    generation = engine.client.submit([request("a")])
    for text in "xyz":
        engine.client.deliver([delta("a", text)])
    (update,) = await anext(generation)
    assert update[1].text == "xyz"
    assert update[1].token_ids == [1, 1, 1]
    engine.client.deliver([delta("a", "!", finish_reason="length")])
    (update,) = await anext(generation)
    assert (update[1].text, update[1].finish_reason) == ("!", "length")
    with pytest.raises(StopAsyncIteration):
        await anext(generation)


@on_loop
async def test_a_waiting_reader_is_woken() -> None:
    engine = Engine()
    generation = engine.client.submit([request("a")])
    reading = asyncio.ensure_future(anext(generation))
    await asyncio.sleep(0)
    assert not reading.done()
    engine.client.deliver([delta("a", "x")])
    updates: list[Update] = await reading
    assert updates[0][1].text == "x"


@on_loop
async def test_cancel_aborts_what_is_unfinished_and_ends_the_iterator() -> None:
    engine = Engine()
    generation = engine.client.submit([request("a"), request("b", n=3)])
    engine.client.deliver([delta("a", "x", finish_reason="stop")])
    reading = asyncio.ensure_future(texts(generation))
    await asyncio.sleep(0)
    generation.cancel()
    generation.cancel()
    await reading
    assert engine.sent[2:] == [Abort(id="b")]
    assert (engine.finished("stop"), engine.finished("abort")) == (1, 3)
    assert engine.client.in_flight == 0
    # What the engine had already computed comes late, and is dropped.
    engine.client.deliver([delta("b", "late", finish_reason="abort")])
    assert engine.finished("abort") == 3


@on_loop
async def test_a_finished_generation_has_nothing_to_cancel() -> None:
    engine = Engine()
    generation = engine.client.submit([request("a")])
    engine.client.deliver([delta("a", "x", finish_reason="stop")])
    await texts(generation)
    generation.cancel()
    assert len(engine.sent) == 1


@on_loop
async def test_a_dead_engine_ends_everything_after_what_has_come() -> None:
    engine = Engine()
    generations = [engine.client.submit([request(name)]) for name in "ab"]
    engine.client.deliver([delta("a", "half")])
    engine.client.disconnect(RequestError("it died", status=503))
    assert (await anext(generations[0]))[0][1].text == "half"
    for generation in generations:
        with pytest.raises(RequestError, match="it died"):
            await anext(generation)
        generation.cancel()
    assert engine.finished("error") == 2
    assert len(engine.sent) == 2, "nothing is sent to a dead engine"
    with pytest.raises(RequestError) as refused:
        engine.client.submit([request("c")])
    assert refused.value.status == 503


@on_loop
async def test_one_failed_sequence_fails_the_call_and_aborts_the_rest() -> None:
    engine = Engine()
    generation = engine.client.submit([request("a"), request("b", n=2)])
    bad = Delta(request_id="a", index=0, token_ids=[], text="", finish_reason="error", error="NaN")
    engine.client.deliver([bad])
    with pytest.raises(RequestError, match="NaN") as failed:
        await texts(generation)
    assert failed.value.status == 500
    assert engine.sent[2:] == [Abort(id="b")]
    assert (engine.finished("error"), engine.finished("abort")) == (1, 2)


@on_loop
async def test_the_monitor_knows_when_there_is_work() -> None:
    engine = Engine()
    generation = engine.client.submit([request("a")])
    assert engine.monitor.allowed_seconds() == 1
    generation.cancel()
    assert engine.monitor.overdue_seconds() == 0
