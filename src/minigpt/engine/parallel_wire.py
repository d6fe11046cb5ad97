"""What rank 0 of a tensor parallel engine tells the others, and what they answer; no torch here.

Messages go over a local socket to each rank, in msgpack, in one order: rank 0 sends one and goes on
to its own part of the work. A socket rather than a broadcast of the process group: a batch is of
any size, a rank may wait for the next one for hours, and a death shows as the socket's end.
"""

from __future__ import annotations

import msgspec


class WireSpan(msgspec.Struct, frozen=True, array_like=True):
    """A `batch.Span`."""

    start: int
    token_ids: list[int]
    block_table: list[int]
    adapter: str | None

    @property
    def length(self) -> int:
        """How many tokens."""
        return len(self.token_ids)

    @property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + len(self.token_ids)


class RunStep(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Compute a batch."""

    model: int
    """Which of the loaded models."""
    spans: list[WireSpan]
    """`runner.in_order`."""
    scored: list[tuple[int, int]]
    """Rows of the batch to project first, (first, stop), one projection after another."""
    last_rows: list[int]
    """Rows to project then, together."""


class CopyBlocks(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """See `ModelRunner.copy_blocks`."""

    copies: list[tuple[int, int]]


class ClearBlocks(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """See `ModelRunner.clear`."""

    blocks: list[int]


class Begin(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Make the KV cache and join the group."""

    port: int
    num_blocks: int


class LoadWeights(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Load other weights beside those that serve; answered once they are there."""

    model: int
    path: str


class DropWeights(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Free a model; answered by nothing."""

    model: int


class AddAdapter(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Put an adapter, which rank 0 has read and checked, on a model."""

    model: int
    digest: str
    config: bytes
    """A LoraConfig, as JSON."""
    tensors: bytes
    """Those of a whole adapter, as a safetensors file has them."""


class RemoveAdapter(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Take an adapter off a model."""

    model: int
    digest: str


class Leave(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """End."""


ToRank = (
    RunStep
    | CopyBlocks
    | ClearBlocks
    | Begin
    | LoadWeights
    | DropWeights
    | AddAdapter
    | RemoveAdapter
    | Leave
)


class Loaded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The weights that were asked for are there."""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """They can't be loaded; the rank goes on without them, or ends if they were its first."""

    message: str


FromRank = Loaded | Refused


class RankSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a rank is told at its start."""

    rank: int
    model_path: str
    config: str
    """The EngineConfig with its numerics settled, as JSON."""
    socket: int
    """Descriptor of its end of the socket."""
    parent_pid: int
    dies_with_thread: bool
    """Whether the thread that starts it lives as long as its process."""


_encoder = msgspec.msgpack.Encoder()
_to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
_from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)


def encode(message: ToRank | FromRank) -> bytes:
    """Encode one message."""
    return _encoder.encode(message)


def decode_to_rank(data: bytes) -> ToRank:
    """Decode a message to a rank."""
    return _to_rank.decode(data)


def decode_from_rank(data: bytes) -> FromRank:
    """Decode a rank's answer."""
    return _from_rank.decode(data)
