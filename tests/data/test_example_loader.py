from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.core.errors import DataError
from minigpt.data.example_loader import ExampleLoader, pack
from minigpt.data.loader import BatchLoader
from minigpt.data.shards import TokenDataset
from minigpt.data.skip_list import SkipList


@pytest.fixture(scope="module")
def datasets(example_datasets: dict[str, Path]) -> dict[str, TokenDataset]:
    return {kind: TokenDataset.open(path, "train") for kind, path in example_datasets.items()}


def loader(
    dataset: TokenDataset, *, rows: int = 4, length: int = 256, seed: int = 0
) -> ExampleLoader:
    return ExampleLoader(dataset, batch_size=rows, sequence_length=length, seed=seed)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200),
    slack=st.integers(0, 100),
)
def test_rows_hold_consecutive_items_that_fit(lengths: list[int], slack: int) -> None:
    capacity = max(lengths) + slack
    starts = pack(np.asarray(lengths), capacity)
    assert starts[0] == 0 and starts[-1] == len(lengths) and (np.diff(starts) > 0).all()
    totals = [sum(lengths[a:b]) for a, b in itertools.pairwise(starts)]
    assert max(totals) <= capacity
    followers = [lengths[at] for at in starts[1:-1].tolist()]
    assert all(a + b > capacity for a, b in zip(totals[:-1], followers, strict=True))


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(["chat", "preference"]), seed=st.integers(0, 999), epoch=st.integers(0, 3)
)
def test_each_epoch_holds_each_example_once(
    datasets: dict[str, TokenDataset], kind: str, seed: int, epoch: int
) -> None:
    made = loader(datasets[kind], seed=seed)
    located = made.locate(epoch * made.num_rows, made.num_rows)
    assert {row.epoch for row in located} == {epoch}
    rows = [row.documents for row in located]
    assert sorted(np.concatenate(rows).tolist()) == list(range(datasets[kind].num_documents))
    if kind == "preference":
        pairs = np.concatenate(rows).reshape(-1, 2)
        assert (pairs[:, 0] % 2 == 0).all() and (pairs[:, 1] == pairs[:, 0] + 1).all()


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_a_row_holds_whole_examples_and_only_their_targets(
    datasets: dict[str, TokenDataset], kind: str
) -> None:
    dataset = datasets[kind]
    made = loader(dataset)
    batch = made.batch_at(8)
    for row, members in enumerate(row.documents for row in made.locate(8, 4)):
        assert len(members) == 1 or kind == "chat"
        for number, document in enumerate(members.tolist()):
            at = (batch.documents[row] == number).nonzero()[:, 0]
            ids = torch.tensor(dataset.document(document).astype(np.int64))
            begin, end = dataset.offsets[document : document + 2].tolist()
            mask = dataset.target_mask(begin, end)
            assert mask is not None
            assert torch.equal(batch.tokens[row, at], ids)
            assert torch.equal(batch.positions[row, at], torch.arange(len(ids)))
            wanted = np.append(np.where(mask, ids, -1)[1:], -1)
            assert batch.targets[row, at].tolist() == wanted.tolist()
        rest = batch.documents[row] == len(members)
        assert (batch.targets[row, rest] == -1).all()
        assert int(rest.sum()) + sum(map(len, map(dataset.document, members))) == 256


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(["chat", "preference"]), steps=st.integers(0, 40), rows=st.integers(1, 8)
)
def test_resuming_anywhere_equals_never_having_stopped(
    datasets: dict[str, TokenDataset], kind: str, steps: int, rows: int
) -> None:
    unbroken = loader(datasets[kind], rows=2 * rows)
    for _ in range(steps):
        unbroken.next_batch()
    resumed = loader(datasets[kind], rows=2)  # the batch size may change on the way
    resumed.load_state(unbroken.state())
    expected = unbroken.next_batch()
    found = [resumed.next_batch() for _ in range(rows)]
    for name in ("tokens", "targets", "positions", "documents"):
        parts = torch.cat([getattr(batch, name) for batch in found])
        assert torch.equal(parts, getattr(expected, name))


def test_windows_of_conversations_mask_the_same_targets(datasets: dict[str, TokenDataset]) -> None:
    dataset = datasets["chat"]
    batch = BatchLoader(dataset, batch_size=4, sequence_length=300, seed=0).next_batch()
    windows = BatchLoader(dataset, batch_size=4, sequence_length=300, seed=0).locate(0, 4).rows
    for row, start in enumerate((windows * 300).tolist()):
        mask = dataset.target_mask(start + 1, start + 301)
        assert mask is not None and 0 < mask.sum() < 300
        assert ((batch.targets[row] != -1).numpy() == mask).all()
        kept = dataset.tokens(start + 1, start + 301)[mask]
        assert (batch.targets[row][torch.from_numpy(mask)].numpy() == kept).all()


def test_rows_that_can_not_be_are_refused(datasets: dict[str, TokenDataset]) -> None:
    with pytest.raises(DataError, match=r"longest example has \d+ tokens, a row only 32"):
        loader(datasets["chat"], length=32)
    with pytest.raises(DataError, match="would part a pair"):
        loader(datasets["preference"], rows=3)
    with pytest.raises(DataError, match="one batch takes 100000"):
        loader(datasets["chat"], rows=100_000)
    state = loader(datasets["chat"]).state()
    with pytest.raises(DataError, match="seed was 0, now is 1"):
        loader(datasets["chat"], seed=1).load_state(state)


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_skipped_steps_are_cut_out_of_the_order(
    datasets: dict[str, TokenDataset], kind: str, tmp_path: Path
) -> None:
    """As a rollback does it: the data of a step goes, and what is behind it moves up."""
    whole, rolled_back = loader(datasets[kind]), loader(datasets[kind])
    rolled_back.next_sample = 4
    state = rolled_back.state()
    path = tmp_path / "skip.json"
    rolled_back.use_skip_list(SkipList.add_steps(path, [1], samples_per_step=4))
    assert rolled_back.state() == state
    for first, before in ((0, 0), (4, 8), (8, 12)):
        found, expected = rolled_back.batch_at(first), whole.batch_at(before)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.targets, expected.targets)
    rolled_back.next_sample = 8
    with pytest.raises(DataError, match="changes what comes before sample 8"):
        rolled_back.use_skip_list(SkipList())
    if kind == "preference":
        odd = SkipList().with_steps([1], samples_per_step=3)
        with pytest.raises(DataError, match="would part a pair"):
            loader(datasets[kind]).use_skip_list(odd)


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_a_skipped_example_loses_its_targets(datasets: dict[str, TokenDataset], kind: str) -> None:
    made = loader(datasets[kind])
    before = made.batch_at(0)
    document, *_ = made.locate(0, 1)[0].documents
    entry = made.document_entry(f"data:{document}", by_content=True)
    made.use_skip_list(SkipList().with_document(entry))
    after = made.batch_at(0)
    assert torch.equal(after.tokens, before.tokens)
    hidden = (before.documents == 0) if kind == "chat" else torch.ones(4, 256, dtype=torch.bool)
    hidden[2 if kind == "preference" else 1 :] = False
    assert (before.targets[hidden] != -1).any() and (after.targets[hidden] == -1).all()
    assert torch.equal(after.targets[~hidden], before.targets[~hidden])
