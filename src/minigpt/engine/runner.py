"""Run the model on one step's batch; tensors begin here."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from minigpt.engine.adapters import AdapterSet
from minigpt.engine.batch import Chunk
from minigpt.engine.packing import pack_weights
from minigpt.engine.paged_attention import KVCache, PagedAttention
from minigpt.engine.prompt_scores import read_prompt
from minigpt.engine.sequence import Sequence
from minigpt.model.decoder import Decoder

Watch = Callable[[list[Chunk], Tensor], None]
"""Receives a run's chunks in order and, after the final norm, the (S, C) states of the rows that
are sampled from."""


class ModelRunner:
    """Runs one set of weights over a KV cache.

    Args:
        model: In eval mode, on its device.
        cache: Of the shape of the model's keys and values; other runners may use it too.
        guesses: Whether it only drafts: prompts are not read and adapters are left out.
    """

    name: ClassVar[str] = "torch"

    def __init__(self, model: Decoder, cache: KVCache, *, guesses: bool = False) -> None:
        self._model = model
        self._guesses = guesses
        self._device = next(iter(model.state_dict().values())).device
        self._cache = cache
        self.adapters = AdapterSet(model, cache.dtype)
        """Of this model."""
        self.watch: Watch | None = None

    @classmethod
    def with_cache(
        cls,
        model: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        guesses: bool = False,
    ) -> ModelRunner:
        """Make a runner and its KV cache.

        Args:
            model: In eval mode, on its device.
            num_blocks: Blocks of the KV cache.
            block_size: Tokens in a block.
            dtype: Of the KV cache: that of the model's activations.
            guesses: As in the class.
        """
        device = next(iter(model.state_dict().values())).device
        cache = KVCache(
            model.config, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=device
        )
        return cls(model, cache, guesses=guesses)

    def with_model(self, model: Decoder) -> ModelRunner:
        """Return a runner of other weights over the same cache; they are packed in place."""
        pack_weights(model)
        return ModelRunner(model, self._cache, guesses=self._guesses)

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> tuple[Tensor, list[Sequence]]:
        """Compute a batch's tokens: writes their keys and values, returns the next logits.

        Running the same chunks again is safe: they write the same values to the same slots.

        Args:
            chunks: At least one; blocks for all of them are in the block tables.

        Returns:
            (S, V) float32 logits and the S sequences to sample for, row by row: each chunk's
            sequence as often, in succession, as it has `num_logits`.
        """
        # Decode first, by length, so that sequences of like length gather together.
        ordered = sorted(chunks, key=lambda chunk: (chunk.length > 1, chunk.stop))
        attention = PagedAttention(self._cache, ordered, self._model.config.sliding_window)
        tokens: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        sampled: list[Sequence] = []
        read: list[tuple[int, Chunk]] = []
        adapted: dict[str, list[int]] = {}
        for chunk in ordered:
            if not self._guesses and chunk.sequence.reader is not None:
                read.append((len(tokens), chunk))
            if not self._guesses and (adapter := chunk.sequence.adapter) is not None:
                rows = range(len(tokens), len(tokens) + chunk.length)
                adapted.setdefault(adapter, []).extend(rows)
            tokens += chunk.token_ids
            positions += range(chunk.start, chunk.stop)
            last_rows += range(len(tokens) - chunk.num_logits, len(tokens))
            sampled += [chunk.sequence] * chunk.num_logits
        self.adapters.use(adapted)
        hidden = self._model(self._tensor(tokens)[None], self._tensor(positions)[None], attention)
        for row, chunk in read:
            read_prompt(hidden[0, row : row + chunk.length], chunk, self._model.logits)
        if not sampled:
            return hidden.new_empty(0, self._model.config.vocab_size, dtype=torch.float32), []
        last = hidden[0].index_select(0, self._tensor(last_rows))  # (S, C)
        if self.watch is not None:
            self.watch(ordered, last)
        return self._model.logits(last).float(), sampled

    @torch.inference_mode()
    def embed(self, tokens: list[int]) -> Tensor:
        """Return the (R, C) embeddings of R tokens."""
        return self._model.model.embed_tokens(self._tensor(tokens))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def project(self, hidden: Tensor) -> Tensor:
        """Map (R, C) states after the final norm to (R, V) float32 logits."""
        return self._model.logits(hidden).float()

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy blocks of the cache, (source, destination), one after another."""
        for source, destination in copies:
            self._cache.copy(source, destination)

    def clear(self, blocks: list[int]) -> None:
        """Zero a failed sequence's blocks, so that no NaN of it reaches those who reuse them."""
        self._cache.clear(blocks)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._device)
