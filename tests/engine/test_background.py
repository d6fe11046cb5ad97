from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from minigpt.api.requests import Delta, Request, SamplingParams
from minigpt.core.errors import MinigptError, RequestError
from minigpt.engine.background import EngineThread

Make = Callable[..., Any]
Arrived = queue.SimpleQueue[Delta | MinigptError]


def _request(name: str, max_tokens: int = 5, n: int = 1) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1)
    return Request(id=name, prompt_token_ids=[1, 2], n=n, sampling=params)


def _until_finished(arrived: Arrived, n: int) -> list[Delta]:
    deltas: list[Delta] = []
    while n:
        item = arrived.get(timeout=30)
        assert isinstance(item, Delta), item
        deltas.append(item)
        n -= item.finish_reason is not None
    return deltas


def test_each_caller_gets_its_own_from_the_engines_thread(
    make_model: Make, make_engine: Make
) -> None:
    thread = EngineThread(make_engine(make_model()))
    callers = set()
    arrived: dict[str, Arrived] = {name: queue.SimpleQueue() for name in "ab"}

    def sink(item: Delta | MinigptError) -> None:
        assert isinstance(item, Delta)
        callers.add(threading.current_thread().name)
        arrived[item.request_id].put(item)

    for name, n in (("a", 1), ("b", 3)):
        thread.submit(_request(name, n=n), sink)
    for name, n in (("a", 1), ("b", 3)):
        deltas = _until_finished(arrived[name], n)
        assert sum(len(delta.token_ids) for delta in deltas) == 5 * n
        assert arrived[name].empty()
    assert callers == {"engine"}
    thread.close()


def test_a_refusal_reaches_its_caller_alone(make_model: Make, make_engine: Make) -> None:
    thread = EngineThread(make_engine(make_model()))
    good: Arrived = queue.SimpleQueue()
    bad: Arrived = queue.SimpleQueue()
    thread.submit(_request("good"), good.put)
    thread.submit(_request("bad", max_tokens=9999), bad.put)
    assert isinstance(bad.get(timeout=30), RequestError)
    _until_finished(good, 1)
    thread.close()
    assert bad.empty()


def test_what_was_aborted_is_not_heard_of_again(make_model: Make, make_engine: Make) -> None:
    engine = make_engine(make_model())
    thread = EngineThread(engine)
    dropped: Arrived = queue.SimpleQueue()
    kept: Arrived = queue.SimpleQueue()
    thread.submit(_request("dropped", max_tokens=120, n=2), dropped.put)
    dropped.get(timeout=30)
    thread.abort("dropped")
    thread.abort("unknown")
    thread.submit(_request("kept"), kept.put)  # after the abort, in the same order
    _until_finished(kept, 1)
    while not dropped.empty():
        item = dropped.get()
        assert isinstance(item, Delta)
        assert item.finish_reason is None
    thread.close()
    assert engine.stats().kv_blocks_used == 0


def test_nobody_waits_for_a_thread_that_has_ended(
    make_model: Make, make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = EngineThread(make_engine(make_model()))
    arrived: Arrived = queue.SimpleQueue()
    closed.submit(_request("r", max_tokens=120, n=8), arrived.put)
    closed.close()
    closed.close()
    items = [arrived.get(timeout=30)]
    while not arrived.empty():
        items.append(arrived.get())
    assert isinstance(items[-1], RequestError)
    with pytest.raises(RequestError, match="closed"):
        closed.submit(_request("late"), arrived.put)

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine = make_engine(make_model())
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    failing = EngineThread(engine)
    failing.submit(_request("r"), arrived.put)
    failed = arrived.get(timeout=30)
    assert isinstance(failed, RequestError)
    assert "ZeroDivisionError" in str(failed)
    failing.close()
