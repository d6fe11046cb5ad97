"""A small model guesses what a large one will say (Leviathan et al. 2023, arXiv 2211.17192)."""

from __future__ import annotations

import torch

from minigpt.engine.batch import Chunk
from minigpt.engine.choice import Sampled
from minigpt.engine.native import Runner, make_runner
from minigpt.engine.sampler import sample
from minigpt.engine.sequence import Sequence
from minigpt.kernels.cache_format import CacheFormat
from minigpt.model.decoder import Decoder


class DraftModel:
    """Fills in the drafted tokens that the scheduler has made room for.

    It computes whatever the large model computes, with a cache of its own under the same block
    tables, so that a block that is shared holds its keys and values too. A guess is drawn with
    the random number that the large model's choice will be drawn with: where the two models
    agree on the chances, they agree on the token.

    Args:
        model: In eval mode, on its device, with the large model's vocabulary.
        num_blocks: Of the large model's cache.
        block_size: Of the large model's cache.
        dtype: Of its activations.
        cache_format: Of its cache.

    Raises:
        ConfigError: Torch would run it, and has no such cache.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        cache_format: CacheFormat,
    ) -> None:
        self.runner = make_runner(
            model,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=dtype,
            adapters=False,
            cache_format=cache_format,
            guesses=True,
        )

    @property
    def runners(self) -> list[Runner]:
        """The one whose KV cache goes with the large model's."""
        return [self.runner]

    def can_draft(self, sequence: Sequence) -> bool:
        """Tell whether it can draft for a sequence: always."""
        return True

    def fill(self, chunks: list[Chunk]) -> list[Chunk]:
        """Return the chunks with guesses in place of what they have drafted.

        A pass a token, and one for the last one's keys and values. Where the logits are not
        finite a chunk ends with fewer guesses.
        """
        guesses: dict[int, tuple[int, ...]] = {}
        passes = 1 + max((len(chunk.drafted) for chunk in chunks), default=0)
        active = chunks
        for number in range(passes):
            known = [c.with_drafts(guesses.get(c.sequence.arrival, ())) for c in active]
            choices = self._choose(known, number)
            active = [c for c in active if len(c.drafted) > number]
            for chunk in active:
                choice = choices[chunk.sequence.arrival]
                if choice is not None:
                    arrival = chunk.sequence.arrival
                    guesses[arrival] = (*guesses.get(arrival, ()), choice.token_id)
            active = [c for c in active if len(guesses.get(c.sequence.arrival, ())) == number + 1]
        return [
            c.with_drafts(guesses.get(c.sequence.arrival, ())) if c.drafted else c for c in chunks
        ]

    def _choose(self, chunks: list[Chunk], ahead: int) -> dict[int, Sampled | None]:
        """Compute chunks and guess what follows each; by arrival."""
        if not chunks:
            return {}
        logits, sequences = self.runner.run(chunks)
        last: dict[int, tuple[int, Sequence]] = {
            sequence.arrival: (row, sequence) for row, sequence in enumerate(sequences)
        }
        if not last:
            return {}
        rows = [row for row, _ in last.values()]
        choices = sample(logits[rows], [sequence for _, sequence in last.values()], ahead=ahead)
        return dict(zip(last, choices, strict=True))
