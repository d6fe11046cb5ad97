"""Run the model on one step's batch; tensors begin here."""

from __future__ import annotations

import torch
from torch import Tensor

from minigpt.engine.batch import Chunk
from minigpt.engine.paged_attention import KVCache, PagedAttention
from minigpt.engine.prompt_scores import read_prompt
from minigpt.engine.sequence import Sequence
from minigpt.model.decoder import Decoder


class ModelRunner:
    """Owns the model and the KV cache.

    Args:
        model: In eval mode, on its device.
        num_blocks: Blocks of the KV cache.
        block_size: Tokens in a block.
        dtype: Of the KV cache: that of the model's activations.
        reads_prompts: Whether sequences are told what they want to know of their prompts.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        reads_prompts: bool = True,
    ) -> None:
        self._model = model
        self._reads_prompts = reads_prompts
        self._device = next(iter(model.state_dict().values())).device
        self._cache = KVCache(
            model.config,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=dtype,
            device=self._device,
        )

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
        for chunk in ordered:
            if self._reads_prompts and chunk.sequence.reader is not None:
                read.append((len(tokens), chunk))
            tokens += chunk.token_ids
            positions += range(chunk.start, chunk.stop)
            last_rows += range(len(tokens) - chunk.num_logits, len(tokens))
            sampled += [chunk.sequence] * chunk.num_logits
        hidden = self._model(self._tensor(tokens)[None], self._tensor(positions)[None], attention)
        for row, chunk in read:
            read_prompt(hidden[0, row : row + chunk.length], chunk, self._model.logits)
        if not sampled:
            return hidden.new_empty(0, self._model.config.vocab_size, dtype=torch.float32), []
        last = hidden[0].index_select(0, self._tensor(last_rows))  # (S, C)
        return self._model.logits(last).float(), sampled

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy blocks of the cache, (source, destination), one after another."""
        for source, destination in copies:
            self._cache.copy(source, destination)

    def clear(self, blocks: list[int]) -> None:
        """Zero a failed sequence's blocks, so that no NaN of it reaches those who reuse them."""
        self._cache.clear(blocks)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._device)
