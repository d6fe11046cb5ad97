"""What a run must never see again: documents, and samples of its data order.

Skipped samples are cut out of the order and those behind them move up, so that the position of
a sample stays a pure function: nothing before a skipped range changes when it is added. A
skipped document keeps its place, but none of its tokens is a target; best-fit packing leaves it
out altogether where it was listed from the start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from minigpt.core.config import Config, from_mapping
from minigpt.core.errors import ConfigError, DataError
from minigpt.core.storage import storage_errors, write_atomic

if TYPE_CHECKING:
    from minigpt.data.shards import TokenDataset

SKIP_FILE = "skip.json"
"""Its name in a run directory."""


class SkippedDocument(Config):
    """A document, by its place in a dataset or by its content wherever it is."""

    dataset: str | None = None
    """Fingerprint of the dataset (`TokenDataset.fingerprint`)."""
    document: int | None = Field(default=None, ge=0)
    """Its number in that dataset's training split."""
    sha256: str | None = None
    """Hash of its tokens (`document_sha256`)."""
    tokens: int | None = Field(default=None, ge=1)
    """How many tokens the hashed document has: only documents of that length are hashed."""
    since: int = Field(default=0, ge=0)
    """The first sample from which it is skipped; 0 is the whole run."""
    reason: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        by_place = self.dataset is not None and self.document is not None
        by_content = self.sha256 is not None and self.tokens is not None
        if by_place == by_content:
            raise ValueError("a document is given by dataset and document, or by sha256 and tokens")
        return self


class SkippedSamples(Config):
    """A range of the order as it would be without any skipping."""

    first: int = Field(ge=0)
    count: int = Field(ge=1)
    reason: str = ""


