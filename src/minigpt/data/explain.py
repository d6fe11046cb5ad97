"""Which documents fed a training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from minigpt.core.errors import DataError
from minigpt.data.loader import BatchLoader, SampleLoader
from minigpt.data.tokenizer import Tokenizer

_SHOWN_TOKENS = 40


class Fed(NamedTuple):
    """Tokens of one document in one row of a step."""

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
    start: int
    """Position in the dataset's token stream of the first token."""
    stop: int
    tokens: int
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

    Raises:
        DataError: The run's data are no texts.
    """
    if not isinstance(loader, BatchLoader):
        raise DataError(
            "only a run on texts can be explained: rows of whole examples are not listed yet",
            remedy="use `minigpt data inspect` to look at the examples",
        )
    tokenizer = Tokenizer.load(loader.sources[0].dataset.tokenizer_dir)
    size = loader.batch_size
    for micro_batch in range(micro_batches):
        first = (step * micro_batches + micro_batch) * size
        where = loader.locate(first, size)
        for row in range(size):
            source = loader.sources[where.sources[row]]
            hidden = source.hidden_at(first + row)
            for document, start, stop in source.rows.segments(int(where.rows[row])):
                shown = source.dataset.tokens(start, min(stop, start + _SHOWN_TOKENS))
                text = tokenizer.decode(
                    [t for t in shown.tolist() if t != source.dataset.index.eos_token_id]
                )
                yield Fed(
                    micro_batch=micro_batch,
                    row=row,
                    sample=first + row,
                    source=source.name,
                    epoch=int(where.epochs[row]),
                    document=document,
                    start=start,
                    stop=stop,
                    tokens=stop - start,
                    skipped=document in hidden,
                    text=text[:characters],
                )
