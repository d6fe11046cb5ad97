"""Runs batches on all ranks of a tensor parallel engine; the logits come to rank 0."""

from __future__ import annotations

from collections import deque
from typing import ClassVar

import torch
from safetensors.torch import save
from torch import Tensor

from minigpt.engine.adapters import AdapterSet
from minigpt.engine.batch import Chunk
from minigpt.engine.packing import pack_weights
from minigpt.engine.paged_attention import KVCache
from minigpt.engine.parallel import Ranks
from minigpt.engine.parallel_group import RankGroup, cut_adapter, gathering_head, join
from minigpt.engine.parallel_wire import (
    AddAdapter,
    ClearBlocks,
    CopyBlocks,
    DropWeights,
    RemoveAdapter,
    RunStep,
    WireSpan,
)
from minigpt.engine.prompt_scores import scored_positions
from minigpt.engine.runner import Head, ModelRunner, in_order
from minigpt.engine.sequence import Sequence
from minigpt.model.decoder import Decoder
from minigpt.model.lora import Adapter
from minigpt.model.weights import LoadedModel


class ParallelRunner:
    """`ModelRunner` over all ranks: each computes its part, this process rank 0's.

    Args:
        ranks: The other ranks' processes.
        group: All ranks.
        model: Rank 0's part, which is packed in place.
        cache: Rank 0's part of the KV cache.
        number: What the other ranks call the model.
    """

    name: ClassVar[str] = "torch"
    activation_bits = None

    def __init__(
        self, ranks: Ranks, group: RankGroup, model: Decoder, cache: KVCache, number: int
    ) -> None:
        self._ranks = ranks
        self._group = group
        self._cache = cache
        self._number = number
        join(model, group, ranks.model.vocab_size)
        pack_weights(model)
        self._head = gathering_head(model, group, ranks.model.vocab_size)
        self._runner = ModelRunner(model, cache, head=Head(self._project, self._head.vocab_size))
        self._runner.adapters = _ParallelAdapters(model, cache.dtype, ranks, group, number)
        self._due: deque[int] = deque()
        """Rows of the projections that the other ranks will still take part in."""

    @classmethod
    def with_cache(
        cls, model: Decoder, ranks: Ranks, *, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> ParallelRunner:
        """Have all ranks make their KV caches and meet; arguments as of `ModelRunner`."""
        device = next(iter(model.state_dict().values())).device
        cache = KVCache(
            model.config, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=device
        )
        return cls(ranks, ranks.begin(num_blocks), model, cache, number=0)

    @property
    def adapters(self) -> AdapterSet:
        """Of this model, on all ranks."""
        return self._runner.adapters

    @property
    def exchange_seconds(self) -> float:
        """See `RankGroup.seconds`."""
        return self._group.seconds

    def with_model(self, loaded: LoadedModel) -> ParallelRunner:
        """Have the other ranks load theirs of rank 0's loaded part; see `Runner.with_model`."""
        number = self._ranks.load(loaded.path)
        return ParallelRunner(self._ranks, self._group, loaded.model, self._cache, number)

    def close(self) -> None:
        """Free the other ranks' weights."""
        self._ranks.send(DropWeights(model=self._number))

    def run(self, chunks: list[Chunk]) -> tuple[Tensor, list[Sequence]]:
        """See `ModelRunner.run`.

        Raises:
            RankError: A rank is gone, silent or could not compute its part: none can go on.
        """
        ordered = in_order(chunks)
        step = self._describe(ordered)
        self._due.extend(stop - first for first, stop in step.scored)
        self._due.extend([len(step.last_rows)] if step.last_rows else [])
        self._ranks.send(step)
        try:
            return self._runner.run(ordered)
        except FloatingPointError:  # a prompt's scores; the ranks themselves are in step
            self._finish_step()
            raise
        except Exception as error:
            raise self._ranks.lose(f"{type(error).__name__}: {error}") from error

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """See `ModelRunner.copy_blocks`."""
        if copies:
            self._ranks.send(CopyBlocks(copies=copies))
            self._runner.copy_blocks(copies)

    def clear(self, blocks: list[int]) -> None:
        """See `ModelRunner.clear`."""
        self._ranks.send(ClearBlocks(blocks=blocks))
        self._runner.clear(blocks)

    def _describe(self, chunks: list[Chunk]) -> RunStep:
        scored: list[tuple[int, int]] = []
        last_rows: list[int] = []
        row = 0
        for chunk in chunks:
            shift = row - chunk.start
            scored += [(first + shift, stop + shift) for first, stop in scored_positions(chunk)]
            row += chunk.length
            last_rows += range(row - chunk.num_logits, row)
        size = self._cache.block_size
        spans = [
            WireSpan(c.start, c.token_ids, c.block_table[: -(-c.stop // size)], c.adapter)
            for c in chunks
        ]
        return RunStep(model=self._number, spans=spans, scored=scored, last_rows=last_rows)

    def _project(self, hidden: Tensor) -> Tensor:
        self._due.popleft()
        return self._head.project(hidden)

    def _finish_step(self) -> None:
        """Take part in the projections of a step that is given up, for the other ranks do."""
        first, stop = self._group.shard.bounds(self._head.vocab_size)
        while self._due:
            empty = self._cache.keys[0].new_empty(self._due.popleft(), stop - first)
            self._group.gather(empty, self._head.vocab_size)


class _ParallelAdapters(AdapterSet):
    """The adapters on one model, on all ranks."""

    def __init__(
        self, model: Decoder, dtype: torch.dtype, ranks: Ranks, group: RankGroup, number: int
    ) -> None:
        super().__init__(model, dtype)
        self._ranks = ranks
        self._shard = group.shard
        self._number = number

    def add(self, digest: str, adapter: Adapter) -> None:
        config = adapter.config.model_dump_json().encode()
        tensors = {name: tensor.contiguous() for name, tensor in adapter.tensors.items()}
        self._ranks.send(
            AddAdapter(model=self._number, digest=digest, config=config, tensors=save(tensors))
        )
        super().add(digest, cut_adapter(adapter, self._shard))

    def remove(self, digest: str) -> None:
        self._ranks.send(RemoveAdapter(model=self._number, digest=digest))
        super().remove(digest)
