"""The datasets that a run trains on, opened: one, or the sources of a mixture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from minigpt.core.artifact import Artifact, open_artifact
from minigpt.core.errors import DataError
from minigpt.core.storage import is_remote
from minigpt.data.config import Content, DataConfig, MixtureConfig, Packing
from minigpt.data.example_loader import ExampleLoader
from minigpt.data.loader import BatchLoader, SampleLoader, check_same_tokenizer
from minigpt.data.mixture import build_mixture
from minigpt.data.remote import open_remote
from minigpt.data.shards import TokenDataset
from minigpt.data.skip_list import SkipList

SINGLE = "data"
"""The name of a dataset that is no mixture's."""


class Documents(Protocol):
    """Held-out documents by number; those of examples are one `TokenDataset`'s."""

    num_documents: int

    @property
    def content(self) -> Content:
        """What a document is."""
        ...

    def document(self, i: int) -> npt.NDArray[np.integer]:
        """Return document `i`'s tokens, the leading end-of-text token included."""
        ...


@dataclass(frozen=True)
class TrainingData:
    """What a run reads."""

    artifacts: Mapping[str, Artifact]
    """By name of the source."""
    train: Mapping[str, TokenDataset]
    validation: Documents
    """The held-out documents of all sources."""
    mixture: MixtureConfig | None

    @property
    def num_tokens(self) -> int:
        """Training tokens of all sources."""
        return sum(dataset.num_tokens for dataset in self.train.values())

    @property
    def content(self) -> Content:
        """What a document is; of a mixture a text."""
        return next(iter(self.train.values())).content

    @property
    def num_examples(self) -> int | None:
        """Documents to train on where they are kept whole: conversations, answers; else None."""
        if self.content == "text":
            return None
        return sum(dataset.num_documents for dataset in self.train.values())

    @property
    def longest_example(self) -> int:
        """Tokens of the longest conversation or answer, of either split; 0 for texts."""
        if self.content == "text":
            return 0
        splits = [*self.train.values(), self.validation]
        return max(
            int(np.diff(split.offsets).max(initial=0))
            for split in splits
            if isinstance(split, TokenDataset)
        )

    @property
    def tokenizer_dir(self) -> Path:
        """The directory of the tokenizer that made the tokens of all sources."""
        return next(iter(self.train.values())).tokenizer_dir

    @property
    def uri(self) -> str:
        """Where the datasets are."""
        return ", ".join(artifact.uri for artifact in self.artifacts.values())

    @property
    def fingerprint(self) -> str:
        """A hash of the datasets' files: equal for ones that were prepared again alike."""
        prints = [dataset.fingerprint for dataset in self.train.values()]
        return (
            prints[0] if len(prints) == 1 else hashlib.sha256("".join(prints).encode()).hexdigest()
        )

    def loader(
        self,
        *,
        batch_size: int,
        sequence_length: int,
        samples_per_step: int,
        seed: int,
        packing: Packing = "windows",
        skip_list: SkipList | None = None,
    ) -> SampleLoader:
        """Return the loader of a run's global sample order, by what the documents are.

        Args:
            batch_size: Rows a micro-batch.
            sequence_length: Tokens a row.
            samples_per_step: Rows a global batch, by which schedules in steps count.
            seed: Chooses the order.
            packing: How texts become rows; conversations and answers are always kept whole.
            skip_list: What is left out.

        Raises:
            DataError: A dataset is too small, or an example too long.
            ConfigError: The mixture's weights are all zero somewhere.
        """
        if self.content != "text":
            (dataset,) = self.train.values()
            return ExampleLoader(
                dataset,
                batch_size=batch_size,
                sequence_length=sequence_length,
                seed=seed,
                skip_list=skip_list,
            )
        mixture = None
        if self.mixture is not None:
            mixture = build_mixture(
                self.mixture, samples_per_step=samples_per_step, sequence_length=sequence_length
            )
        return BatchLoader(
            self.train,
            batch_size=batch_size,
            sequence_length=sequence_length,
            seed=seed,
            packing=packing,
            mixture=mixture,
            skip_list=skip_list,
        )


def open_dataset_artifact(uri: str) -> Artifact:
    """Open a dataset artifact: a local one verified, a remote one without fetching its shards.

    Raises:
        ArtifactError: No dataset there, or it is damaged.
        StorageError: The URL can't be read.
    """
    return open_remote(uri) if is_remote(uri) else open_artifact(uri, kind="dataset")


def open_training_data(data: str | DataConfig | MixtureConfig, first: Artifact) -> TrainingData:
    """Open what a recipe's `data` names.

    Args:
        data: The recipe's key.
        first: The dataset it names, opened; of a mixture the first source's.

    Raises:
        DataError: A dataset has no training documents, the tokenizers differ, or a mixture's
            documents are no texts.
        ArtifactError: A source of the mixture is missing or damaged.
    """
    mixture = data if isinstance(data, MixtureConfig) else None
    artifacts = {SINGLE: first}
    if mixture is not None:
        name, *_ = (source.name for source in mixture.mixture)
        others = {s.name: open_dataset_artifact(s.dataset) for s in mixture.mixture[1:]}
        artifacts = {name: first, **others}
    train = {name: TokenDataset.open(found.path, "train") for name, found in artifacts.items()}
    for name, dataset in train.items():
        if dataset.num_documents == 0:
            raise DataError(
                f"{artifacts[name].uri} has no training documents",
                remedy="prepare the dataset from more text",
            )
        if mixture is not None and dataset.content != "text":
            raise DataError(
                f"{name} ({artifacts[name].uri}) is a dataset of {dataset.content}, but only texts "
                "can be mixed: rows of examples depend on all that are packed together",
                remedy="prepare the examples of all sources as one dataset",
            )
    check_same_tokenizer(train)
    held_out = [TokenDataset.open(found.path, "val") for found in artifacts.values()]
    validation = held_out[0] if len(held_out) == 1 else _Joined(held_out)
    return TrainingData(artifacts, train, validation, mixture)


class _Joined:
    """Several splits' texts, numbered on from one to the next."""

    content: Content = "text"

    def __init__(self, datasets: Sequence[TokenDataset]) -> None:
        self._datasets = datasets
        self._ends = np.cumsum([dataset.num_documents for dataset in datasets])
        self.num_documents = int(self._ends[-1])

    def document(self, i: int) -> npt.NDArray[np.integer]:
        number = int(np.searchsorted(self._ends, i, side="right"))
        dataset = self._datasets[number]
        return dataset.document(i - int(self._ends[number]) + dataset.num_documents)
