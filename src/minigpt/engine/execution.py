"""From a step's chunks to what each sequence got: drafted for, run, sampled, verified."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from minigpt.engine.batch import Chunk
from minigpt.engine.choice import Sampled
from minigpt.engine.native import Runner
from minigpt.engine.parallel import RankError
from minigpt.engine.sampler import sample
from minigpt.engine.scheduler import Scheduler
from minigpt.engine.sequence import Sequence
from minigpt.engine.speculative import Speculator, keep_right
from minigpt.engine.weights import HeldWeights


class Drafter(Protocol):
    """Says which tokens are drafted, once the scheduler has made room for so many."""

    @property
    def runners(self) -> list[Runner]:
        """Those that have a KV cache of their own under the model's block tables."""
        ...

    def can_draft(self, sequence: Sequence) -> bool:
        """Tell whether it can draft for a sequence in the step that is being scheduled."""
        ...

    def fill(self, chunks: list[Chunk]) -> list[Chunk]:
        """Return the chunks with its guesses, perhaps fewer, in place of what they have drafted."""
        ...


class Outcome(NamedTuple):
    """What a step came to for a sequence that was sampled."""

    sequence: Sequence
    choices: list[Sampled]
    """The next tokens, at least one; none where it failed."""
    error: str = ""
    """Why it failed."""


class Executor:
    """Runs batches; a failure stays with its sequence.

    Args:
        weights: Run the sequences.
        scheduler: Is told what was computed.
        speculator: Is told what became of drafted tokens; None where nothing is drafted.
        drafter: Where a model says what is drafted.
    """

    def __init__(
        self,
        weights: HeldWeights,
        scheduler: Scheduler,
        speculator: Speculator | None,
        drafter: Drafter | None,
    ) -> None:
        self._weights = weights
        self._scheduler = scheduler
        self._speculator = speculator
        self._drafter = drafter

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Copy blocks, (source, destination), one after another, in every cache."""
        for runner in self._runners:
            runner.copy_blocks(copies)

    def run(self, chunks: list[Chunk]) -> Iterator[Outcome]:
        """Compute chunks and say, for each that samples, what comes next.

        What a chunk computed is recorded just before its outcome is yielded, so that the taker
        may finish its sequence at once.

        Raises:
            RankError: All is lost.
        """
        yield from self._run(self._guess(chunks))

    def clear(self, sequence: Sequence) -> None:
        """Take what a sequence has computed out of the caches."""
        blocks = self._scheduler.poison(sequence)
        for runner in self._runners:
            runner.clear(blocks)

    @property
    def _runners(self) -> list[Runner]:
        """One for each KV cache: all weights of the model share theirs."""
        return [self._weights.runner, *(self._drafter.runners if self._drafter else ())]

    def _guess(self, chunks: list[Chunk]) -> list[Chunk]:
        """Let the drafter, where there is one, say what is drafted; it may fail."""
        if self._drafter is None:
            return chunks
        try:
            return self._drafter.fill(chunks)
        except Exception:
            return [chunk.with_drafts(()) for chunk in chunks]

    def _run(self, chunks: list[Chunk]) -> Iterator[Outcome]:
        """Run and sample; where that raises, find the culprit by running chunk by chunk."""
        try:
            logits, sequences = self._weights.run(chunks)
            choices = sample(logits, sequences)
        except RankError:
            raise
        except Exception as error:
            if len(chunks) > 1:
                for chunk in chunks:
                    yield from self._run([chunk])
            elif chunks[0].drafted:
                yield from self._run([chunks[0].with_drafts(())])
            else:
                yield Outcome(chunks[0].sequence, [], f"{type(error).__name__}: {error}")
            return
        rows: dict[int, list[Sampled | None]] = {}
        for sequence, choice in zip(sequences, choices, strict=True):
            rows.setdefault(sequence.arrival, []).append(choice)
        for chunk in chunks:
            yield from self._verify(chunk, rows.get(chunk.sequence.arrival, []))

    def _verify(self, chunk: Chunk, choices: list[Sampled | None]) -> Iterator[Outcome]:
        """Record what a chunk computed; `choices` are row by row what follows its last tokens."""
        kept = keep_right(chunk.drafted, choices)
        if chunk.drafted and None in choices:
            self._compute_anew(chunk.sequence)
            return
        right = chunk.with_drafts(chunk.drafted[: max(len(kept) - 1, 0)])
        if self._speculator is not None and chunk.drafted:
            self._speculator.observe(
                chunk.sequence, len(chunk.drafted), accepted=len(right.drafted)
            )
        self._scheduler.advance([right])
        if kept:
            yield Outcome(chunk.sequence, kept)
        elif chunk.samples:
            yield Outcome(chunk.sequence, [], "the model's logits are not finite")

    def _compute_anew(self, sequence: Sequence) -> None:
        """Begin again without drafts, one of which may be why the logits are not finite.

        Even masked its keys and values would spoil the rows before it, and later ones.
        """
        sequence.drafting.allowed = False
        self.clear(sequence)
        self._scheduler.preempt(sequence)
