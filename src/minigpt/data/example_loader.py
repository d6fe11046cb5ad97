"""Batches of whole examples: conversations packed into rows, preferences pair by pair.

Unlike the windows of `data.loader`, no row begins or ends inside an example.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from minigpt.core.errors import DataError
from minigpt.data.loader import Batch, SampleLoader
from minigpt.data.permutation import Permutation
from minigpt.data.rows import IGNORED_TARGET
from minigpt.data.shards import TokenDataset
from minigpt.data.skip_list import SkipList


class ExampleRow(NamedTuple):
    """One row of a batch."""

    epoch: int
    """How often the examples have been used up before."""
    documents: npt.NDArray[np.int64]
    """Numbers of its examples, in their order."""


class ExampleLoader(SampleLoader):
    """Deals out rows of whole examples, shuffled anew each epoch; the order holds no state.

    Chat: examples are packed once, in an order drawn by the seed, each row taking as many as
    fit; sample k of the global order is row `permutation(seed, epoch)(k)`. Preference: a row is
    one answer, and rows 2j and 2j + 1 are the chosen and the rejected one of pair
    `permutation(seed, epoch)(j)`, so that a batch of even size holds whole pairs. What a row has
    left over is a document of its own without targets. A document on the skip list loses its
    targets; of a preference the whole pair does.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        skip_list: SkipList | None = None,
    ) -> None:
        """Plan the rows; reads no tokens.

        Args:
            dataset: One split of conversations or preferences.
            batch_size: Rows a batch, B.
            sequence_length: Tokens a row, T; an example of n tokens takes n of them.
            seed: Chooses packing and order.
            skip_list: What is left out.

        Raises:
            DataError: An example is longer than a row, a batch or the skip list would part a
                pair, or the split has fewer rows than one batch.
        """
        assert dataset.content != "text"
        self.dataset = dataset
        self._group = 2 if dataset.content == "preference" else 1
        super().__init__(
            {"data": dataset},
            batch_size=batch_size,
            sequence_length=sequence_length,
            seed=seed,
            start_sample=0,
            skip_list=skip_list,
        )
        lengths = np.diff(dataset.offsets)
        longest = int(lengths.max(initial=0))
        if longest > sequence_length:
            raise DataError(
                f"the longest example has {longest} tokens, a row only {sequence_length}",
                remedy=f"set batch.sequence_length={longest} or more, or prepare the dataset "
                f"with chat.max_tokens={sequence_length}",
            )
        if self._group == 2:
            self._order = np.arange(dataset.num_documents)
            self._starts = np.arange(dataset.num_documents + 1)
        else:
            self._order = Permutation(len(lengths), f"{seed}/packing")(np.arange(len(lengths)))
            self._starts = pack(lengths[self._order], sequence_length)
        self.num_rows = len(self._starts) - 1
        if batch_size % self._group:
            raise DataError(
                f"a batch of {batch_size} rows would part a pair", remedy="use an even batch size"
            )
        if self.num_rows < batch_size:
            raise DataError(
                f"the {dataset.split} split fills {self.num_rows} rows of {sequence_length} "
                f"tokens, one batch takes {batch_size}",
                remedy="lower the batch size or add examples",
            )

    def batch_at(self, first_sample: int) -> Batch:
        """Return the batch whose first row is sample `first_sample`; changes nothing."""
        shape = (self.batch_size, self.sequence_length)
        tokens = np.full(shape, self.dataset.index.eos_token_id, np.int64)
        targets = np.full(shape, IGNORED_TARGET, np.int64)
        positions = np.zeros(shape, np.int64)
        documents = np.zeros(shape, np.int32)
        for row, (_, members) in enumerate(self.locate(first_sample, self.batch_size)):
            at = 0
            for number, document in enumerate(members.tolist()):
                ids = self.dataset.document(document).astype(np.int64)
                begin = int(self.dataset.offsets[document])
                mask = self.dataset.target_mask(begin + 1, begin + len(ids))
                assert mask is not None
                end = at + len(ids)
                tokens[row, at:end] = ids
                if not self.is_hidden(document, first_sample + row):
                    targets[row, at : end - 1] = np.where(mask, ids[1:], IGNORED_TARGET)
                positions[row, at:end] = np.arange(len(ids))
                documents[row, at:end] = number
                at = end
            positions[row, at:] = np.arange(self.sequence_length - at)
            documents[row, at:] = len(members)
        return Batch(*map(torch.from_numpy, (tokens, targets, positions, documents)))

    def locate(self, first_sample: int, count: int) -> list[ExampleRow]:
        """Find what the samples [first_sample, first_sample + count) are."""
        found = []
        samples = np.arange(first_sample, first_sample + count, dtype=np.int64)
        for place in self.skip_list.places(samples).tolist():
            unit, within = divmod(place, self._group)
            epoch, rank = divmod(unit, self.num_rows // self._group)
            permutation = Permutation(self.num_rows // self._group, f"{self.seed}/{epoch}")
            row = self._group * int(permutation([rank])[0]) + within
            members = self._order[self._starts[row] : self._starts[row + 1]]
            found.append(ExampleRow(epoch, members))
        return found

    def is_hidden(self, document: int, sample: int) -> bool:
        """Tell whether a document's targets, or its pair's, are skipped at a sample."""
        since = self._hidden.get(document // self._group)
        return since is not None and since <= sample

    def _apply_skip_list(self) -> None:
        if any(
            part.first % self._group or part.count % self._group for part in self.skip_list.samples
        ):
            raise DataError(
                "the skip list cuts samples that would part a pair: 2j and 2j + 1 are one",
                remedy="let each range begin at an even sample and have an even count",
            )
        documents, since = self.skip_list.hidden(self.dataset)
        units = (documents // self._group).tolist()
        self._hidden: dict[int, int] = {}
        for unit, first in zip(units, since.tolist(), strict=True):
            self._hidden[unit] = min(first, self._hidden.get(unit, first))

    def _identity(self, next_sample: int) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "dataset_tokens": self.num_tokens,
            "skip_sha256": self.skip_list.digest(next_sample),
        }


def pack(lengths: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
    """Fill rows one after the other, each until the next item would not fit.

    Args:
        lengths: (N,) items in their order, each at most `capacity`.
        capacity: Of a row.

    Returns:
        (rows + 1,): row r holds items [starts[r], starts[r + 1]).
    """
    starts = [0]
    room = capacity
    for index, length in enumerate(lengths.tolist()):
        if length > room:
            starts.append(index)
            room = capacity
        room -= length
    return np.asarray([*starts, len(lengths)], np.int64)