class SkipList(Config):
    """Documents and samples that a run leaves out; immutable, `add_steps` makes a new one."""

    format_version: int = Field(default=1, ge=1, le=1)
    """Of the file."""
    documents: tuple[SkippedDocument, ...] = ()
    """Documents whose tokens are no targets."""
    samples: tuple[SkippedSamples, ...] = ()
    """Ranges cut out of the sample order, ascending and disjoint."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        end = 0
        for skipped in self.samples:
            if skipped.first < end:
                raise ValueError(f"samples: {skipped.first} lies before {end}; ranges must ascend")
            end = skipped.first + skipped.count
        return self

    @classmethod
    def read(cls, path: Path) -> SkipList:
        """Read a file; an empty list where there is none.

        Raises:
            DataError: The file is malformed.
        """
        if not path.exists():
            return cls()
        with storage_errors(f"read {path}"):
            content = path.read_bytes()
        try:
            return from_mapping(cls, json.loads(content), origin=str(path))
        except (ValueError, TypeError, ConfigError) as error:
            raise DataError(
                f"{path} is no skip list: {error}", remedy="mend it or restore it from a copy"
            ) from None

    @classmethod
    def of_run(cls, run_dir: Path, recipe: SkipList) -> SkipList:
        """Return what the run in a directory leaves out: its own list, at first its recipe's."""
        path = run_dir / SKIP_FILE
        return cls.read(path) if path.exists() else recipe

    def write(self, path: Path) -> None:
        """Replace the file at once or not at all.

        Raises:
            StorageError: It could not be written; the old one is as it was.
        """
        text = json.dumps(self.model_dump(mode="json", exclude_defaults=True), indent=1)
        write_atomic(path, (text + "\n").encode())

    @classmethod
    def add_steps(
        cls, path: Path, steps: Iterable[int], *, samples_per_step: int, reason: str = ""
    ) -> SkipList:
        """Skip the data that fed `steps` under the list in the file, and write the file.

        The file holds the whole list: what the recipe listed was copied there at the start. The
        steps before the first of them keep their samples. Roll the run back to one of those,
        give the loader the returned list (`BatchLoader.use_skip_list`) and go on.

        Args:
            path: The run's list, `<run>/skip.json`; made where it is not there.
            steps: Steps counted from 0.
            samples_per_step: Rows in a global batch.
            reason: For the record.

        Raises:
            StorageError: The file could not be written; nothing has changed.
        """
        changed = cls.read(path).with_steps(steps, samples_per_step=samples_per_step, reason=reason)
        changed.write(path)
        return changed

    def with_steps(
        self, steps: Iterable[int], *, samples_per_step: int, reason: str = ""
    ) -> SkipList:
        """Return a list that also skips what feeds `steps` under this one."""
        samples = np.concatenate(
            [
                np.arange(step * samples_per_step, (step + 1) * samples_per_step)
                for step in sorted(set(steps))
            ]
            or [np.empty(0, np.int64)]
        )
        places = self.places(samples)
        ends = np.flatnonzero(np.diff(places) != 1) + 1
        added = [
            SkippedSamples(first=int(run[0]), count=len(run), reason=reason)
            for run in np.split(places, ends)
            if len(run)
        ]
        return self.replace(samples=tuple(sorted([*self.samples, *added], key=lambda s: s.first)))

    @property
    def num_samples(self) -> int:
        """How many samples are cut out of the order."""
        return sum(skipped.count for skipped in self.samples)

    def with_document(self, document: SkippedDocument) -> SkipList:
        """Return a list that also skips a document."""
        return self.replace(documents=(*self.documents, document))

    def places(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return where samples of the run lie in the order without skipping, same shape."""
        if not self.samples:
            return samples
        firsts, counts = self._ranges()
        skipped: npt.NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts)])
        # A range begins, for those that do not see it, at the sample that follows it.
        passed = np.searchsorted(firsts - skipped[:-1], samples, side="right")
        return samples + np.asarray(skipped[passed])

    def digest(self, next_sample: int) -> str:
        """Hash what is skipped before the run's sample `next_sample`; "" where nothing is.

        Entries that take effect later don't count: a run that stands there may add them.
        """
        firsts, counts = self._ranges()
        begins = firsts - (np.cumsum(counts) - counts)
        ranges = [
            [int(f), int(c)] for f, c in zip(firsts[begins < next_sample], counts, strict=False)
        ]
        documents = sorted(
            json.dumps(document.model_dump(exclude={"reason"}), sort_keys=True)
            for document in self.documents
            if document.since == 0 or document.since < next_sample
        )
        if not ranges and not documents:
            return ""
        content = json.dumps([_merged(ranges), documents])
        return hashlib.sha256(content.encode()).hexdigest()

    def hidden(self, dataset: TokenDataset) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the skipped documents of a dataset, ascending, and since when each is."""
        found: dict[int, int] = {}
        for entry in self.documents:
            for document in _find(entry, dataset):
                found[document] = min(entry.since, found.get(document, entry.since))
        documents = np.array(sorted(found), np.int64)
        return documents, np.array([found[int(document)] for document in documents], np.int64)

    def _ranges(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        pairs = np.array([(s.first, s.count) for s in self.samples], np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]


def document_sha256(tokens: npt.NDArray[np.integer]) -> str:
    """Hash a document's tokens, the leading end-of-text token included, as 32-bit integers."""
    return hashlib.sha256(np.asarray(tokens).astype("<u4").tobytes()).hexdigest()


def _merged(ranges: list[list[int]]) -> list[list[int]]:
    """Join ranges that touch: how the same samples came to be skipped makes no difference."""
    merged: list[list[int]] = []
    for first, count in ranges:
        if merged and sum(merged[-1]) == first:
            merged[-1][1] += count
        else:
            merged.append([first, count])
    return merged


def _find(entry: SkippedDocument, dataset: TokenDataset) -> list[int]:
    if entry.document is not None:
        if entry.dataset != dataset.fingerprint:
            return []
        if entry.document >= dataset.num_documents:
            raise DataError(
                f"the skip list names document {entry.document} of {dataset.directory}, "
                f"which has {dataset.num_documents}",
                remedy="correct the skip list",
            )
        return [entry.document]
    same_length = np.flatnonzero(np.diff(dataset.offsets) == entry.tokens)
    return [
        int(i) for i in same_length if document_sha256(dataset.document(int(i))) == entry.sha256
    ]
