"""Heads of the model itself draft: from its last hidden state, without a cache of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minigpt.engine.batch import Chunk
from minigpt.engine.packing import pack_linears
from minigpt.engine.sampler import sample
from minigpt.engine.sequence import Sequence
from minigpt.model.draft_heads import DraftHeads

if TYPE_CHECKING:
    from minigpt.engine.native import Runner, StatefulRunner


class HeadDrafter:
    """Fills in the drafted tokens that the scheduler has made room for.

    The runner shows it the hidden states of every row that was sampled from. Those of a batch are
    kept until the next one: a sequence that sat a step out, or was preempted, has none and is not
    drafted for until it has been sampled for again. A refused draft's state is never used: its
    position is not the last computed one. A guess is drawn with the random number that the
    model's choice will be drawn with, as by `draft_model.DraftModel`.

    Args:
        heads: In eval mode, on the runner's device, in its dtype; taken over.
        runner: Of the weights that the heads are for, and no others.
    """

    def __init__(self, heads: DraftHeads, runner: StatefulRunner) -> None:
        pack_linears(heads)
        self._heads = heads
        self._runner = runner
        self._states: dict[int, tuple[int, Tensor]] = {}
        """By arrival: a position and the (R, C) states from there on."""
        runner.watch = self._remember

    @property
    def runners(self) -> list[Runner]:
        """None: they have no cache."""
        return []

    def can_draft(self, sequence: Sequence) -> bool:
        """Tell whether the state before the sequence's last token is known."""
        return self._state(sequence, sequence.num_tokens - 2) is not None

    @torch.inference_mode()
    def fill(self, chunks: list[Chunk]) -> list[Chunk]:
        """Return the chunks with guesses in place of what they have drafted.

        A pass a token. Where the logits are not finite a chunk ends with fewer guesses.
        """
        active: list[Chunk] = []
        states: list[Tensor] = []
        for chunk in chunks:
            state = self._state(chunk.sequence, chunk.start - 1) if chunk.drafted else None
            if state is not None:
                active.append(chunk)
                states.append(state)
        guesses: dict[int, list[int]] = {chunk.sequence.arrival: [] for chunk in active}
        state = torch.stack(states) if states else None
        tokens = [chunk.sequence.token_ids[chunk.start] for chunk in active]
        ahead = 0
        while active and state is not None:
            state = self._heads(state, self._runner.embed(tokens))
            output = self._heads.output
            logits = self._runner.logits(state) if output is None else output(state).float()
            choices = sample(logits, [chunk.sequence for chunk in active], ahead=ahead)
            ahead += 1
            for chunk, choice in zip(active, choices, strict=True):
                if choice is not None:
                    guesses[chunk.sequence.arrival].append(choice.token_id)
            rows = [
                row
                for row, (chunk, choice) in enumerate(zip(active, choices, strict=True))
                if choice is not None and len(chunk.drafted) > ahead
            ]
            if len(rows) < len(active):
                active = [active[row] for row in rows]
                state = state[rows]
            tokens = [guesses[chunk.sequence.arrival][-1] for chunk in active]
        return [
            c.with_drafts(tuple(guesses.get(c.sequence.arrival, ()))) if c.drafted else c
            for c in chunks
        ]

    def _remember(self, chunks: list[Chunk], hidden: Tensor) -> None:
        """Take the (S, C) states of a run's sampled rows; `chunks` are in their order."""
        self._states = {}
        row = 0
        for chunk in chunks:
            count = chunk.num_logits
            if count and chunk.sequence.adapter is None:
                rows = hidden[row : row + count]
                self._states[chunk.sequence.arrival] = (chunk.stop - count, rows)
            row += count

    def _state(self, sequence: Sequence, position: int) -> Tensor | None:
        """Return the (C,) state at a position, None where it is not known."""
        first, rows = self._states.get(sequence.arrival, (0, None))
        if rows is None or not first <= position < first + len(rows):
            return None
        return rows[position - first]
