"""Batches in an order that is a pure function of the seed, so that resuming costs nothing.

Sample k of a run, whatever its world size and batch size:

1. `SkipList.places` moves k past the ranges of the order that are skipped.
2. `Mixture.place` says which source the sample comes from, and that it is its q-th.
3. The source's shuffle of epoch q // num_rows, a keyed permutation, says which of its rows.
4. The row is a window of the token stream or a packed row (`minigpt.data.rows`).

None of the four keeps any state, and none costs more at a later step.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from minigpt.core.errors import DataError
from minigpt.data.config import Packing
from minigpt.data.mixture import Mixture, Stage
from minigpt.data.packing import Integers, open_plan
from minigpt.data.rows import PackedRows, Rows, RowTokens, WindowRows
from minigpt.data.shards import TokenDataset
from minigpt.data.skip_list import SkipList, SkippedDocument, document_sha256
from minigpt.data.source import Source


@dataclass(frozen=True)
class Batch:
    """Rows of tokens; every tensor is (batch_size, sequence_length)."""

    tokens: torch.Tensor
    """int64 token ids."""
    targets: torch.Tensor
    """int64: the token that follows each; -1 where there is nothing to predict: in padding, in
    skipped documents, and where a conversation's target is not the assistant's."""
    positions: torch.Tensor
    """int64: restart at 0 with each document and each row."""
    documents: torch.Tensor
    """int32: from 0 in each row; equal numbers are the same document."""


class Samples(NamedTuple):
    """Where samples of the order come from; arrays of (count,)."""

    sources: Integers
    """Number of the source in `BatchLoader.sources`."""
    epochs: Integers
    """How often the source has been used up before."""
    rows: Integers
    """The source's row."""


