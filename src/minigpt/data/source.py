"""One dataset of a loader: which of its rows a sample is, and what of them is no target."""

from __future__ import annotations

import numpy as np

from minigpt.data.packing import Integers
from minigpt.data.permutation import Permutation
from minigpt.data.rows import IGNORED_TARGET, Rows, RowTokens
from minigpt.data.shards import TokenDataset


class Source:
    """One dataset of a loader."""

    def __init__(
        self,
        name: str,
        dataset: TokenDataset,
        rows: Rows,
        key: str,
        hidden: Integers,
        hidden_since: Integers,
    ) -> None:
        """Put the parts together.

        Args:
            name: Of the source.
            dataset: Its split.
            rows: How the split is cut.
            key: Of the shuffle.
            hidden: Documents whose tokens are no targets, ascending.
            hidden_since: The first sample of the run in which each is hidden.
        """
        self.name = name
        self.dataset = dataset
        self.rows = rows
        self._key = key
        self._hidden = hidden
        self._hidden_since = hidden_since
        self._permutation = (-1, Permutation(1, ""))

    def shuffled(self, indices: Integers) -> tuple[Integers, Integers]:
        """Return epoch and row of the source's samples, same shape."""
        epochs, ranks = np.divmod(indices, self.rows.num_rows)
        rows = np.empty_like(indices)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._epoch_permutation(int(epoch))(ranks[here])
        return epochs, rows

    def hidden_at(self, sample: int) -> set[int]:
        """Return the documents that are hidden at a sample of the run."""
        return set(self._hidden[self._hidden_since <= sample].tolist())

    def hide(self, read: RowTokens, samples: Integers) -> None:
        """Take the targets off hidden documents in the rows at `samples` of the run."""
        if not len(self._hidden):
            return
        places = np.searchsorted(self._hidden, read.documents).clip(max=len(self._hidden) - 1)
        is_hidden = self._hidden[places] == read.documents
        is_hidden &= self._hidden_since[places] <= samples[:, None]
        read.targets[is_hidden] = IGNORED_TARGET

    def _epoch_permutation(self, epoch: int) -> Permutation:
        known, permutation = self._permutation
        if known != epoch:
            permutation = Permutation(self.rows.num_rows, f"{self._key}/{epoch}")
            self._permutation = (epoch, permutation)
        return permutation
