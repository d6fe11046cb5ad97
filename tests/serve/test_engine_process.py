"""The engine process's loop around a real engine, driven over real sockets in a thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zmq
from tests.engine.swapping import make_adapter

from minigpt.api.requests import Abort, Delta, EngineStats, Request, SamplingParams
from minigpt.engine.config import EngineConfig
from minigpt.engine.engine import Engine
from minigpt.serve.engine_process import run_loop
from minigpt.serve.wire import (
    ControlDone,
    FromEngine,
    LoadAdapter,
    Stop,
    SwapWeights,
    ToEngine,
    UnloadAdapter,
    decode_from_engine,
    encode_to_engine,
)


@dataclass
class Loop:
    """A running loop and the far ends of its sockets."""

    thread: threading.Thread
    requests: zmq.Socket[bytes]
    outputs: zmq.Socket[bytes]

    def send(self, message: ToEngine) -> None:
        self.requests.send(encode_to_engine(message))

    def receive(self) -> list[FromEngine]:
        assert self.outputs.poll(10_000), "the loop says nothing"
        return decode_from_engine(self.outputs.recv())

    def until_idle(self, ends: int = 0) -> tuple[list[Delta], EngineStats]:
        """Collect deltas until nothing runs or waits and `ends` sequences have ended.

        Without `ends` the loop may be idle because a request has not reached it yet.
        """
        deltas: list[Delta] = []
        while True:
            *rest, stats = self.receive()
            assert isinstance(stats, EngineStats), "stats end every message"
            deltas += [message for message in rest if isinstance(message, Delta)]
            ended = sum(delta.finish_reason is not None for delta in deltas)
            if ended >= ends and not (stats.running or stats.waiting):
                return deltas, stats


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine.load(tiny_model, EngineConfig(dtype="float32", threads=1, max_num_seqs=4))


@pytest.fixture
def loop(engine: Engine) -> Iterator[Loop]:
    context = zmq.Context()
    sockets = [context.socket(kind) for kind in (zmq.PUSH, zmq.PULL, zmq.PULL, zmq.PUSH)]
    requests, inbox, outputs, outbox = sockets
    requests.bind("inproc://requests")
    inbox.connect("inproc://requests")
    outputs.bind("inproc://outputs")
    outbox.connect("inproc://outputs")
    thread = threading.Thread(
        target=run_loop, args=(engine, inbox, outbox), kwargs={"parent_pid": os.getppid()}
    )
    thread.start()
    yield Loop(thread, requests, outputs)
    requests.send(encode_to_engine(Stop()))
    thread.join(timeout=10)
    assert not thread.is_alive()
    for socket in sockets:
        socket.close(linger=0)
    context.term()


def request(name: str, n: int = 1, **sampling: Any) -> Request:
    params = SamplingParams(**({"max_tokens": 5, "ignore_eos": True} | sampling))
    return Request(id=name, prompt_token_ids=[104, 105], sampling=params, n=n)


def test_answers_every_request(loop: Loop) -> None:
    for name in "abc":
        loop.send(request(name, n=2))
    deltas, stats = loop.until_idle(ends=6)
    ends = sorted((d.request_id, d.index, d.finish_reason) for d in deltas if d.finish_reason)
    assert ends == [(name, index, "length") for name in "abc" for index in (0, 1)]
    assert sum(len(delta.token_ids) for delta in deltas) == 30
    assert stats.kv_blocks_used == 0


def test_abort_frees_the_blocks_with_the_next_message(loop: Loop) -> None:
    loop.send(request("a", max_tokens=500))
    first = loop.receive()[-1]
    assert isinstance(first, EngineStats)
    loop.send(Abort(id="a"))
    _, stats = loop.until_idle()
    assert stats.kv_blocks_used == 0
    assert stats.generation_tokens - first.generation_tokens < 400, "it went on to the end"


def test_a_request_that_can_not_be_served_is_refused_and_the_loop_goes_on(loop: Loop) -> None:
    loop.send(request("good"))
    loop.send(request("bad", n=2, max_tokens=10_000))
    deltas, _ = loop.until_idle(ends=3)
    bad = [delta for delta in deltas if delta.request_id == "bad"]
    assert [(d.index, d.finish_reason) for d in bad] == [(0, "error"), (1, "error")]
    assert "max_tokens = 10000" in bad[0].error
    assert bad[0].error_status == 400
    assert [d.finish_reason for d in deltas if d.request_id == "good"][-1] == "length"


def test_controls_are_carried_on_beside_requests(
    loop: Loop, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", 0)
    loop.send(request("a", max_tokens=30))
    loop.send(SwapWeights(id="lost", path=str(tmp_path / "nowhere")))
    loop.send(SwapWeights(id="second", path=str(tiny_model)))
    loop.send(LoadAdapter(id="load", name="x", path=str(adapter)))
    loop.send(UnloadAdapter(id="unload", name="x"))
    loop.send(UnloadAdapter(id="unknown", name="x"))
    done: dict[str, ControlDone] = {}
    while len(done) < 5:
        done |= {m.id: m for m in loop.receive() if isinstance(m, ControlDone)}
    assert "no model at" in done["lost"].error and done["lost"].status == 400
    assert "another swap is under way" in done["second"].error
    loaded, dropped = done["load"].ready, done["unload"].ready
    assert loaded is not None and list(loaded.adapters) == ["x"]
    assert dropped is not None and dropped.adapters == {}
    assert (done["unknown"].status, done["unknown"].code) == (404, "model_not_found")
    loop.send(SwapWeights(id="same", path=str(tiny_model)))  # with nothing else to do
    while not (ended := [m for m in loop.receive() if isinstance(m, ControlDone)]):
        pass
    assert ended[0].ready is not None and ended[0].ready.model_id == loaded.model_id


def test_an_unknown_abort_is_no_error(loop: Loop) -> None:
    loop.send(Abort(id="never there"))
    assert isinstance(loop.receive()[-1], EngineStats)
    loop.send(request("a"))
    deltas, _ = loop.until_idle()
    assert deltas[-1].finish_reason == "length"


def test_an_orphan_ends_by_itself(engine: Engine) -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox:
        inbox.bind("inproc://nobody")
        with context.socket(zmq.PUSH) as outbox:
            run_loop(engine, inbox, outbox, parent_pid=-1)
