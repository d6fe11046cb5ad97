"""Run the model on one step's batch; tensors begin here."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minigpt.engine.adapters import AdapterSet
from minigpt.engine.batch import Chunk, Span
from minigpt.engine.packing import pack_weights
from minigpt.engine.paged_attention import KVCache, PagedAttention
from minigpt.engine.prompt_scores import read_prompt
from minigpt.engine.sequence import Sequence
from minigpt.model.decoder import Decoder
from minigpt.model.weights import LoadedModel


@dataclass(frozen=True)
class Head:
    """From hidden states to logits."""

    project: Callable[[Tensor], Tensor]
    """(R, C) to (R, V), in any precision."""
    vocab_size: int


Watch = Callable[[list[Chunk], Tensor], None]
"""Receives a run's chunks in order and, after the final norm, the (S, C) states of the rows that
are sampled from."""


class ModelRunner:
    """Runs one set of weights over a KV cache.

    Args:
        model: In eval mode, on its device.
        cache: Of the shape of the model's keys and values; other runners may use it too.
        guesses: Whether it only drafts: prompts are not read and adapters are left out.
        head: What yields the logits; None is the model itself.
    """

    name: ClassVar[str] = "torch"
    activation_bits = None

    def __init__(
        self, model: Decoder, cache: KVCache, *, guesses: bool = False, head: Head | None = None
    ) -> None:
        self._model = model
        self._guesses = guesses
        self._head = head or Head(model.logits, model.config.vocab_size)
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

    def with_model(self, loaded: LoadedModel) -> ModelRunner:
        """Return a runner of other weights over the same cache; they are packed in place."""
        pack_weights(loaded.model)
        return ModelRunner(loaded.model, self._cache, guesses=self._guesses)

    def close(self) -> None:
        """Nothing is held elsewhere."""

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
        ordered = in_order(chunks)
        hidden = self.hidden(ordered)
        last_rows: list[int] = []
        sampled: list[Sequence] = []
        row = 0
        for chunk in ordered:
            if not self._guesses and chunk.sequence.reader is not None:
                read_prompt(hidden[row : row + chunk.length], chunk, self._head.project)
            row += chunk.length
            last_rows += range(row - chunk.num_logits, row)
            sampled += [chunk.sequence] * chunk.num_logits
        if not sampled:
            return hidden.new_empty(0, self._head.vocab_size, dtype=torch.float32), []
        if self.watch is not None:
            self.watch(ordered, hidden.index_select(0, self._tensor(last_rows)))
        return self.project(hidden, last_rows).float(), sampled

    @torch.inference_mode()
    def hidden(self, spans: SequenceOf[Span]) -> Tensor:
        """Compute spans, which are `in_order`: (N, C) after the final norm, row by row."""
        attention = PagedAttention(self._cache, spans, self._model.config.sliding_window)
        tokens: list[int] = []
        positions: list[int] = []
        adapted: dict[str, list[int]] = {}
        for span in spans:
            if not self._guesses and (adapter := span.adapter) is not None:
                rows = range(len(tokens), len(tokens) + span.length)
                adapted.setdefault(adapter, []).extend(rows)
            tokens += span.token_ids
            positions += range(span.start, span.stop)
        self.adapters.use(adapted)
        hidden = self._model(self._tensor(tokens)[None], self._tensor(positions)[None], attention)
        return hidden[0]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def project(self, hidden: Tensor, rows: list[int]) -> Tensor:
        """Return the logits of some rows of (N, C)."""
        return self._head.project(hidden.index_select(0, self._tensor(rows)))

    @torch.inference_mode()
    def embed(self, tokens: list[int]) -> Tensor:
        """Return the (R, C) embeddings of R tokens."""
        return self._model.model.embed_tokens(self._tensor(tokens))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Map (R, C) states after the final norm to (R, V) float32 logits."""
        return self._head.project(hidden).float()

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy blocks of the cache, (source, destination), one after another."""
        for source, destination in copies:
            self._cache.copy(source, destination)

    def clear(self, blocks: list[int]) -> None:
        """Zero a failed sequence's blocks, so that no NaN of it reaches those who reuse them."""
        self._cache.clear(blocks)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._device)


def in_order(chunks: list[Chunk]) -> list[Chunk]:
    """Put decode first, by length, so that sequences of like length gather together."""
    return sorted(chunks, key=lambda chunk: (chunk.length > 1, chunk.stop))
