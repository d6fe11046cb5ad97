"""The process of one rank, other than the first, of a tensor parallel engine.

Started by rank 0 as `python -m minigpt.engine.parallel_worker SPEC`, SPEC being a `RankSpec` in
JSON. It does what it is told, in order, and ends when told to, with rank 0, or where it can't do
its part: rank 0 then ends too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

import msgspec
import torch
from safetensors.torch import load

from minigpt.core.config import from_mapping
from minigpt.core.errors import MinigptError
from minigpt.core.processes import die_with_parent
from minigpt.engine.config import EngineConfig
from minigpt.engine.packing import pack_weights
from minigpt.engine.paged_attention import KVCache
from minigpt.engine.parallel_group import (
    RankGroup,
    cut_adapter,
    device_of,
    gathering_head,
    join,
)
from minigpt.engine.parallel_wire import (
    AddAdapter,
    Begin,
    ClearBlocks,
    CopyBlocks,
    DropWeights,
    FromRank,
    Leave,
    Loaded,
    LoadWeights,
    RankSpec,
    Refused,
    RemoveAdapter,
    RunStep,
    ToRank,
    decode_to_rank,
    encode,
)
from minigpt.engine.runner import ModelRunner
from minigpt.model.config import LoraConfig
from minigpt.model.lora import Adapter
from minigpt.model.sharding import Shard
from minigpt.model.weights import LoadedModel, load_model


def main() -> int:
    """Run one rank and return its exit code."""
    spec = msgspec.json.decode(sys.argv[1], type=RankSpec)
    if spec.dies_with_thread:
        die_with_parent(spec.parent_pid)
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    # Ctrl-C reaches the whole process group, and rank 0 says when this is over.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    config = from_mapping(EngineConfig, msgspec.json.decode(spec.config))
    rank0 = Connection(spec.socket)
    worker = Worker(Shard(spec.rank, config.tensor_parallel_size), config, rank0)
    if not worker.load(0, spec.model_path):
        return 2
    worker.run()
    return 0


def _end_with_rank_0() -> None:
    """End this process once rank 0 has ended, wherever the main thread is."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


class Worker:
    """One rank's part of the model, its KV cache, and the commands that move them.

    Args:
        shard: Which part.
        config: The engine's, with its numerics settled.
        rank0: Where commands come from.
    """

    def __init__(self, shard: Shard, config: EngineConfig, rank0: Connection) -> None:
        assert config.threads != "auto"
        torch.set_num_threads(config.threads)
        self._shard = shard
        self._config = config
        self._rank0 = rank0
        self._device = device_of(config, shard.rank)
        if self._device != "cpu":
            torch.cuda.set_device(self._device)
        self._loaded: dict[int, LoadedModel] = {}
        """Models that have not run yet."""
        self._runners: dict[int, ModelRunner] = {}
        self._group: RankGroup | None = None
        self._cache: KVCache | None = None
        """Both from `Begin` on."""

    def load(self, number: int, path: str) -> bool:
        """Load a model's part and tell rank 0 how that went; return whether it is there."""
        answer: FromRank = Loaded()
        try:
            loaded = load_model(
                path,
                dtype=self._config.dtype,
                device=self._device,
                verify=False,  # rank 0 does
                shard=self._shard,
            )
            pack_weights(loaded.model)
            self._loaded[number] = loaded
        except MinigptError as error:
            answer = Refused(message=str(error))
        except Exception as error:
            answer = Refused(message=f"{type(error).__name__}: {error}")
        self._rank0.send_bytes(encode(answer))
        return isinstance(answer, Loaded)

    def run(self) -> None:
        """Do what rank 0 says until told to end."""
        while True:
            message = decode_to_rank(self._rank0.recv_bytes())
            if isinstance(message, Leave):
                return
            self._act(message)

    def _act(self, message: ToRank) -> None:
        match message:
            case RunStep():
                self._step(message)
            case CopyBlocks():
                for source, destination in message.copies:
                    self._begun()[1].copy(source, destination)
            case ClearBlocks():
                self._begun()[1].clear(message.blocks)
            case Begin():
                self._begin(message)
            case LoadWeights():
                loading = (message.model, message.path)
                threading.Thread(target=self.load, args=loading, daemon=True).start()
            case DropWeights():
                self._loaded.pop(message.model, None)
                self._runners.pop(message.model, None)
            case AddAdapter():
                self._add_adapter(message)
            case RemoveAdapter():
                self._runner(message.model).adapters.remove(message.digest)

    def _begin(self, message: Begin) -> None:
        config, shape = self._config, self._loaded[0].model.config
        self._cache = KVCache(
            shape,
            num_blocks=message.num_blocks,
            block_size=config.block_size,
            dtype=getattr(torch, str(config.dtype)),
            device=torch.device(self._device),
        )
        timeout = config.tensor_parallel_timeout_seconds
        self._group = RankGroup(self._shard, self._device, message.port, timeout)

    def _begun(self) -> tuple[RankGroup, KVCache]:
        assert self._group is not None
        assert self._cache is not None
        return self._group, self._cache

    def _runner(self, number: int) -> ModelRunner:
        """Return what runs a model, made when it is first needed."""
        if number not in self._runners:
            loaded = self._loaded.pop(number)
            group, cache = self._begun()
            join(loaded.model, group, loaded.config.vocab_size)
            head = gathering_head(loaded.model, group, loaded.config.vocab_size)
            self._runners[number] = ModelRunner(loaded.model, cache, head=head)
        return self._runners[number]

    def _step(self, message: RunStep) -> None:
        runner = self._runner(message.model)
        hidden = runner.hidden(message.spans)
        for first, stop in message.scored:
            runner.project(hidden, list(range(first, stop)))
        if message.last_rows:
            runner.project(hidden, message.last_rows)

    def _add_adapter(self, message: AddAdapter) -> None:
        config = from_mapping(LoraConfig, msgspec.json.decode(message.config))
        whole = Adapter(config, load(message.tensors), base="")
        self._runner(message.model).adapters.add(message.digest, cut_adapter(whole, self._shard))


if __name__ == "__main__":
    sys.exit(main())
