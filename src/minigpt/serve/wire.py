"""What the API process and the engine process say to each other, and how it is encoded.

Two one-way ZeroMQ sockets join them (PUSH to PULL), named anew for each engine process, so
that nothing from a dead engine reaches its successor. A message to the engine is one struct;
a message from it is a list: all that one step brought.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from minigpt.api.requests import Abort, Delta, EngineStats, Ready, Request


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End the engine process, whatever it is doing."""


class StartFailure(msgspec.Struct, frozen=True, kw_only=True, tag="start_failure"):
    """The engine can't start with this model and configuration, however often it is tried."""

    message: str
    exit_code: int


class SwapWeights(msgspec.Struct, frozen=True, kw_only=True, tag="swap"):
    """Serve other weights; what runs finishes on the old ones."""

    id: str
    """By which the `ControlDone` is known; so in the next ones."""
    path: str


class LoadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="load_adapter"):
    """Let requests name an adapter."""

    id: str
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag="unload_adapter"):
    """Let requests name it no more."""

    id: str
    name: str


class ControlDone(msgspec.Struct, frozen=True, kw_only=True, tag="control_done"):
    """How it went: the engine as it is now, or why nothing has changed."""

    id: str
    ready: Ready | None = None
    error: str = ""
    status: int = 400
    code: str | None = None


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine process is told at its start."""

    model_path: str
    config: str
    """The EngineConfig, as JSON."""
    requests_address: str
    outputs_address: str
    parent_pid: int
    log_level: str
    adapters: dict[str, str] = {}
    """Paths of adapters to load, by name."""


Control = SwapWeights | LoadAdapter | UnloadAdapter
ToEngine = Request | Abort | Stop | Control
FromEngine = Delta | EngineStats | Ready | StartFailure | ControlDone

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[list[FromEngine]] = msgspec.msgpack.Decoder(list[FromEngine])


def encode_to_engine(message: ToEngine) -> bytes:
    """Encode one message to the engine."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Decode what `encode_to_engine` made."""
    return _to_engine.decode(data)


def encode_from_engine(messages: Sequence[FromEngine]) -> bytes:
    """Encode all that a step brought."""
    return _encoder.encode(messages)


def decode_from_engine(data: bytes) -> list[FromEngine]:
    """Decode what `encode_from_engine` made."""
    return _from_engine.decode(data)


def unbounded(socket: zmq.Socket[Any], *, linger_ms: int) -> None:
    """Let a socket queue without limit: sends never block and never drop.

    What is queued is bounded elsewhere, by the tokens of the requests in flight.
    """
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.LINGER, linger_ms)
