"""How a dataset is cut into rows of equal length: windows of the stream, or packed documents."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from minigpt.data.packing import Integers, PackingPlan
from minigpt.data.shards import TokenDataset

IGNORED_TARGET = -1
NO_DOCUMENT = -1


class RowTokens(NamedTuple):
    """Rows of tokens; all (rows, sequence_length) int64."""

    tokens: Integers
    targets: Integers
    """The token that follows each; IGNORED_TARGET in padding and where it is not to be said."""
    positions: Integers
    """Restart at 0 with each document and each row."""
    documents: Integers
    """The dataset's number of each token's document; NO_DOCUMENT in padding."""


class Segment(NamedTuple):
    """Tokens of a row that come from one document."""

    document: int
    start: int
    """Stream position of the first."""
    stop: int


class Rows(Protocol):
    """A dataset cut into rows, each a pure function of its number."""

    num_rows: int

    def read(self, rows: Integers) -> RowTokens:
        """Return the content of rows, (count,)."""
        ...

    def segments(self, row: int) -> list[Segment]:
        """Name the documents of a row, in the order in which they lie."""
        ...

    def starts(self, rows: Integers) -> Integers:
        """Return stream positions that reading these rows touches, at least one for each shard."""
        ...


class WindowRows:
    """Windows of the stream: row w covers positions [wT, wT + T), whatever documents lie there.

    Targets lie one further on, so every token but the last few (fewer than T) is one.
    """

    def __init__(self, dataset: TokenDataset, sequence_length: int) -> None:
        self._dataset = dataset
        self._length = sequence_length
        self.num_rows = max(0, (dataset.num_tokens - 1) // sequence_length)
        self._columns = np.arange(sequence_length, dtype=np.int64)

    def read(self, rows: Integers) -> RowTokens:
        starts = rows * self._length
        tokens, targets = (np.empty((len(rows), self._length), np.int64) for _ in range(2))
        for row, start in enumerate(starts.tolist()):
            tokens[row] = self._dataset.tokens(start, start + self._length)
            targets[row] = _targets(self._dataset, start + 1, start + self._length + 1)
        positions = starts[:, None] + self._columns
        documents = self._dataset.document_of(positions)
        begins = np.maximum(self._dataset.offsets[documents], starts[:, None])
        return RowTokens(tokens, targets, positions - begins, documents)

    def segments(self, row: int) -> list[Segment]:
        first, end = row * self._length, (row + 1) * self._length
        documents = range(
            int(self._dataset.document_of(first)), int(self._dataset.document_of(end - 1)) + 1
        )
        offsets = self._dataset.offsets
        return [
            Segment(i, max(first, int(offsets[i])), min(end, int(offsets[i + 1])))
            for i in documents
        ]

    def starts(self, rows: Integers) -> Integers:
        return np.concatenate([rows * self._length, (rows + 1) * self._length])


class PackedRows:
    """Rows of whole documents by a `PackingPlan`, padded at the end.

    A text's last token has end-of-text as its target, as in the stream.
    """

    def __init__(self, dataset: TokenDataset, sequence_length: int, plan: PackingPlan) -> None:
        self._dataset = dataset
        self._length = sequence_length
        self._plan = plan
        self.num_rows = plan.num_rows

    def read(self, rows: Integers) -> RowTokens:
        shape = (len(rows), self._length)
        eos = self._dataset.index.eos_token_id
        after_end = eos if self._dataset.content == "text" else IGNORED_TARGET
        filled = RowTokens(
            tokens=np.full(shape, eos, np.int64),
            targets=np.full(shape, IGNORED_TARGET, np.int64),
            positions=np.zeros(shape, np.int64),
            documents=np.full(shape, NO_DOCUMENT, np.int64),
        )
        for place, row in enumerate(rows.tolist()):
            column = 0
            for document, start, stop in self.segments(row):
                end = column + stop - start
                filled.tokens[place, column:end] = self._dataset.tokens(start, stop)
                filled.targets[place, column : end - 1] = _targets(self._dataset, start + 1, stop)
                cut = stop < self._dataset.offsets[document + 1]
                filled.targets[place, end - 1] = (
                    _targets(self._dataset, stop, stop + 1)[0] if cut else after_end
                )
                filled.positions[place, column:end] = np.arange(stop - start)
                filled.documents[place, column:end] = document
                column = end
            filled.positions[place, column:] = np.arange(self._length - column)
        return filled

    def segments(self, row: int) -> list[Segment]:
        starts, lengths = self._plan.pieces(row)
        documents = self._dataset.document_of(starts)
        pieces = zip(documents.tolist(), starts.tolist(), lengths.tolist(), strict=True)
        return [Segment(document, start, start + length) for document, start, length in pieces]

    def starts(self, rows: Integers) -> Integers:
        pieces = [self._plan.pieces(row) for row in rows.tolist()]
        return np.concatenate([np.concatenate([starts, starts + size]) for starts, size in pieces])


def _targets(dataset: TokenDataset, start: int, stop: int) -> Integers:
    """Return tokens [start, stop) of the stream as targets, IGNORED_TARGET where they are none."""
    tokens = dataset.tokens(start, stop).astype(np.int64)
    mask = dataset.target_mask(start, stop)
    return tokens if mask is None else np.where(mask, tokens, IGNORED_TARGET)
