"""Batches in an order that is a pure function of the seed, so that resuming costs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minigpt.core.errors import DataError
from minigpt.data.permutation import Permutation
from minigpt.data.shards import TokenDataset


@dataclass(frozen=True)
class Batch:
    """Windows of the token stream; every tensor is (batch_size, sequence_length)."""

    tokens: torch.Tensor
    """int64 token ids."""
    targets: torch.Tensor
    """int64: the token that follows each; -1 where that is not to be predicted."""
    positions: torch.Tensor
    """int64: restart at 0 with each document and each window."""
    documents: torch.Tensor
    """int32: from 0 in each row; equal numbers are the same document."""


class BatchLoader:
    """Cuts the stream into windows and deals them out, shuffled anew each epoch.

    Window w covers stream positions [wT, wT + T) and takes its targets one further on, so
    every token but the last few (fewer than T) is a target once an epoch. Sample k of the
    global order is window `permutation(seed, k // num_windows)(k % num_windows)`: it depends on
    no state and not on the batch size. A batch may span two epochs.

    Example:
        loader = BatchLoader(dataset, batch_size=16, sequence_length=256, seed=0)
        batch = loader.next_batch()
        later = BatchLoader(dataset, batch_size=16, sequence_length=256, seed=0)
        later.load_state(loader.state())
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        start_sample: int = 0,
    ) -> None:
        """Plan the windows; reads no tokens.

        Args:
            dataset: One split.
            batch_size: Windows a batch, B.
            sequence_length: Tokens a window, T.
            seed: Chooses the order.
            start_sample: Position in the global order of the next batch's first window.

        Raises:
            DataError: The split has fewer windows than one batch.
        """
        assert batch_size >= 1 and sequence_length >= 1 and start_sample >= 0
        self.dataset = dataset
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.seed = seed
        self.next_sample = start_sample
        self.num_windows = max(0, (dataset.num_tokens - 1) // sequence_length)
        if self.num_windows < batch_size:
            raise DataError(
                f"the {dataset.split} split has {dataset.num_tokens:,} tokens, but one batch of "
                f"{batch_size} x {sequence_length} needs {batch_size * sequence_length + 1:,}",
                remedy="lower the batch size or the sequence length, or add text",
            )
        self._offsets = np.arange(sequence_length + 1, dtype=np.int64)
        self._permutation = (-1, Permutation(1, ""))

    @property
    def epoch(self) -> int:
        """The epoch of the next sample, from 0."""
        return self.next_sample // self.num_windows

    def next_batch(self) -> Batch:
        """Return the next windows and move on."""
        first = self.next_sample
        self.next_sample += self.batch_size
        return self.batch_at(first)

    def batch_at(self, first_sample: int) -> Batch:
        """Return the batch whose first window is sample `first_sample`; changes nothing."""
        windows = self.windows(first_sample, self.batch_size)
        starts = windows * self.sequence_length
        length = self.sequence_length + 1
        stream = np.empty((self.batch_size, length), np.int64)
        targets = np.empty((self.batch_size, self.sequence_length), np.int64)
        for row, start in enumerate(starts.tolist()):
            stream[row] = self.dataset.tokens(start, start + length)
            targets[row] = stream[row, 1:]
            mask = self.dataset.target_mask(start + 1, start + length)
            if mask is not None:
                targets[row, ~mask] = -1
        positions, documents = self._layout(starts)
        return Batch(
            tokens=torch.from_numpy(np.ascontiguousarray(stream[:, :-1])),
            targets=torch.from_numpy(targets),
            positions=torch.from_numpy(positions),
            documents=torch.from_numpy(documents),
        )

    def windows(self, first_sample: int, count: int) -> npt.NDArray[np.int64]:
        """Return the windows at samples [first_sample, first_sample + count), (count,)."""
        samples = np.arange(first_sample, first_sample + count, dtype=np.int64)
        epochs, ranks = samples // self.num_windows, samples % self.num_windows
        parts = [
            self._epoch_permutation(int(epoch))(ranks[epochs == epoch])
            for epoch in np.unique(epochs)
        ]
        return np.concatenate(parts)

    def state(self) -> dict[str, Any]:
        """Return the cursor, and what must be equal for it to mean the same samples."""
        return {"next_sample": self.next_sample, **self._identity()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state()`; the batch size may differ.

        Raises:
            DataError: The state is of another dataset, seed or sequence length.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise DataError(
                    f"can't resume the data order: {name} was {state.get(name)}, now is {value}",
                    remedy="resume with the values the run began with, or start a new run",
                )
        self.next_sample = int(state["next_sample"])

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "dataset_tokens": self.dataset.num_tokens,
        }

    def _epoch_permutation(self, epoch: int) -> Permutation:
        known, permutation = self._permutation
        if known != epoch:
            permutation = Permutation(self.num_windows, f"{self.seed}/{epoch}")
            self._permutation = (epoch, permutation)
        return permutation

    def _layout(
        self, starts: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Return positions and row-local document numbers of the windows at `starts`."""
        stream = starts[:, None] + self._offsets[:-1]
        documents = self.dataset.document_of(stream)
        begins = np.maximum(self.dataset.offsets[documents], starts[:, None])
        return stream - begins, (documents - documents[:, :1]).astype(np.int32)
