from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.core.errors import ArtifactError
from minigpt.data.shards import (
    INDEX_FILE,
    DatasetIndex,
    ShardWriter,
    SplitIndex,
    TokenDataset,
    token_dtype,
    write_index,
)

EOS = 7


def write(directory: Path, documents: list[list[int]], *, vocab_size: int, shard: int) -> None:
    dtype = token_dtype(vocab_size)
    with ShardWriter(directory, "train", dtype=dtype, shard_tokens=shard) as writer:
        for document in documents:
            writer.append([EOS, *document], num_bytes=len(document))
        size = writer.close()
    with ShardWriter(directory, "val", dtype=dtype, shard_tokens=shard) as empty:
        nothing = empty.close()
    index = DatasetIndex(
        dtype=dtype,
        shard_tokens=shard,
        vocab_size=vocab_size,
        eos_token_id=EOS,
        splits={"train": size, "val": nothing},
    )
    write_index(directory, index)


@settings(deadline=None, max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(0, 65_535), max_size=40), max_size=12),
    shard=st.integers(1, 50),
    wide=st.booleans(),
    data=st.data(),
)
def test_documents_and_stream_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    shard: int,
    wide: bool,
    data: st.DataObject,
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    write(directory, documents, vocab_size=100_000 if wide else 65_536, shard=shard)
    dataset = TokenDataset.open(directory, "train")
    stream = [token for document in documents for token in [EOS, *document]]
    assert dataset.num_documents == len(documents)
    assert dataset.num_tokens == len(stream)
    assert dataset.num_bytes == sum(map(len, documents))
    for i, document in enumerate(documents):
        assert dataset.document(i).tolist() == [EOS, *document]
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert dataset.tokens(start, stop).tolist() == stream[start:stop]
    owners = [i for i, document in enumerate(documents) for _ in range(len(document) + 1)]
    assert dataset.document_of(np.arange(len(stream))).tolist() == owners


def test_reading_does_not_copy_within_a_shard(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3]] * 4, vocab_size=300, shard=100)
    dataset = TokenDataset.open(tmp_path, "train")
    view = dataset.document(2)
    assert isinstance(view, np.memmap)
    assert not view.flags.writeable


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_the_narrowest_type_is_stored(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype


def test_out_of_range_is_an_index_error(tmp_path: Path) -> None:
    write(tmp_path, [[1]], vocab_size=300, shard=100)
    dataset = TokenDataset.open(tmp_path, "train")
    for i in (-1, 1):
        with pytest.raises(IndexError):
            dataset.document(i)
    with pytest.raises(IndexError):
        dataset.tokens(0, 3)


def test_damage_is_named(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3]] * 4, vocab_size=300, shard=10)
    shard = tmp_path / "train-00001.tokens"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"train-00001\.tokens is truncated"):
        TokenDataset.open(tmp_path, "train")
    shard.unlink()
    with pytest.raises(ArtifactError, match=r"train-00001\.tokens is missing"):
        TokenDataset.open(tmp_path, "train")
    tree = json.loads((tmp_path / INDEX_FILE).read_text())
    (tmp_path / INDEX_FILE).write_text(json.dumps(tree | {"format_version": 99}))
    with pytest.raises(ArtifactError, match="format version 99"):
        TokenDataset.open(tmp_path, "train")
    (tmp_path / INDEX_FILE).write_text("{}")
    with pytest.raises(ArtifactError, match=r"index\.json is corrupt"):
        TokenDataset.open(tmp_path, "train")
    with pytest.raises(ArtifactError, match="no dataset at"):
        TokenDataset.open(tmp_path / "nowhere", "train")


def test_an_empty_split_opens(tmp_path: Path) -> None:
    write(tmp_path, [[1]], vocab_size=300, shard=10)
    val = TokenDataset.open(tmp_path, "val")
    assert (val.num_documents, val.num_tokens) == (0, 0)
    assert val.index.splits["val"] == SplitIndex(documents=0, tokens=0, bytes=0)
