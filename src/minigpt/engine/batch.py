"""What a step computes: the scheduler fills a Batch, the runner carries it out; no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from minigpt.engine.cost_model import StepWork, prefill_pairs
from minigpt.engine.sequence import Sequence


class Span(Protocol):
    """What the forward pass needs to know of a chunk."""

    @property
    def start(self) -> int:
        """Position of the first token."""
        ...

    @property
    def token_ids(self) -> list[int]:
        """The tokens, known and drafted."""
        ...

    @property
    def block_table(self) -> list[int]:
        """The sequence's blocks, in order; those that the chunk reaches at least."""
        ...

    @property
    def adapter(self) -> str | None:
        """Digest of the sequence's adapter."""
        ...

    @property
    def length(self) -> int:
        """How many tokens."""
        ...

    @property
    def stop(self) -> int:
        """One past the last position."""
        ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start .. start + length - 1 of one sequence."""

    sequence: Sequence
    start: int
    length: int
    samples: bool
    """Whether these are its last known tokens, so that the next one is sampled."""
    drafted: tuple[int, ...] = ()
    """The last of these tokens, where they are not known but guessed."""

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.start + self.length

    @property
    def token_ids(self) -> list[int]:
        """The (length,) tokens, known and drafted."""
        return [*self.sequence.token_ids[self.start : self.stop], *self.drafted]

    @property
    def block_table(self) -> list[int]:
        """The sequence's."""
        return self.sequence.block_table

    @property
    def adapter(self) -> str | None:
        """The sequence's."""
        return self.sequence.adapter

    @property
    def num_logits(self) -> int:
        """How many of the last tokens need logits."""
        return 1 + len(self.drafted) if self.samples else 0

    @property
    def is_decode(self) -> bool:
        """Whether this computes the newest generated token, and drafted ones at most."""
        known = self.length - len(self.drafted)
        return known == 1 and self.samples and self.start >= self.sequence.num_prompt_tokens

    def with_drafts(self, drafted: tuple[int, ...]) -> Chunk:
        """Return this chunk with other tokens drafted."""
        known = self.length - len(self.drafted)
        return Chunk(self.sequence, self.start, known + len(drafted), self.samples, drafted)


@dataclass(slots=True)
class Batch:
    """One step's work."""

    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Blocks to copy before anything is computed, (source, destination), in this order."""

    @property
    def num_tokens(self) -> int:
        """Tokens to compute."""
        return sum(chunk.length for chunk in self.chunks)

    @property
    def num_decode_tokens(self) -> int:
        """Tokens of running streams, drafted ones among them."""
        return sum(chunk.length for chunk in self.chunks if chunk.is_decode)

    @property
    def work(self) -> StepWork:
        """What the time that this takes depends on."""
        decode = [chunk for chunk in self.chunks if chunk.is_decode]
        prefill = [chunk for chunk in self.chunks if not chunk.is_decode]
        return StepWork(
            prefill_tokens=sum(chunk.length for chunk in prefill),
            prefill_pairs=sum(prefill_pairs(chunk.start, chunk.length) for chunk in prefill),
            decode_rows=len(decode),
            decode_context=sum(chunk.stop for chunk in decode),
            drafted_tokens=sum(len(chunk.drafted) for chunk in decode),
        )
