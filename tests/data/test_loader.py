from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.core.errors import DataError
from minigpt.data.loader import Batch, BatchLoader
from minigpt.data.permutation import Permutation
from minigpt.data.shards import TokenDataset


@pytest.fixture(scope="session")
def dataset(tiny_dataset: Path) -> TokenDataset:
    return TokenDataset.open(tiny_dataset, "train")


def _equal(left: Batch, right: Batch) -> bool:
    names = ("tokens", "targets", "positions", "documents")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


@given(length=st.integers(1, 5000), key=st.text(max_size=10))
def test_permutation_is_a_bijection(length: int, key: str) -> None:
    order = Permutation(length, key)(np.arange(length))
    assert sorted(order.tolist()) == list(range(length))


@given(length=st.integers(1, 1 << 62), data=st.data())
def test_permutation_of_any_length_stays_inside_and_is_pointwise(
    length: int, data: st.DataObject
) -> None:
    ranks = data.draw(st.lists(st.integers(0, length - 1), min_size=1, max_size=8))
    permutation = Permutation(length, "key")
    together = permutation(ranks)
    assert ((together >= 0) & (together < length)).all()
    assert together.tolist() == [int(permutation([rank])[0]) for rank in ranks]


def test_permutation_shuffles() -> None:
    order = Permutation(10_000, "0/0")(np.arange(10_000))
    other = Permutation(10_000, "0/1")(np.arange(10_000))
    # Neighbours of a uniform shuffle lie a third of the length apart, correlations are ~0.01.
    assert 3100 < np.abs(np.diff(order)).mean() < 3560
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.04
    assert abs(np.corrcoef(order, other)[0, 1]) < 0.04


@settings(max_examples=25, deadline=None)
@given(
    batch_size=st.integers(1, 40),
    sequence_length=st.integers(1, 200),
    seed=st.integers(0, 1 << 40),
    data=st.data(),
)
def test_each_epoch_covers_each_window_once(
    dataset: TokenDataset, batch_size: int, sequence_length: int, seed: int, data: st.DataObject
) -> None:
    loader = BatchLoader(dataset, batch_size=batch_size, sequence_length=sequence_length, seed=seed)
    epoch = data.draw(st.integers(0, 5))
    windows = loader.locate(epoch * loader.num_rows, loader.num_rows).rows
    assert sorted(windows.tolist()) == list(range(loader.num_rows))
    assert loader.num_rows == (dataset.num_tokens - 1) // sequence_length


@settings(max_examples=25, deadline=None)
@given(
    steps=st.integers(0, 60),
    batch_size=st.integers(1, 300),
    seed=st.integers(0, 1000),
)
def test_resuming_anywhere_equals_never_having_stopped(
    dataset: TokenDataset, steps: int, batch_size: int, seed: int
) -> None:
    def fresh() -> BatchLoader:
        return BatchLoader(dataset, batch_size=batch_size, sequence_length=512, seed=seed)

    unbroken = fresh()
    for _ in range(steps):
        unbroken.next_batch()
    resumed = fresh()
    resumed.load_state(unbroken.state())
    started = BatchLoader(
        dataset,
        batch_size=batch_size,
        sequence_length=512,
        seed=seed,
        start_sample=steps * batch_size,
    )
    for _ in range(2):
        expected = unbroken.next_batch()
        assert _equal(expected, resumed.next_batch())
        assert _equal(expected, started.next_batch())


def test_order_does_not_depend_on_the_batch_size(dataset: TokenDataset) -> None:
    by_two = BatchLoader(dataset, batch_size=2, sequence_length=64, seed=3)
    by_six = BatchLoader(dataset, batch_size=6, sequence_length=64, seed=3)
    small = torch.cat([by_two.next_batch().tokens for _ in range(3)])
    assert torch.equal(small, by_six.next_batch().tokens)


def test_batch_holds_the_stream(dataset: TokenDataset) -> None:
    loader = BatchLoader(dataset, batch_size=8, sequence_length=300, seed=1)
    windows = loader.locate(0, 8).rows
    batch = loader.next_batch()
    assert batch.tokens.dtype == batch.targets.dtype == batch.positions.dtype == torch.int64
    assert batch.documents.dtype == torch.int32
    eos = dataset.index.eos_token_id
    for row, window in enumerate(windows.tolist()):
        start = window * 300
        assert batch.tokens[row].tolist() == dataset.tokens(start, start + 300).tolist()
        assert batch.targets[row].tolist() == dataset.tokens(start + 1, start + 301).tolist()
        position, document = 0, 0
        for column, token in enumerate(batch.tokens[row].tolist()):
            if column and token == eos:
                position, document = 0, document + 1
            assert batch.positions[row, column] == position
            assert batch.documents[row, column] == document
            position += 1


def test_a_corpus_below_one_batch_is_refused_with_numbers(dataset: TokenDataset) -> None:
    with pytest.raises(DataError, match=r"has [\d,]+ tokens, but one batch of 4096 x 4096 needs"):
        BatchLoader(dataset, batch_size=4096, sequence_length=4096, seed=0)


def test_a_cursor_of_another_order_is_refused(dataset: TokenDataset) -> None:
    state = BatchLoader(dataset, batch_size=2, sequence_length=64, seed=3).state()
    other = BatchLoader(dataset, batch_size=2, sequence_length=64, seed=4)
    with pytest.raises(DataError, match="seed was 3, now is 4"):
        other.load_state(state)


@settings(max_examples=20, deadline=None)
@given(
    step=st.integers(0, 10**6),
    micro_batches=st.sampled_from([8, 16]),
    seed=st.integers(0, 1000),
)
def test_every_world_size_sees_the_same_samples_in_the_same_order(
    dataset: TokenDataset, step: int, micro_batches: int, seed: int
) -> None:
    """Rank r of R takes micro-batches [rM/R, (r+1)M/R); their rows, rank by rank, are the step."""
    size = 2

    def rows_of_step(ranks: int) -> list[tuple[int, int]]:
        rows = []
        for rank in range(ranks):
            loader = BatchLoader(dataset, batch_size=size, sequence_length=64, seed=seed)
            share = micro_batches // ranks
            for micro_batch in range(rank * share, (rank + 1) * share):
                where = loader.locate((step * micro_batches + micro_batch) * size, size)
                rows += list(zip(where.epochs.tolist(), where.rows.tolist(), strict=True))
        return rows

    alone = rows_of_step(1)
    assert all(rows_of_step(ranks) == alone for ranks in (2, 4, 8))


def test_a_change_of_world_size_in_the_middle_loses_and_repeats_nothing(
    dataset: TokenDataset,
) -> None:
    """An epoch at 1, then 4, then 2 ranks deals each row once."""
    size, micro_batches = 4, 4
    loader = BatchLoader(dataset, batch_size=size, sequence_length=64, seed=5)
    steps = loader.num_rows // (size * micro_batches)
    seen: list[int] = []
    for step in range(steps):
        ranks = (1, 4, 2)[step * 3 // steps]
        for rank in range(ranks):
            resumed = BatchLoader(dataset, batch_size=size, sequence_length=64, seed=5)
            resumed.load_state(loader.state())
            share = micro_batches // ranks
            for micro_batch in range(rank * share, (rank + 1) * share):
                seen += resumed.locate(resumed.next_sample + micro_batch * size, size).rows.tolist()
        loader.next_sample += size * micro_batches
    assert len(seen) == steps * size * micro_batches
    assert len(set(seen)) == len(seen)
