"""Who does the part of preparing a dataset that concerns one document at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from minigpt.data.clean import Screened, screen
from minigpt.data.config import CleanConfig, SourceConfig
from minigpt.data.sources import read_documents
from minigpt.data.spool import SpooledDocument
from minigpt.data.tokenizer import Tokenizer


class Work(Protocol):
    """Reads, screens and tokenizes documents; results come in the order of the source.

    Every implementation gives the same results: which one it was leaves no trace in a dataset.
    """

    def screened(self, source: SourceConfig, clean: CleanConfig) -> Iterator[Screened]:
        """Yield every document of a source, repaired and judged.

        Raises:
            DataError: The source is missing, or a file of it is malformed.
            StorageError: A file can't be read.
        """
        ...

    def encoded(
        self, tokenizer: Tokenizer, batches: Iterator[list[SpooledDocument]]
    ) -> Iterator[tuple[SpooledDocument, Sequence[int]]]:
        """Yield each document with its text's tokens."""
        ...


class LocalWork:
    """Does it in this process; tokenizing runs on all its threads."""

    def screened(self, source: SourceConfig, clean: CleanConfig) -> Iterator[Screened]:
        for document in read_documents(source, max_document_bytes=clean.max_document_bytes):
            yield screen(clean, document)

    def encoded(
        self, tokenizer: Tokenizer, batches: Iterator[list[SpooledDocument]]
    ) -> Iterator[tuple[SpooledDocument, Sequence[int]]]:
        for batch in batches:
            texts = [document.text.decode() for document in batch]
            yield from zip(batch, tokenizer.encode_batch(texts), strict=True)
