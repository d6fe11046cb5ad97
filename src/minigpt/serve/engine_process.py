"""The engine process: owns the model, one loop, no threads of its own.

Started by the supervisor as `python -m minigpt.serve.engine_process SPEC`, SPEC being an
`EngineSpec` in JSON. It ends when it is told to, when its parent dies, or with a failure of
the engine: then it is the supervisor's to start a new one.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Protocol

import msgspec
import zmq

from minigpt.api.requests import Abort, Delta, EngineStats, Request
from minigpt.core.config import from_mapping
from minigpt.core.errors import MinigptError, RequestError
from minigpt.core.processes import die_with_parent
from minigpt.core.telemetry import configure_logging, get_logger
from minigpt.engine.config import EngineConfig
from minigpt.serve.collector import spare_what_is_loaded
from minigpt.serve.engine_control import ControlledEngine, Controls, load_adapters
from minigpt.serve.wire import (
    EngineSpec,
    FromEngine,
    StartFailure,
    Stop,
    decode_to_engine,
    encode_from_engine,
    unbounded,
)

_IDLE_POLL_MS = 500


class StepEngine(ControlledEngine, Protocol):
    """What the loop needs of an engine; `minigpt.engine.engine.Engine` is one."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        ...

    def add(self, request: Request) -> None:
        """Take a request in. Raises MinigptError where it can never be served."""
        ...

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks; unknown ids are no error."""
        ...

    def step(self) -> list[Delta]:
        """Run the model once and return what each sequence gained."""
        ...

    def stats(self) -> EngineStats:
        """Return counters and gauges as of now."""
        ...


def main() -> int:
    """Run an engine process and return its exit code."""
    spec = msgspec.json.decode(sys.argv[1], type=EngineSpec)
    die_with_parent(spec.parent_pid)
    # Ctrl-C reaches the whole process group: the API process drains first and then says Stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging(json=True, level=spec.log_level)
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for socket, address in ((inbox, spec.requests_address), (outbox, spec.outputs_address)):
        unbounded(socket, linger_ms=1000)
        socket.connect(address)
    try:
        return _load_and_run(spec, inbox, outbox)
    finally:
        inbox.close()
        outbox.close()
        context.term()


def _load_and_run(spec: EngineSpec, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> int:
    try:
        from minigpt.engine.engine import Engine

        config = from_mapping(EngineConfig, msgspec.json.decode(spec.config))
        engine = Engine.load(spec.model_path, config)
    except MinigptError as error:
        failure = StartFailure(message=str(error), exit_code=error.exit_code)
        outbox.send(encode_from_engine([failure]))
        return error.exit_code
    load_adapters(engine, spec.adapters)
    spare_what_is_loaded()
    outbox.send(encode_from_engine([engine.ready(), engine.stats()]))
    run_loop(engine, inbox, outbox, parent_pid=spec.parent_pid)
    engine.close()
    return 0


def run_loop(
    engine: StepEngine,
    inbox: zmq.Socket[bytes],
    outbox: zmq.Socket[bytes],
    *,
    parent_pid: int,
) -> None:
    """Take requests in between steps until told to stop or orphaned.

    Every message out ends with the engine's stats, so that the API process sees freed blocks
    and finished steps at once.
    """
    controls = Controls(engine)
    while os.getppid() == parent_pid:
        changed = bool(inbox.poll(0 if engine.has_work else _IDLE_POLL_MS))
        output: list[FromEngine] = []
        while inbox.poll(0):
            message = decode_to_engine(inbox.recv())
            if isinstance(message, Stop):
                return
            if isinstance(message, Abort):
                engine.abort(message.id)
            elif isinstance(message, Request):
                output += _add(engine, message)
            else:
                controls.begin(message)
        if engine.has_work:
            output += engine.step()
            changed = True
        output += controls.finished()
        if changed:
            output.append(engine.stats())
            outbox.send(encode_from_engine(output))


def _add(engine: StepEngine, request: Request) -> list[Delta]:
    try:
        engine.add(request)
    except MinigptError as error:
        get_logger("engine").warning("request refused", engine_request_id=request.id)
        return [
            Delta(
                request_id=request.id,
                index=index,
                token_ids=[],
                text="",
                finish_reason="error",
                error=str(error),
                error_status=error.status if isinstance(error, RequestError) else 500,
            )
            for index in range(request.n)
        ]
    return []


if __name__ == "__main__":
    sys.exit(main())
