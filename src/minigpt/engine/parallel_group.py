"""What ranks that compute one model together add up and put together (tensor parallelism)."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore

from minigpt.engine.config import EngineConfig
from minigpt.engine.runner import Head
from minigpt.model.decoder import Decoder
from minigpt.model.lora import Adapter
from minigpt.model.sharding import Shard
from minigpt.model.weights import cut_tensor

_LOOPBACK = "127.0.0.1"
_MEETING_SECONDS = 60.0
"""How long ranks wait for each other at least before the first exchange."""


def shard_of(config: EngineConfig, rank: int) -> Shard | None:
    """Return a rank's part of the model; None where there is one process, which has all."""
    ranks = config.tensor_parallel_size
    return None if ranks == 1 else Shard(rank, ranks)


def device_of(config: EngineConfig, rank: int) -> str:
    """Return where a rank computes: each has a GPU of its own, or all share the processor."""
    return "cpu" if config.device == "cpu" else f"cuda:{rank}"


class RankGroup:
    """The ranks of one engine, each in a process of its own; made by all of them at once.

    Over gloo on a CPU and NCCL on GPUs. Where a rank is gone or silent, the others get a
    RuntimeError: over gloo at once if it is gone, otherwise after the timeout.

    Args:
        shard: Which of them this is.
        device: Where it computes.
        port: Where rank 0 listens on the loopback interface; rank 0 itself gives `listener`.
        timeout_seconds: Of each exchange.
        listener: Rank 0's listening socket.
    """

    def __init__(
        self,
        shard: Shard,
        device: str,
        port: int,
        timeout_seconds: float,
        *,
        listener: socket.socket | None = None,
    ) -> None:
        self.shard = shard
        self.seconds = 0.0
        """Spent in exchanges, waiting for the slowest rank included; of a GPU only in starting
        them."""
        timeout = timedelta(seconds=timeout_seconds)
        self._store = TCPStore(
            _LOOPBACK,
            port,
            shard.ranks,
            is_master=listener is not None,
            timeout=timedelta(seconds=max(timeout_seconds, _MEETING_SECONDS)),
            master_listen_fd=None if listener is None else listener.detach(),
        )
        self._group = dist.ProcessGroup(self._store, shard.rank, shard.ranks)
        kind = dist.ProcessGroup.BackendType
        if device == "cpu":
            options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = timeout
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=_LOOPBACK)]
            gloo = dist.ProcessGroupGloo(self._store, shard.rank, shard.ranks, options)
            self._group._register_backend(torch.device("cpu"), kind.GLOO, gloo)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            nccl = dist.ProcessGroupNCCL(self._store, shard.rank, shard.ranks, options)
            self._group._register_backend(torch.device("cuda"), kind.NCCL, nccl)

    def sum(self, partial: Tensor) -> Tensor:
        """Replace each rank's tensor by the sum of all; the same bits on all of them."""
        began = time.perf_counter()
        self._group.allreduce([partial]).wait()
        self.seconds += time.perf_counter() - began
        return partial

    def gather(self, part: Tensor, length: int) -> Tensor:
        """Put (R, part) pieces of rows together on rank 0: (R, length); elsewhere `part` returns.

        Args:
            part: This rank's `shard.bounds(length)`.
            length: Of a whole row.
        """
        bounds = [Shard(rank, self.shard.ranks).bounds(length) for rank in range(self.shard.ranks)]
        widths = [stop - first for first, stop in bounds]
        padded = nn.functional.pad(part, (0, max(widths) - part.shape[-1])).contiguous()
        first = self.shard.rank == 0
        pieces = [torch.empty_like(padded) for _ in widths] if first else []
        began = time.perf_counter()
        self._group.gather([pieces] if first else [], [padded]).wait()
        self.seconds += time.perf_counter() - began
        if not first:
            return part
        return torch.cat(
            [piece[..., :width] for piece, width in zip(pieces, widths, strict=True)], dim=-1
        )


def gathering_head(model: Decoder, group: RankGroup, vocab_size: int) -> Head:
    """Return a head whose logits are whole on rank 0, from a part of the projection on each rank.

    All ranks must call it for the same rows, in the same order.
    """
    return Head(lambda hidden: group.gather(model.logits(hidden), vocab_size), vocab_size)


def cut_adapter(adapter: Adapter, shard: Shard) -> Adapter:
    """Return a rank's part of an adapter."""
    tensors = {name: cut_tensor(name, tensor, shard) for name, tensor in adapter.tensors.items()}
    return replace(adapter, tensors=tensors)


def join(model: Decoder, group: RankGroup, vocab_size: int) -> None:
    """Have a rank's part of a decoder compute the whole one's hidden states, with the others.

    Args:
        model: As `load_model` loads it with this rank's shard.
        group: The ranks.
        vocab_size: Of the whole model.
    """
    for layer in model.model.layers:
        for part in (layer.get_submodule("self_attn"), layer.get_submodule("mlp")):
            part.register_forward_hook(lambda module, inputs, output: group.sum(output))
    lookup = _PartialLookup(group, *group.shard.bounds(vocab_size))
    model.model.embed_tokens.register_forward_pre_hook(lookup.find)
    model.model.embed_tokens.register_forward_hook(lookup.complete)


class _PartialLookup:
    """Looks tokens up in a part of the vocabulary; the other ranks have the others'."""

    def __init__(self, group: RankGroup, first: int, stop: int) -> None:
        self._group = group
        self._first, self._stop = first, stop
        self._absent = torch.empty(0)

    def find(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (tokens,) = inputs
        self._absent = (tokens < self._first) | (tokens >= self._stop)
        return ((tokens - self._first).masked_fill(self._absent, 0),)

    def complete(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return self._group.sum(output.masked_fill(self._absent[..., None], 0))
