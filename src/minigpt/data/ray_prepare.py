"""Preparing a dataset on a Ray cluster, with the same bytes as on one machine.

Ray Data reads, repairs and judges the files of a source in parallel and hands the results over
in the order of the source; tokenizing runs as Ray tasks, a bounded number at a time. The workers
need minigpt and access to the source's files; only the driver writes.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt.core import errors
from minigpt.core.errors import DataError, MinigptError
from minigpt.data.clean import Screened, screen
from minigpt.data.config import CleanConfig, SourceConfig
from minigpt.data.files import SourceFile, find_files
from minigpt.data.sources import read_documents
from minigpt.data.spool import SpooledDocument
from minigpt.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow

_MOST_BLOCKS = 2048
_BLOCK_BYTES = 4 << 20
_WAITING_PER_CPU = 2


class RayWork:
    """Spreads the work over a Ray cluster; make one with `connect`."""

    def __init__(self, cpus: int) -> None:
        self._waiting = max(2, _WAITING_PER_CPU * cpus)

    @staticmethod
    @contextmanager
    def connect() -> Iterator[RayWork]:
        """Use the cluster that this process is in or that RAY_ADDRESS names, or start one.

        One that was started here, on this machine alone, ends with the block.

        Raises:
            DataError: Ray is not installed.
        """
        try:
            ray: Any = importlib.import_module("ray")
            importlib.import_module("ray.data")
        except ImportError:
            raise DataError(
                "preparing on Ray needs the package `ray`", remedy="pip install 'minigpt[cluster]'"
            ) from None
        started = not ray.is_initialized()
        if started:
            # Without an address Ray would join whatever cluster runs on this machine.
            address = os.environ.get("RAY_ADDRESS") or "local"
            ray.init(
                address,
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        try:
            yield RayWork(int(ray.cluster_resources().get("CPU", 1)))
        finally:
            if started:
                ray.shutdown()

    def screened(self, source: SourceConfig, clean: CleanConfig) -> Iterator[Screened]:
        """Yield every document of a source, in order; see `Work.screened`."""
        ray_data: Any = importlib.import_module("ray.data")
        # A Hugging Face dataset is read by one worker, whole.
        files = None if source.kind == "huggingface" else find_files(source)
        parts = 1 if files is None else len(files)
        context = ray_data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.target_max_block_size = _BLOCK_BYTES
        dataset = ray_data.from_items(
            list(range(parts)), override_num_blocks=min(parts, _MOST_BLOCKS)
        ).map_batches(
            _screen_files,
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
            fn_kwargs={"files": files, "source": source, "clean": clean},
        )
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in table.to_pylist():
                if row["error"] is not None:
                    raise getattr(errors, row["error"])(row["text"].decode())
                yield Screened(
                    text=row["text"].decode(),
                    digest=row["digest"],
                    notes=tuple((what, name) for what, name in json.loads(row["notes"])),
                    characters=row["characters"],
                    signature=row["signature"],
                )

    def encoded(
        self, tokenizer: Tokenizer, batches: Iterator[list[SpooledDocument]]
    ) -> Iterator[tuple[SpooledDocument, Sequence[int]]]:
        """Yield each document with its tokens, in order; see `Work.encoded`."""
        import ray

        files = _tokenizer_files(tokenizer)
        key = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
        shared = ray.put(files)
        encode = ray.remote(_encode)
        waiting: deque[tuple[list[SpooledDocument], Any]] = deque()
        for batch in batches:
            texts = [document.text for document in batch]
            waiting.append((batch, encode.remote(key, shared, texts)))
            if len(waiting) >= self._waiting:
                yield from _results(*waiting.popleft())
        while waiting:
            yield from _results(*waiting.popleft())


def _results(
    batch: list[SpooledDocument], reference: Any
) -> Iterator[tuple[SpooledDocument, Sequence[int]]]:
    import ray

    tokens, ends = ray.get(reference)
    parts = np.split(tokens, ends[:-1])
    for document, part in zip(batch, parts, strict=True):
        yield document, part.tolist()


def _screen_files(
    parts: pyarrow.Table,
    *,
    files: list[SourceFile] | None,
    source: SourceConfig,
    clean: CleanConfig,
) -> Iterator[pyarrow.Table]:
    """Screen the documents of some files on a worker; an error becomes the last row."""
    sign = None
    if clean.near_duplicates is not None:
        from minigpt.data.duplicates import NearDuplicates

        sign = NearDuplicates(clean.near_duplicates, clean.permutations).sign
    rows: list[dict[str, Any]] = []
    size = 0
    try:
        for part in parts["item"].to_pylist():
            documents = read_documents(
                source,
                max_document_bytes=clean.max_document_bytes,
                files=None if files is None else [files[part]],
            )
            for document in documents:
                screened = screen(clean, document)
                text = screened.text.encode()
                signature = sign(screened.text) if sign and screened.digest else None
                rows.append(_row(screened, text, signature))
                size += len(text)
                if size >= _BLOCK_BYTES:
                    yield _table(rows)
                    rows, size = [], 0
    except MinigptError as error:
        nothing = Screened("", b"", (), 0)
        rows.append(_row(nothing, str(error).encode(), None) | {"error": type(error).__name__})
    yield _table(rows)


def _row(screened: Screened, text: bytes, signature: bytes | None) -> dict[str, Any]:
    return {
        "text": text,
        "digest": screened.digest,
        "notes": json.dumps(screened.notes),
        "characters": screened.characters,
        "signature": signature,
        "error": None,
    }


def _table(rows: list[dict[str, Any]]) -> pyarrow.Table:
    import pyarrow

    schema = pyarrow.schema(
        {
            "text": pyarrow.binary(),
            "digest": pyarrow.binary(),
            "notes": pyarrow.string(),
            "characters": pyarrow.int64(),
            "signature": pyarrow.binary(),
            "error": pyarrow.string(),
        }
    )
    return pyarrow.Table.from_pylist(rows, schema=schema)


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.copy_to(Path(directory))
        return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


_loaded: dict[str, Tokenizer] = {}


def _encode(key: str, files: dict[str, bytes], texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize on a worker; returns all tokens and where each text's end."""
    if key not in _loaded:
        os.environ["RAYON_NUM_THREADS"] = "1"  # a task is one core
        with tempfile.TemporaryDirectory() as directory:
            for name, content in files.items():
                Path(directory, name).write_bytes(content)
            _loaded[key] = Tokenizer.load(directory)
    encoded = _loaded[key].encode_batch([text.decode() for text in texts])
    tokens = np.concatenate([np.asarray(ids, np.uint32) for ids in encoded])
    return tokens, np.cumsum([len(ids) for ids in encoded])
