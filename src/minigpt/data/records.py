"""Documents from files of records, JSON lines and parquet, and from Hugging Face datasets."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from minigpt.core.errors import DataError, MinigptError
from minigpt.core.storage import is_remote
from minigpt.data.config import SourceConfig
from minigpt.data.documents import RawDocument
from minigpt.data.encoding import How, decode
from minigpt.data.files import SourceFile

_BLOCK = 1 << 20


def read_jsonl(file: SourceFile, field: str) -> Iterator[RawDocument]:
    """Read an object a line, decompressing by the file's suffix; blank lines are skipped.

    Raises:
        DataError: A line is malformed or lacks the field (named as file:line), or the
            compressed stream is damaged.
    """
    for where, record, how in jsonl_records(file):
        yield RawDocument(where, _field(record, field, where), how)


def jsonl_records(file: SourceFile) -> Iterator[tuple[str, dict[str, Any], How]]:
    """Read an object a line: its place as file:line, the object, how its bytes were decoded.

    Raises:
        DataError: A line is malformed, or the compressed stream is damaged.
    """
    path = file.path
    with file.filesystem.open(path, "rb") as raw:
        stream = _decompressed(raw, path)
        number = 0
        try:
            for line in stream:
                number += 1
                if line.strip():
                    yield _parse_line(line, f"{path}:{number}")
        except _broken_stream(path) as error:
            raise DataError(
                f"{path} is truncated or corrupt after line {number}: {error}",
                remedy="fetch the file again",
            ) from None


def _decompressed(raw: IO[bytes], path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.endswith(".zst"):
        import zstandard

        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        return io.BufferedReader(reader, _BLOCK)
    return raw


def _broken_stream(path: str) -> tuple[type[Exception], ...]:
    """Return what decompressing a damaged file raises."""
    if path.endswith(".gz"):
        return (EOFError, gzip.BadGzipFile, zlib.error)
    if path.endswith(".zst"):
        import zstandard

        return (zstandard.ZstdError,)
    return ()


def _parse_line(line: bytes, where: str) -> tuple[str, dict[str, Any], How]:
    text, how = decode(line)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is not valid JSON: {error}", remedy="mend or remove the line"
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"{where} holds a {type(record).__name__}, not an object")
    return where, record, how


def _field(record: Mapping[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise DataError(
            f"{where} has no field {field!r}, only {', '.join(map(repr, record)) or 'none'}",
            remedy="set source.text_field",
        )
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {field!r} holds a {type(text).__name__}, not text",
            remedy="set source.text_field",
        )
    return text


def read_parquet(file: SourceFile, field: str) -> Iterator[RawDocument]:
    """Read one column, a few hundred rows at a time.

    Raises:
        DataError: The file is no parquet file, is damaged, or lacks the column.
    """
    for where, record in parquet_records(file, field):
        yield RawDocument(where, _field(record, field, where))


def parquet_records(
    file: SourceFile, field: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read rows, of one column or of all: the place as file#row, and the row.

    Raises:
        DataError: As `read_parquet`.
    """
    import pyarrow
    import pyarrow.parquet

    path = file.path
    with file.filesystem.open(path, "rb") as raw:
        try:
            table = pyarrow.parquet.ParquetFile(raw)
            names = table.schema_arrow.names
            if field is not None and field not in names:
                raise DataError(
                    f"{path} has no column {field!r}, only {', '.join(map(repr, names))}",
                    remedy="set source.text_field",
                )
            number = 0
            columns = None if field is None else [field]
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist():
                    yield f"{path}#{number}", record
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            message = " ".join(str(error).split())
            raise DataError(f"{path} is no sound parquet file: {message}") from None


def read_huggingface(config: SourceConfig) -> Iterator[RawDocument]:
    """Read a dataset saved on disk (memory-mapped) or one of the hub (streamed).

    Raises:
        DataError: The package `datasets` is missing, or it reports any failure.
    """
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise DataError(
            "source kind huggingface needs the package `datasets`",
            remedy="pip install 'minigpt[hub]'",
        ) from None
    (name,) = config.paths
    try:
        for number, record in enumerate(_open_huggingface(config)):
            where = f"{name}#{number}"
            yield RawDocument(where, _field(record, config.text_field, where))
    except MinigptError:
        raise
    except Exception as error:  # of datasets, its hub client or any file system
        message = " ".join(str(error).split())[:300]
        raise DataError(
            f"can't read the Hugging Face dataset {name!r} ({type(error).__name__}): {message}",
            remedy="check source.paths, hub_config, hub_split and the network",
        ) from None


def _open_huggingface(config: SourceConfig) -> Any:
    import datasets

    (name,) = config.paths
    saved = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves
    if is_remote(name) or any(Path(name, file).is_file() for file in saved):
        found = datasets.load_from_disk(name)
        return found[config.hub_split] if isinstance(found, dict) else found
    return datasets.load_dataset(
        name,
        config.hub_config,
        split=config.hub_split,
        revision=config.hub_revision,
        streaming=True,
    )
