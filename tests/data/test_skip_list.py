from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.core.errors import ConfigError, DataError
from minigpt.data.config import Packing
from minigpt.data.loader import Batch, BatchLoader
from minigpt.data.rows import IGNORED_TARGET
from minigpt.data.shards import TokenDataset
from minigpt.data.skip_list import (
    SKIP_FILE,
    SkipList,
    SkippedDocument,
    SkippedSamples,
    document_sha256,
)

T = 64


@pytest.fixture(scope="session")
def dataset(tiny_dataset: Path) -> TokenDataset:
    return TokenDataset.open(tiny_dataset, "train")


def make_loader(
    dataset: TokenDataset, skip_list: SkipList | None = None, packing: Packing = "windows"
) -> BatchLoader:
    return BatchLoader(
        dataset, batch_size=4, sequence_length=T, seed=2, packing=packing, skip_list=skip_list
    )


@settings(max_examples=60, deadline=None)
@given(
    rounds=st.lists(st.sets(st.integers(0, 30), min_size=1, max_size=4), max_size=6),
    size=st.integers(1, 9),
)
def test_skipping_steps_moves_up_what_follows_and_nothing_before(
    rounds: list[set[int]], size: int
) -> None:
    skips = SkipList()
    order = list(range(100 * size))  # the model: a list out of which slices are cut
    for steps in rounds:
        skips = skips.with_steps(steps, samples_per_step=size)
        gone = {i for step in steps for i in range(step * size, (step + 1) * size)}
        order = [place for i, place in enumerate(order) if i not in gone]
        count = min(len(order), 60 * size)
        assert skips.places(np.arange(count)).tolist() == order[:count]
        # Any part of it is computed alone.
        assert skips.places(np.arange(count // 2, count)).tolist() == order[count // 2 : count]


@settings(max_examples=40, deadline=None)
@given(
    before=st.sets(st.integers(0, 20), max_size=4),
    after=st.sets(st.integers(20, 40), min_size=1, max_size=4),
    size=st.integers(1, 5),
)
def test_a_cursor_minds_what_was_skipped_before_it_alone(
    before: set[int], after: set[int], size: int
) -> None:
    first = SkipList().with_steps(before, samples_per_step=size)
    longer = first.with_steps(after, samples_per_step=size)
    assert longer.digest(20 * size) == first.digest(20 * size)
    assert longer.digest(41 * size) != first.digest(41 * size)
    one_by_one = SkipList()
    for step in sorted(before, reverse=True):
        one_by_one = one_by_one.with_steps([step], samples_per_step=size)
    assert one_by_one.digest(10**6) == first.digest(10**6)


def test_the_file_is_whole_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / SKIP_FILE
    assert SkipList.read(path) == SkipList()
    written = SkipList.add_steps(path, [3, 4], samples_per_step=8, reason="loss spike")
    again = SkipList.add_steps(path, [3], samples_per_step=8)
    assert SkipList.read(path) == again
    assert written.samples == (SkippedSamples(first=24, count=16, reason="loss spike"),)
    assert [(s.first, s.count) for s in again.samples] == [(24, 16), (40, 8)]
    assert [path.name for path in tmp_path.iterdir()] == [SKIP_FILE]
    path.write_text('{"samples": [{"first": 5}]}')
    with pytest.raises(DataError, match=r"is no skip list: .*count"):
        SkipList.read(path)
    path.write_text("{")
    with pytest.raises(DataError, match="is no skip list"):
        SkipList.read(path)


def test_a_document_is_named_one_way() -> None:
    with pytest.raises(ValueError, match="by dataset and document, or by sha256 and tokens"):
        SkippedDocument(dataset="x")
    with pytest.raises(ConfigError, match="ranges must ascend"):
        SkipList().replace(samples=[{"first": 5, "count": 5}, {"first": 7, "count": 1}])


def test_a_run_that_rolls_back_and_skips_goes_on_with_the_following_samples(
    dataset: TokenDataset, tmp_path: Path
) -> None:
    """Steps of 2 micro-batches; step 6 is bad, the checkpoint is of step 4."""
    loader = make_loader(dataset)
    plain = [loader.batch_at(first) for first in range(0, 12 * 8, 4)]
    loader.next_sample = 4 * 8
    saved = loader.state()
    skips = SkipList.add_steps(tmp_path / SKIP_FILE, [6], samples_per_step=8)
    loader.use_skip_list(skips)
    loader.load_state(saved)
    replayed = [loader.next_batch() for _ in range(12)]
    expected = plain[8:12] + plain[14:22]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(replayed, expected, strict=True))
    # A process that starts afresh from a later checkpoint sees the same.
    fresh = make_loader(dataset, SkipList.read(tmp_path / SKIP_FILE))
    fresh.load_state(loader.state())
    assert torch.equal(fresh.next_batch().tokens, plain[22].tokens)
    # The past can't be changed under a cursor, and a lost list is noticed.
    with pytest.raises(DataError, match=r"changes what comes before sample \d+"):
        loader.use_skip_list(skips.with_steps([1], samples_per_step=8))
    with pytest.raises(DataError, match="skip_sha256 was"):
        make_loader(dataset).load_state(loader.state())


def _targets_by_document(loader: BatchLoader, batches: list[Batch], first: int) -> dict[int, int]:
    """Count the valid targets of each document's tokens."""
    counts: dict[int, int] = {}
    for number, batch in enumerate(batches):
        where = loader.locate(first + 4 * number, 4)
        for row in range(4):
            column = 0
            for document, start, stop in loader.sources[0].rows.segments(int(where.rows[row])):
                end = column + stop - start
                valid = int((batch.targets[row, column:end] != IGNORED_TARGET).sum())
                counts[document] = counts.get(document, 0) + valid
                column = end
    return counts


@pytest.mark.parametrize("packing", ["windows", "best-fit"])
@pytest.mark.parametrize("by_content", [False, True])
def test_a_skipped_document_is_never_a_target(
    dataset: TokenDataset, packing: Packing, by_content: bool
) -> None:
    plain = make_loader(dataset, packing=packing)
    entry = plain.document_entry("17", by_content=by_content)
    assert plain.document_entry("data:17", by_content=by_content) == entry
    loader = make_loader(dataset, SkipList().with_document(entry), packing)
    epoch = [loader.batch_at(first) for first in range(0, loader.num_rows - 3, 4)]
    counts = _targets_by_document(loader, epoch, 0)
    assert counts.get(17, 0) == 0
    assert (17 in counts) == (packing == "windows")  # packed rows do without it
    untouched = _targets_by_document(plain, [plain.batch_at(0)], 0)
    masked = _targets_by_document(make_loader(dataset, packing=packing), [plain.batch_at(0)], 0)
    assert untouched == masked
    if packing == "windows":
        for first in range(0, 80, 4):
            a, b = plain.batch_at(first), loader.batch_at(first)
            assert torch.equal(a.tokens, b.tokens)
            kept = b.targets != IGNORED_TARGET
            assert torch.equal(a.targets[kept], b.targets[kept])


@pytest.mark.parametrize("packing", ["windows", "best-fit"])
def test_a_document_can_be_skipped_from_some_sample_on(
    dataset: TokenDataset, packing: Packing
) -> None:
    plain = make_loader(dataset, packing=packing)
    since = plain.num_rows // 4 * 4 + 40
    entry = plain.document_entry("17").replace(since=since)
    loader = make_loader(dataset, packing=packing)
    loader.next_sample = since
    loader.use_skip_list(SkipList().with_document(entry))
    loader.load_state(plain.state() | {"next_sample": since})
    for first in range(0, since, 4):
        assert torch.equal(plain.batch_at(first).targets, loader.batch_at(first).targets)
    later = [loader.batch_at(first) for first in range(since, since + loader.num_rows, 4)]
    before = [loader.batch_at(first) for first in range(0, loader.num_rows - 3, 4)]
    assert _targets_by_document(loader, later, since)[17] == 0
    assert _targets_by_document(loader, before, 0)[17] > 0
    # Once passed, the entry is part of what the cursor means.
    loader.next_sample = since + 4
    with pytest.raises(DataError, match="skip_sha256"):
        plain.load_state(loader.state())


def test_documents_that_are_not_there_are_named(dataset: TokenDataset) -> None:
    loader = make_loader(dataset)
    for name in ("web:1", "data:999999", "data:x", ""):
        with pytest.raises(DataError, match=r"no document '.*' here, only data:0-\d+"):
            loader.document_entry(name)
    beyond = SkippedDocument(dataset=dataset.fingerprint, document=10**6)
    with pytest.raises(DataError, match="the skip list names document 1000000"):
        make_loader(dataset, SkipList().with_document(beyond))


def test_a_content_hash_finds_the_document_in_any_dataset(
    three_datasets: dict[str, TokenDataset],
) -> None:
    tokens = three_datasets["wiki"].document(2)
    entry = SkippedDocument(sha256=document_sha256(tokens), tokens=len(tokens))
    documents, since = SkipList().with_document(entry).hidden(three_datasets["wiki"])
    assert (documents.tolist(), since.tolist()) == ([2], [0])
    assert not len(SkipList().with_document(entry).hidden(three_datasets["code"])[0])