class SampleLoader(ABC):
    """Batches of a run's order of samples, whose content is a pure function of the position.

    Attributes:
        batch_size: Rows a batch, B.
        sequence_length: Tokens a row, T.
        seed: Chooses the order.
        next_sample: Position in the run's order of the next batch's first row.
        skip_list: What is left out.
        datasets: One split each, by name.
    """

    def __init__(
        self,
        datasets: Mapping[str, TokenDataset],
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        start_sample: int,
        skip_list: SkipList | None,
    ) -> None:
        assert batch_size >= 1 and sequence_length >= 1 and start_sample >= 0
        self.datasets = datasets
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.seed = seed
        self.next_sample = start_sample
        self.skip_list = skip_list or SkipList()
        self._apply_skip_list()

    @abstractmethod
    def batch_at(self, first_sample: int) -> Batch:
        """Return the batch whose first row is sample `first_sample`; changes nothing."""

    @abstractmethod
    def _apply_skip_list(self) -> None:
        """Derive what depends on `skip_list`."""

    @abstractmethod
    def _identity(self, next_sample: int) -> dict[str, Any]:
        """Return what must be equal for a cursor to mean the same samples."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all datasets."""
        return sum(dataset.num_tokens for dataset in self.datasets.values())

    def next_batch(self) -> Batch:
        """Return the next rows and move on."""
        first = self.next_sample
        self.next_sample += self.batch_size
        return self.batch_at(first)

    def state(self) -> dict[str, Any]:
        """Return the cursor, and what must be equal for it to mean the same samples."""
        return {"next_sample": self.next_sample, **self._identity(self.next_sample)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state()`; the batch size may differ, and skips may have been added.

        Raises:
            DataError: The state is of other datasets, another seed, sequence length, packing or
                mixture, or something is skipped now that came before.
        """
        next_sample = int(state["next_sample"])
        for name, value in self._identity(next_sample).items():
            if state.get(name) != value:
                raise DataError(
                    f"can't resume the data order: {name} was {state.get(name)}, now is {value}",
                    remedy="resume with the values the run began with, or start a new run",
                )
        self.next_sample = next_sample

    def use_skip_list(self, skip_list: SkipList) -> None:
        """Skip what a longer list says, from the samples on at which its new entries begin.

        Raises:
            DataError: The list changes what came before the next sample.
        """
        first = self.next_sample
        if first and skip_list.digest(first) != self.skip_list.digest(first):
            raise DataError(
                f"the skip list changes what comes before sample {first}",
                remedy="roll the run back to before that",
            )
        self.skip_list = skip_list
        self._apply_skip_list()

    def document_entry(self, name: str, *, by_content: bool = False) -> SkippedDocument:
        """Return what puts a document on a skip list.

        Args:
            name: `SOURCE:NUMBER`, or a number alone where there is one source.
            by_content: Whether to find the document by the hash of its tokens, in any dataset.

        Raises:
            DataError: There is no such document.
        """
        source, _, number = name.rpartition(":")
        source = source or (next(iter(self.datasets)) if len(self.datasets) == 1 else "")
        dataset = self.datasets.get(source)
        if dataset is None or not number.isdecimal() or int(number) >= dataset.num_documents:
            known = ", ".join(f"{n}:0-{d.num_documents - 1}" for n, d in self.datasets.items())
            raise DataError(f"no document {name!r} here, only {known}")
        if not by_content:
            return SkippedDocument(dataset=dataset.fingerprint, document=int(number))
        tokens = dataset.document(int(number))
        return SkippedDocument(sha256=document_sha256(tokens), tokens=len(tokens))


class BatchLoader(SampleLoader):
    """Deals rows of one or several datasets out, each shuffled anew in each of its epochs.

    Example:
        loader = BatchLoader(dataset, batch_size=16, sequence_length=256, seed=0)
        batch = loader.next_batch()
        later = BatchLoader(dataset, batch_size=16, sequence_length=256, seed=0)
        later.load_state(loader.state())
    """

    def __init__(
        self,
        dataset: TokenDataset | Mapping[str, TokenDataset],
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        start_sample: int = 0,
        packing: Packing = "windows",
        mixture: Mixture | None = None,
        skip_list: SkipList | None = None,
    ) -> None:
        """Plan the rows; reads no tokens.

        Args:
            dataset: One split; or several by name, all of the same tokenizer.
            batch_size: Rows a batch, B.
            sequence_length: Tokens a row, T.
            seed: Chooses the order.
            start_sample: Position in the run's order of the next batch's first row.
            packing: How documents become rows.
            mixture: Deals samples out to the datasets; by default all are given equally often.
            skip_list: What is left out.

        Raises:
            DataError: A dataset has no row, all have fewer than one batch, or they are of
                different tokenizers.
        """
        named = {"data": dataset} if isinstance(dataset, TokenDataset) else dict(dataset)
        self.packing = packing
        self.mixture = mixture or Mixture([Stage(0, (1,) * len(named))])
        check_same_tokenizer(named)
        super().__init__(
            named,
            batch_size=batch_size,
            sequence_length=sequence_length,
            seed=seed,
            start_sample=start_sample,
            skip_list=skip_list,
        )
        self._check_size()

    @property
    def num_rows(self) -> int:
        """Rows of all sources."""
        return sum(source.rows.num_rows for source in self.sources)

    def batch_at(self, first_sample: int) -> Batch:
        """Return the batch whose first row is sample `first_sample`; changes nothing."""
        count = self.batch_size
        where = self.locate(first_sample, count)
        parts = []
        for number, source in enumerate(self.sources):
            here = np.flatnonzero(where.sources == number)
            if len(here):
                read = source.rows.read(where.rows[here])
                source.hide(read, first_sample + here)
                parts.append((here, read))
        self._prefetch(first_sample + count)
        if len(parts) == 1:
            return _to_batch(parts[0][1])
        order = np.argsort(np.concatenate([here for here, _ in parts]))
        joined = (
            np.concatenate(arrays)[order] for arrays in zip(*(r for _, r in parts), strict=True)
        )
        return _to_batch(RowTokens(*joined))

    def locate(self, first_sample: int, count: int) -> Samples:
        """Return where samples [first_sample, first_sample + count) of the run come from."""
        samples = np.arange(first_sample, first_sample + count, dtype=np.int64)
        sources, indices = self.mixture.place(self.skip_list.places(samples))
        epochs, rows = np.empty_like(samples), np.empty_like(samples)
        for number in np.unique(sources):
            here = sources == number
            epochs[here], rows[here] = self.sources[number].shuffled(indices[here])
        return Samples(sources, epochs, rows)

    def _identity(self, next_sample: int) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "packing": self.packing,
            "dataset_tokens": self.num_tokens,
            "mixture_sha256": self._mixture_digest,
            "skip_sha256": self.skip_list.digest(next_sample),
        }

    @cached_property
    def _mixture_digest(self) -> str:
        if len(self.sources) == 1:
            return ""
        sources = [(source.name, source.dataset.fingerprint) for source in self.sources]
        content = json.dumps([sources, self.mixture.stages])
        return hashlib.sha256(content.encode()).hexdigest()

    def _apply_skip_list(self) -> None:
        self.sources = []
        for name, dataset in self.datasets.items():
            hidden, since = self.skip_list.hidden(dataset)
            rows = self._cut(dataset, left_out=hidden[since == 0])
            key = str(self.seed) if len(self.datasets) == 1 else f"{self.seed}/{name}"
            self.sources.append(Source(name, dataset, rows, key, hidden, since))

    def _cut(self, dataset: TokenDataset, left_out: Integers) -> Rows:
        length = self.sequence_length
        if self.packing == "windows":
            return WindowRows(dataset, length)
        plan = open_plan(dataset, sequence_length=length, seed=self.seed, left_out=left_out)
        return PackedRows(dataset, length, plan)

    def _prefetch(self, next_sample: int) -> None:
        """Have the shards of the batch after this one fetched, where they are remote."""
        if not any(source.dataset.is_remote for source in self.sources):
            return
        where = self.locate(next_sample, self.batch_size)
        for number, source in enumerate(self.sources):
            rows = where.rows[where.sources == number]
            if len(rows):
                source.dataset.prefetch(source.rows.starts(rows))

    def _check_size(self) -> None:
        needed = self.batch_size * self.sequence_length + 1
        for source in self.sources:
            if source.rows.num_rows == 0 or self.num_rows < self.batch_size:
                raise DataError(
                    f"the {source.dataset.split} split has {source.dataset.num_tokens:,} tokens, "
                    f"but one batch of {self.batch_size} x {self.sequence_length} needs "
                    f"{needed:,}",
                    remedy="lower the batch size or the sequence length, or add text",
                )


def check_same_tokenizer(datasets: Mapping[str, TokenDataset]) -> None:
    """Refuse datasets whose tokens mean different things.

    Raises:
        DataError: Naming two whose tokenizers differ.
    """
    first, *others = datasets
    for name in others:
        if datasets[name].tokenizer_fingerprint != datasets[first].tokenizer_fingerprint:
            raise DataError(
                f"{name} ({datasets[name].directory}) has another tokenizer than {first} "
                f"({datasets[first].directory}), and their tokens can't be mixed",
                remedy="prepare it with --set tokenizer.kind=file and the other's tokenizer",
            )


def _to_batch(read: RowTokens) -> Batch:
    numbers = np.zeros(read.documents.shape, np.int32)
    np.cumsum(read.documents[:, 1:] != read.documents[:, :-1], axis=1, out=numbers[:, 1:])
    return Batch(
        tokens=torch.from_numpy(read.tokens),
        targets=torch.from_numpy(read.targets),
        positions=torch.from_numpy(read.positions),
        documents=torch.from_numpy(numbers),
    )
