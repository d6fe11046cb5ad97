from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.core.errors import ArtifactError
from minigpt.data.loader import BatchLoader
from minigpt.data.packing import best_fit, make_plan, open_plan
from minigpt.data.rows import IGNORED_TARGET, NO_DOCUMENT, PackedRows
from minigpt.data.shards import TokenDataset

NOTHING = np.empty(0, np.int64)


@pytest.fixture(scope="session")
def dataset(tiny_dataset: Path) -> TokenDataset:
    return TokenDataset.open(tiny_dataset, "train")


@settings(max_examples=100, deadline=None)
@given(
    capacity=st.integers(1, 90),
    data=st.data(),
)
def test_no_row_overflows_and_each_item_goes_where_it_fits_best(
    capacity: int, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=120))
    row_of, count = best_fit(np.array(lengths, np.int64), capacity)
    room: list[int] = []
    for length, row in zip(lengths, row_of.tolist(), strict=True):
        fitting = [left for left in room if left >= length]
        if row == len(room):
            assert not fitting  # a new row only where none has room
            room.append(capacity)
        else:
            assert room[row] == min(fitting)
        room[row] -= length
    assert len(room) == count
    assert all(left >= 0 for left in room)


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 700), seed=st.integers(0, 9), left_out=st.sets(st.integers(0, 200)))
def test_every_token_lies_in_exactly_one_row(
    dataset: TokenDataset, length: int, seed: int, left_out: set[int]
) -> None:
    out = np.array(sorted(left_out), np.int64)
    plan = make_plan(dataset, length, seed, out)
    places = [
        place
        for start, size in zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True)
        for place in range(start, start + size)
    ]
    expected = set(range(dataset.num_tokens))
    for document in left_out:
        expected -= set(range(*dataset.offsets[document : document + 2].tolist()))
    assert len(places) == len(expected)
    assert set(places) == expected
    sums = np.add.reduceat(plan.lengths, plan.rows[:-1])
    assert sums.max() <= length
    # A document is cut only into full rows and one rest.
    sizes = np.diff(dataset.offsets)
    cuts = np.bincount(dataset.document_of(plan.starts), minlength=dataset.num_documents)
    whole = np.where(np.isin(np.arange(dataset.num_documents), out), 0, -(-sizes // length))
    assert cuts.tolist() == whole.tolist()


def test_rows_hold_whole_documents_then_padding(dataset: TokenDataset) -> None:
    plan = make_plan(dataset, 300, 0, NOTHING)
    rows = PackedRows(dataset, 300, plan)
    read = rows.read(np.arange(rows.num_rows))
    eos = dataset.index.eos_token_id
    padded = 0
    for row in range(rows.num_rows):
        column = 0
        for document, start, stop in rows.segments(row):
            end = column + stop - start
            stream = dataset.tokens(start, stop).tolist()
            assert read.tokens[row, column:end].tolist() == stream
            after = int(dataset.offsets[document + 1])
            following = eos if stop == after else int(dataset.tokens(stop, stop + 1)[0])
            assert read.targets[row, column:end].tolist() == [*stream[1:], following]
            assert read.positions[row, column:end].tolist() == list(range(stop - start))
            assert (read.documents[row, column:end] == document).all()
            column = end
        assert (read.targets[row, column:] == IGNORED_TARGET).all()
        assert (read.documents[row, column:] == NO_DOCUMENT).all()
        padded += 300 - column
    assert (read.targets != IGNORED_TARGET).sum() == dataset.num_tokens
    assert padded == rows.num_rows * 300 - dataset.num_tokens
    assert padded < 0.02 * dataset.num_tokens


def test_documents_and_padding_are_apart_in_the_mask(dataset: TokenDataset) -> None:
    loader = BatchLoader(dataset, batch_size=64, sequence_length=300, seed=0, packing="best-fit")
    batch = loader.next_batch()
    where = loader.locate(0, 64)
    for row in range(64):
        segments = loader.sources[0].rows.segments(int(where.rows[row]))
        numbers = [n for n, s in enumerate(segments) for _ in range(s.stop - s.start)]
        numbers += [len(segments)] * (300 - len(numbers))
        assert batch.documents[row].tolist() == numbers
    ends = batch.targets == IGNORED_TARGET
    assert torch.equal(
        batch.tokens[ends], torch.full((int(ends.sum()),), dataset.index.eos_token_id)
    )


def test_each_epoch_covers_each_packed_row_once_and_resumes_anywhere(dataset: TokenDataset) -> None:
    def fresh() -> BatchLoader:
        return BatchLoader(dataset, batch_size=3, sequence_length=128, seed=4, packing="best-fit")

    loader = fresh()
    first = loader.locate(0, loader.num_rows).rows.tolist()
    second = loader.locate(loader.num_rows, loader.num_rows).rows.tolist()
    assert sorted(first) == sorted(second) == list(range(loader.num_rows))
    assert first != second
    for _ in range(5):
        loader.next_batch()
    resumed = fresh()
    resumed.load_state(loader.state())
    assert torch.equal(resumed.next_batch().tokens, loader.next_batch().tokens)


def test_the_plan_is_made_once_and_checked(
    dataset: TokenDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIGPT_HOME", str(tmp_path))
    made = open_plan(dataset, sequence_length=100, seed=0, left_out=NOTHING)
    (directory,) = (path for path in (tmp_path / "packing").iterdir() if path.is_dir())
    stamp = (directory / "starts.npy").stat().st_mtime_ns
    again = open_plan(dataset, sequence_length=100, seed=0, left_out=NOTHING)
    assert again.starts.tolist() == made.starts.tolist()
    assert isinstance(again.starts, np.memmap)
    assert (directory / "starts.npy").stat().st_mtime_ns == stamp
    other = open_plan(dataset, sequence_length=100, seed=1, left_out=NOTHING)
    assert other.starts.tolist() != made.starts.tolist()
    content = bytearray((directory / "starts.npy").read_bytes())
    content[-1] ^= 1
    (directory / "starts.npy").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"starts.npy is corrupt"):
        open_plan(dataset, sequence_length=100, seed=0, left_out=NOTHING)


def test_a_cursor_of_the_other_packing_is_refused(dataset: TokenDataset) -> None:
    windows = BatchLoader(dataset, batch_size=2, sequence_length=64, seed=3)
    packed = BatchLoader(dataset, batch_size=2, sequence_length=64, seed=3, packing="best-fit")
    with pytest.raises(Exception, match="packing was windows, now is best-fit"):
        packed.load_state(windows.state())
