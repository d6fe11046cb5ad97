from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.data.packing import Integers
from minigpt.data.rows import IGNORED_TARGET, WindowRows
from minigpt.data.shards import TokenDataset
from minigpt.data.source import Source

NONE = np.empty(0, np.int64)


@pytest.fixture(scope="session")
def dataset(tiny_dataset: Path) -> TokenDataset:
    return TokenDataset.open(tiny_dataset, "train")


def _source(
    dataset: TokenDataset, key: str = "0", hidden: Integers = NONE, since: Integers = NONE
) -> Source:
    return Source("data", dataset, WindowRows(dataset, 64), key, hidden, since)


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=20))
def test_rows_do_not_depend_on_what_was_asked_before(
    dataset: TokenDataset, indices: list[int]
) -> None:
    source = _source(dataset)
    epochs, rows = source.shuffled(np.array(indices))
    assert epochs.tolist() == [index // source.rows.num_rows for index in indices]
    for index, row in zip(reversed(indices), reversed(rows.tolist()), strict=True):
        assert source.shuffled(np.array([index]))[1].tolist() == [row]


def test_each_epoch_has_each_row_once_in_an_order_of_its_own(dataset: TokenDataset) -> None:
    source = _source(dataset)
    count = source.rows.num_rows
    _, rows = source.shuffled(np.arange(2 * count))
    first, second = rows[:count].tolist(), rows[count:].tolist()
    assert sorted(first) == sorted(second) == list(range(count)) and first != second
    _, other = _source(dataset, key="1").shuffled(np.arange(count))
    assert other.tolist() != first


def test_a_document_is_hidden_from_its_sample_on(dataset: TokenDataset) -> None:
    source = _source(dataset, hidden=np.array([1, 3]), since=np.array([0, 10]))
    assert (source.hidden_at(9), source.hidden_at(10)) == ({1}, {1, 3})
    documents = source.rows.read(np.arange(source.rows.num_rows)).documents
    rows = np.flatnonzero((documents == 3).any(axis=1))[:1].repeat(2)
    plain, read = source.rows.read(rows), source.rows.read(rows)
    source.hide(read, np.array([9, 10]))
    hidden = np.isin(read.documents, 1)
    hidden[1] |= read.documents[1] == 3
    assert hidden[1].any()
    expected = np.where(hidden, IGNORED_TARGET, plain.targets)
    assert read.targets.tolist() == expected.tolist()
    assert read.tokens.tolist() == plain.tokens.tolist()
