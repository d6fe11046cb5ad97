from __future__ import annotations

from pathlib import Path

import pytest

from minigpt.data.example_loader import ExampleLoader
from minigpt.data.explain import explain_step
from minigpt.data.loader import BatchLoader
from minigpt.data.mixture import Mixture, Stage
from minigpt.data.rows import IGNORED_TARGET
from minigpt.data.shards import TokenDataset
from minigpt.data.skip_list import SkipList
from minigpt.data.tokenizer import Tokenizer


def test_what_it_names_is_what_the_step_was_fed(three_datasets: dict[str, TokenDataset]) -> None:
    """Rebuild the batches of a step from the explanation alone."""
    plain = BatchLoader(
        three_datasets,
        batch_size=3,
        sequence_length=64,
        seed=1,
        packing="best-fit",
        mixture=Mixture([Stage(0, (2, 1, 1))]),
    )
    first = next(explain_step(plain, 5, micro_batches=2))
    skips = SkipList().with_document(
        plain.document_entry(f"{first.source}:{first.document}").replace(since=1)
    )
    plain.use_skip_list(skips.with_steps([2], samples_per_step=6))
    seen_skipped = 0
    tokenizer = Tokenizer.load(three_datasets["web"].tokenizer_dir)
    for step in (0, 4, 40):
        fed = list(explain_step(plain, step, micro_batches=2, characters=10))
        for micro_batch in range(2):
            batch = plain.batch_at((step * 2 + micro_batch) * 3)
            for row in range(3):
                parts = [f for f in fed if (f.micro_batch, f.row) == (micro_batch, row)]
                tokens: list[int] = []
                for part in parts:
                    document = three_datasets[part.source].document(part.document)
                    begin = int(three_datasets[part.source].offsets[part.document])
                    piece = document[part.start - begin : part.stop - begin].tolist()
                    targets = batch.targets[row, len(tokens) : len(tokens) + len(piece)]
                    assert part.skipped == bool((targets == IGNORED_TARGET).all())
                    seen_skipped += part.skipped
                    tokens += piece
                    assert part.tokens == len(piece) > 0
                    text = tokenizer.decode([t for t in piece if t != 256])
                    assert part.text == text[:10]
                assert batch.tokens[row, : len(tokens)].tolist() == tokens
                assert (batch.targets[row, len(tokens) :] == IGNORED_TARGET).all()
    assert seen_skipped


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_it_names_the_conversations_and_answers(
    example_datasets: dict[str, Path], kind: str
) -> None:
    """Rebuild the batches of a step of examples from the explanation alone."""
    dataset = TokenDataset.open(example_datasets[kind], "train")
    loader = ExampleLoader(dataset, batch_size=4, sequence_length=256, seed=3)
    skipped = next(explain_step(loader, 5, micro_batches=2)).document
    entry = loader.document_entry(f"data:{skipped}").replace(since=1)
    loader.use_skip_list(SkipList().with_document(entry))
    for step in (0, 5, 40):
        fed = list(explain_step(loader, step, micro_batches=2))
        assert {f.epoch for f in fed} <= {
            step * 8 // loader.num_rows,
            (step * 8 + 7) // loader.num_rows,
        }
        for first in (step * 8, step * 8 + 4):
            batch = loader.batch_at(first)
            for row in range(4):
                parts = [f for f in fed if f.sample == first + row]
                tokens = [t for f in parts for t in dataset.tokens(f.start, f.stop).tolist()]
                assert batch.tokens[row, : len(tokens)].tolist() == tokens
                at = 0
                for number, f in enumerate(parts):
                    assert (batch.documents[row, at : at + f.tokens] == number).all()
                    targets = batch.targets[row, at : at + f.tokens]
                    assert int((targets != IGNORED_TARGET).sum()) == f.targets
                    assert f.skipped == (f.targets == 0)
                    at += f.tokens
                if kind == "preference":
                    (only,) = parts
                    assert only.part == ("chosen", "rejected")[row % 2]
                    assert only.document % 2 == row % 2
                else:
                    assert {f.part for f in parts} == {"conversation"}
    again = [f for f in explain_step(loader, 5, micro_batches=2) if f.skipped]
    assert skipped in {f.document for f in again}
    assert len(again) == (2 if kind == "preference" else 1)  # of a pair both
