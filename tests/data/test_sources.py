from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from minigpt.core.config import from_mapping
from minigpt.core.errors import DataError, StorageError
from minigpt.data.config import SourceConfig
from minigpt.data.documents import RawDocument
from minigpt.data.sources import read_documents, total_bytes

TEXTS = ["first \u00e9", "second\nline", "third \U0001f600"]


def read(path: Path | str, limit: int = 1 << 20, **source: Any) -> list[RawDocument]:
    config = from_mapping(SourceConfig, {"paths": [str(path)], **source})
    return list(read_documents(config, max_document_bytes=limit))


def texts(documents: list[RawDocument]) -> list[str]:
    return [document.text for document in documents]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)],
)
def test_jsonl_plain_and_compressed(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    lines = "\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(TEXTS))
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(compress(b"\n" + lines.encode() + b"\n\n"))
    found = read(path, kind="jsonl", text_field="body")
    assert texts(found) == TEXTS
    assert found[1].name == f"{path}:3"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": "cut', r"bad\.jsonl:2 is not valid JSON"),
        ('["a list"]', r"bad\.jsonl:2 holds a list, not an object"),
        ('{"body": "x"}', r"bad\.jsonl:2 has no field 'text', only 'body'"),
        ('{"text": 7}', r"bad\.jsonl:2: field 'text' holds a int, not text"),
        ("[" * 100_000, r"bad\.jsonl:2 is not valid JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=complaint) as caught:
        read(path, kind="jsonl")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_compression_is_named(tmp_path: Path, suffix: str) -> None:
    rows = b"".join(json.dumps({"text": str(i) * 50}).encode() + b"\n" for i in range(20_000))
    compress = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor().compress
    whole = compress(rows)
    path = tmp_path / f"cut.jsonl{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"cut\.jsonl\{suffix}"):
        read(path, kind="jsonl")


def test_jsonl_lines_that_are_not_utf8_are_read_and_marked(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "caf\xe9"}\n'.encode("latin-1"))
    (document,) = read(path, kind="jsonl")
    assert (document.text, document.how) == ("caf\xe9", "windows-1252")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    rows = [*TEXTS, None] * 200
    table = pyarrow.table({"text": rows, "n": list(range(len(rows)))})
    pyarrow.parquet.write_table(table, path, row_group_size=100)
    assert texts(read(path, kind="parquet")) == [text or "" for text in rows]
    with pytest.raises(DataError, match="has no column 'body', only 'text', 'n'"):
        read(path, kind="parquet", text_field="body")
    damaged = path.read_bytes()
    path.write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(DataError, match="is no sound parquet file"):
        read(path, kind="parquet")


def test_huggingface_dataset_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"text": TEXTS})
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"validation": whole}).save_to_disk(str(tmp_path / "several"))
    assert texts(read(tmp_path / "one", kind="huggingface")) == TEXTS
    several = tmp_path / "several"
    assert texts(read(several, kind="huggingface", hub_split="validation")) == TEXTS
    for path in (several, tmp_path / "nowhere"):
        with pytest.raises(DataError, match="can't read the Hugging Face dataset") as caught:
            read(path, kind="huggingface")
        assert "\n" not in str(caught.value)


def test_text_files_are_documents_and_separators_part_them(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_text("one\n\ntwo\nlines\n\nthree")
    assert texts(read(path)) == ["one\n\ntwo\nlines\n\nthree"]
    found = read(path, separator="\n\n")
    assert texts(found) == ["one", "two\nlines", "three"]
    assert [document.name for document in found] == [str(path), f"{path}#1", f"{path}#2"]
    assert not found[0].code


def test_wide_encodings_are_cut_like_any_other(tmp_path: Path) -> None:
    text = "".join(f"line {i} \u4e2d\u6587\n" for i in range(1000))
    path = tmp_path / "wide.txt"
    path.write_bytes(text.encode("utf-16"))
    found = read(path, limit=500)
    assert "".join(texts(found)) == text
    assert {document.how for document in found} == {"utf-16"}
    assert max(len(document.text.encode()) for document in found) <= 500


def test_long_records_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    text = "a line \u4e2d\n" * 100
    path.write_text(json.dumps({"text": text}))
    found = read(path, kind="jsonl", limit=128)
    assert "".join(texts(found)) == text
    assert found[2].name == f"{path}:1#2"


def test_code_is_known_by_its_name_and_its_declared_encoding(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_bytes("# coding: koi8-r\nx = '\u0438\u043c\u044f'\n".encode("koi8-r"))
    (document,) = read(path)
    assert document.code
    assert document.how == "declared"
    assert "\u0438\u043c\u044f" in document.text


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    config = from_mapping(SourceConfig, {"paths": [str(tmp_path)]})
    assert total_bytes(config) == 10
    documents = read_documents(config, max_document_bytes=100)
    assert next(documents).text == "a.txt"
    (tmp_path / "b.txt").unlink()
    with pytest.raises(StorageError, match=r"b\.txt: no such file"):
        next(documents)
