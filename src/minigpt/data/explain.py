"""Which documents, conversations or answers fed a training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from minigpt.data.example_loader import ExampleLoader
from minigpt.data.loader import BatchLoader, SampleLoader
from minigpt.data.tokenizer import Tokenizer

_SHOWN_TOKENS = 40

Part = Literal["text", "conversation", "chosen", "rejected"]


class Fed(NamedTuple):
    """Tokens of one document, conversation or answer in one row of a step."""

    micro_batch: int
    """Number within the step, from 0."""
    row: int
    """Number within the micro-batch, from 0."""
    sample: int
    """Position in the run's order of samples."""
    source: str
    """Name of the dataset."""
    epoch: int
    """How often the run had used up that dataset before."""
    document: int
    """Its number in the dataset's training split."""
    part: Part
    """What the document is; a pair's chosen and rejected answers are numbers 2i and 2i + 1."""
    start: int
    """Position in the dataset's token stream of the first token."""
    stop: int
    tokens: int
    targets: int
    """How many tokens the step learned to predict: of a conversation those of the assistant."""
    skipped: bool
    """Whether the document is on the skip list, so that none of the tokens is a target."""
    text: str
    """The first characters of what the row holds of it."""


def explain_step(
    loader: SampleLoader, step: int, *, micro_batches: int, characters: int = 80
) -> Iterator[Fed]:
    """Yield what a step was fed with, micro-batch by micro-batch and row by row.

    Args:
        loader: The run's.
        step: The optimizer step, from 0.
        micro_batches: Micro-batches of a global batch.
        characters: How much of each text to give.
    """
    tokenizer = Tokenizer.load(next(iter(loader.datasets.values())).tokenizer_dir)
    size = loader.batch_size
    for micro_batch in range(micro_batches):
        first = (step * micro_batches + micro_batch) * size
        for row, piece in _pieces(loader, first):
            dataset = loader.datasets[piece.source]
            shown = dataset.tokens(piece.start, min(piece.stop, piece.start + _SHOWN_TOKENS))
            text = tokenizer.decode([t for t in shown.tolist() if t != dataset.index.eos_token_id])
            yield Fed(
                micro_batch=micro_batch,
                row=row,
                sample=first + row,
                **piece._asdict(),
                tokens=piece.stop - piece.start,
                text=text[:characters],
            )


class _Piece(NamedTuple):
    """The fields of `Fed` that only the loader knows."""

    source: str
    epoch: int
    document: int
    part: Part
    start: int
    stop: int
    targets: int
    skipped: bool


def _pieces(loader: SampleLoader, first: int) -> Iterator[tuple[int, _Piece]]:
    """Yield the rows of the batch at a sample, and what they hold."""
    if isinstance(loader, ExampleLoader):
        yield from _examples(loader, first)
    else:
        assert isinstance(loader, BatchLoader)
        yield from _texts(loader, first)


def _texts(loader: BatchLoader, first: int) -> Iterator[tuple[int, _Piece]]:
    where = loader.locate(first, loader.batch_size)
    for row in range(loader.batch_size):
        source, epoch = loader.sources[where.sources[row]], int(where.epochs[row])
        hidden = source.hidden_at(first + row)
        for document, start, stop in source.rows.segments(int(where.rows[row])):
            skipped = document in hidden
            targets = 0 if skipped else stop - start
            yield row, _Piece(source.name, epoch, document, "text", start, stop, targets, skipped)


def _examples(loader: ExampleLoader, first: int) -> Iterator[tuple[int, _Piece]]:
    (name,) = loader.datasets
    dataset = loader.dataset
    for row, (epoch, documents) in enumerate(loader.locate(first, loader.batch_size)):
        for document in documents.tolist():
            start, stop = dataset.offsets[document : document + 2].tolist()
            part: Part = "conversation"
            if dataset.content == "preference":
                part = "rejected" if document % 2 else "chosen"
            mask = dataset.target_mask(start + 1, stop)
            assert mask is not None
            skipped = loader.is_hidden(document, first + row)
            targets = 0 if skipped else int(mask.sum())
            yield row, _Piece(name, epoch, document, part, start, stop, targets, skipped)
