"""From raw text to a dataset artifact, in three passes that each hold a few documents at a time.

1. Read, repair, filter and deduplicate; what is kept goes to an unnamed spool file.
2. Train the tokenizer on the train split (or on a sample of it).
3. Tokenize and write shards.

What concerns one document alone (reading, repairing, judging, tokenizing) is done by a `Work`,
here or on a cluster; what depends on the order is done here, in the order of the source. The same
documents and config give byte-identical shards. What grows with the corpus in memory is a digest
and a signature a document (see `clean` and `duplicates`); on disk, beside the result, the cleaned
text.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.core.artifact import Artifact, create_artifact, is_artifact, open_artifact
from minigpt.core.clock import SystemClock
from minigpt.core.errors import ArtifactError, DataError
from minigpt.core.manifest import Parent
from minigpt.core.storage import is_remote
from minigpt.core.telemetry import get_logger, progress
from minigpt.data.clean import Cleaner, CleaningReport
from minigpt.data.config import DataConfig, TokenizerConfig
from minigpt.data.examples import fill_examples, use_template, write_examples
from minigpt.data.shards import (
    SPLITS,
    DatasetIndex,
    ShardWriter,
    Split,
    SplitIndex,
    token_dtype,
    write_index,
)
from minigpt.data.sources import total_bytes
from minigpt.data.spool import Spool, SpooledDocument
from minigpt.data.tokenizer import Tokenizer
from minigpt.data.tokenizer_build import (
    SPLIT_PATTERN,
    bytes_tokenizer,
    check_pattern,
    load_file,
    train_bpe,
)
from minigpt.data.work import LocalWork, Work

_KEYS = 1 << 64
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024


def prepare(config: DataConfig, destination: str | Path, work: Work | None = None) -> Artifact:
    """Make a dataset artifact, and its tokenizer's at `<destination>-tokenizer`.

    Args:
        config: What to read and how.
        destination: A path or URL at which nothing may exist yet. A tokenizer that lies beside
            it already is used as the parent if it is the very same.
        work: Who reads, cleans and tokenizes texts; by default this process.

    Returns:
        The dataset; `TokenDataset.open(artifact.path, "train")` reads it.

    Raises:
        DataError: The source is empty or unreadable, or nothing is left after cleaning.
        ArtifactError: Something is in the way.
        StorageError: Full disk, no permission; nothing is left behind.
    """
    is_text = config.source.content == "text"
    if work is not None:
        check_spreads(config)
    work = work or LocalWork()
    beside = f"{str(destination).rstrip('/')}-tokenizer"
    _refuse_other_tokenizer(beside, config.tokenizer)
    existing = _existing_tokenizer(config.tokenizer)
    parents: list[Artifact | Parent] = []  # read when the manifest is sealed
    created: Artifact | None = None
    try:
        with create_artifact(destination, kind="dataset", parents=parents, config=config) as draft:
            stopwatch = _Stopwatch()
            with Spool(draft.path.parent) as spool:
                report = CleaningReport()
                fingerprint = (
                    _fill(spool, config, report, work)
                    if is_text
                    else fill_examples(spool, config, report, lambda d: _key(d, config.seed))
                )
                split_of = _Splitter.plan(spool, config)
                stopwatch.lap("clean")
                tokenizer = existing or _train_tokenizer(config.tokenizer, spool, split_of)
                stopwatch.lap("tokenizer")
                (draft.path / "tokenizer").mkdir()
                tokenizer.copy_to(draft.path / "tokenizer")
                use_template(tokenizer, config.chat, draft.path / "tokenizer")
                index = (
                    _write_shards(draft.path, config, spool, split_of, tokenizer, work)
                    if is_text
                    else write_examples(draft.path, config, spool, split_of, tokenizer, report)
                )
                stopwatch.lap("tokenize")
            write_index(draft.path, index)
            draft.metrics |= {
                **_size_metrics(index),
                "cleaning": report.metrics(),
                "text_sha256": fingerprint,
                "seconds": stopwatch.laps,
            }
            parent, created = _tokenizer_artifact(
                beside, config.tokenizer, draft.path / "tokenizer"
            )
            parents.append(parent)
    except BaseException:
        if created is not None:
            shutil.rmtree(created.path, ignore_errors=True)
        raise
    assert draft.artifact is not None
    return draft.artifact


def check_spreads(config: DataConfig) -> None:
    """Refuse what only this process can prepare.

    Raises:
        DataError: The source is one of conversations or preferences.
    """
    if config.source.content != "text":
        raise DataError(
            f"source.kind = {config.source.kind} can't be prepared on a cluster: its workers clean "
            "and tokenize texts, but conversations are rendered whole, in one process",
            remedy="prepare it with --on local",
        )


class _Stopwatch:
    def __init__(self) -> None:
        self._clock = SystemClock()
        self._last = self._clock.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = self._clock.monotonic()
        self.laps[name], self._last = round(now - self._last, 3), now


def _fill(spool: Spool, config: DataConfig, report: CleaningReport, work: Work) -> str:
    """Spool the cleaned documents; return the SHA-256 of their concatenated text.

    Raises:
        DataError: None is left.
    """
    cleaner = Cleaner(config.clean, report)
    is_new = _near_duplicate_filter(config)
    fingerprint = hashlib.sha256()
    sources = [(config.source, False, config.max_bytes)]
    if config.val_source is not None:
        sources.insert(0, (config.val_source, True, None))
    for source, is_val, most in sources:
        room = math.inf if most is None else spool.bytes + most
        with progress("reading and cleaning", total_bytes(source), unit="bytes") as bar:
            for screened in work.screened(source, config.clean):
                bar.advance(screened.characters)
                document = cleaner.admit(screened)
                if document is None:
                    continue
                if not is_new(document.text, screened.signature):
                    report.count("dropped_near_duplicate")
                    continue
                report.count("kept")
                text = document.text.encode()
                fingerprint.update(text)
                spool.append(SpooledDocument(text, _key(document.digest, config.seed), is_val))
                if spool.bytes >= room:
                    break
    if not spool.documents:
        dropped = {name: n for name, n in report.counts.items() if name != "read"}
        reasons = ", ".join(f"{name} {n}" for name, n in sorted(dropped.items()))
        raise DataError(
            f"the corpus is empty: of {report.counts['read']} documents none is left"
            + (f" ({reasons})" if reasons else ""),
            remedy="check source.paths, or lower the limits under clean",
        )
    return fingerprint.hexdigest()


def _near_duplicate_filter(config: DataConfig) -> Callable[[str, bytes | None], bool]:
    if config.clean.near_duplicates is None:
        return lambda text, signature: True
    from minigpt.data.duplicates import NearDuplicates

    return NearDuplicates(config.clean.near_duplicates, config.clean.permutations).add


def _key(digest: bytes, seed: int) -> int:
    salted = hashlib.blake2b(digest, digest_size=8, key=f"split {seed}".encode())
    return int.from_bytes(salted.digest(), "little")


@dataclass(frozen=True)
class _Splitter:
    """Sends a document to a split by its text's hash alone, so that equal texts stay together."""

    val_below: int
    by_source: bool

    @classmethod
    def plan(cls, spool: Spool, config: DataConfig) -> _Splitter:
        """Set the bound, moved where a split would be empty.

        Raises:
            DataError: There are too few documents for both splits.
        """
        if config.val_source is not None:
            for name, count in (
                ("val_source", spool.forced_val_documents),
                ("source", spool.documents - spool.forced_val_documents),
            ):
                if not count:
                    raise DataError(
                        f"no document of {name} is left after cleaning",
                        remedy="check that it does not repeat the other source",
                    )
            return cls(0, by_source=True)
        if config.val_fraction == 0:
            return cls(0, by_source=False)
        if spool.documents < 2:
            raise DataError(
                "one document can't be split into train and val",
                remedy="set source.separator, a smaller clean.max_document_bytes, val_source, "
                "or val_fraction=0",
            )
        bound = max(int(config.val_fraction * _KEYS), spool.lowest_key + 1)
        return cls(min(bound, spool.highest_key), by_source=False)

    def __call__(self, document: SpooledDocument) -> Split:
        is_val = document.forced_val if self.by_source else document.key < self.val_below
        return "val" if is_val else "train"


def _existing_tokenizer(wanted: TokenizerConfig) -> Tokenizer | None:
    """Return a tokenizer that needs no text, or None; any mistake in `wanted` shows here."""
    pattern = wanted.pattern or SPLIT_PATTERN
    if wanted.kind == "bytes":
        return bytes_tokenizer()
    if wanted.kind == "file":
        assert wanted.path is not None
        return load_file(wanted.path, pattern=pattern)
    check_pattern(pattern)
    return None


def _train_tokenizer(wanted: TokenizerConfig, spool: Spool, split_of: _Splitter) -> Tokenizer:
    tokenizer = train_bpe(
        _training_texts(spool, split_of, wanted.train_bytes),
        vocab_size=wanted.vocab_size,
        pattern=wanted.pattern or SPLIT_PATTERN,
        show_progress=sys.stderr.isatty(),
    )
    if tokenizer.vocab_size < wanted.vocab_size:
        get_logger("data").warning(
            "the text has too few pairs for the vocabulary",
            wanted=wanted.vocab_size,
            trained=tokenizer.vocab_size,
        )
    return tokenizer


def _training_texts(spool: Spool, split_of: _Splitter, most: int) -> Iterator[list[str]]:
    """Yield the train split's texts in batches; of a large one those with the highest keys."""
    sampled_from = max(0, _KEYS - int(_KEYS * most / spool.bytes)) if spool.bytes > most else 0
    chosen = (d for d in spool if split_of(d) == "train" and d.key >= sampled_from)
    for batch in _batches(chosen):
        yield [document.text.decode() for document in batch]


def _batches(documents: Iterator[SpooledDocument]) -> Iterator[list[SpooledDocument]]:
    batch: list[SpooledDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_shards(
    directory: Path,
    config: DataConfig,
    spool: Spool,
    split_of: _Splitter,
    tokenizer: Tokenizer,
    work: Work,
) -> DatasetIndex:
    eos = tokenizer.eos_token_id
    assert eos is not None, "load_file refuses tokenizers without one"
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {
        split: ShardWriter(directory, split, dtype=dtype, shard_tokens=config.shard_tokens)
        for split in SPLITS
    }
    sizes: dict[Split, SplitIndex] = {}
    try:
        with progress("tokenizing", spool.bytes, unit="bytes") as bar:
            for document, ids in work.encoded(tokenizer, _batches(iter(spool))):
                size = len(document.text)
                writers[split_of(document)].append([eos, *ids], num_bytes=size)
                bar.advance(size)
    finally:
        for split, writer in writers.items():
            sizes[split] = writer.close()
    return DatasetIndex(
        dtype=dtype,
        shard_tokens=config.shard_tokens,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=eos,
        splits=sizes,
    )


def _size_metrics(index: DatasetIndex) -> dict[str, Any]:
    sizes = index.splits.values()
    text_bytes = sum(size.bytes for size in sizes)
    text_tokens = sum(size.tokens - size.documents for size in sizes)
    return {
        "documents": sum(size.documents for size in sizes),
        "bytes": text_bytes,
        "tokens": sum(size.tokens for size in sizes),
        "vocab_size": index.vocab_size,
        "bytes_per_token": round(text_bytes / text_tokens, 4),
        "splits": {name: size.model_dump() for name, size in index.splits.items()},
    }


def _refuse_other_tokenizer(beside: str, wanted: TokenizerConfig) -> None:
    """Fail before any work where another tokenizer is in the way."""
    if is_remote(beside) or not Path(beside).exists():
        return
    found = open_artifact(beside, kind="tokenizer", verify=False)
    if found.manifest.config != wanted.model_dump(mode="json"):
        raise ArtifactError(
            f"{beside} exists and was made with another configuration",
            remedy="choose another path or remove it",
        )


def _tokenizer_artifact(
    uri: str, config: TokenizerConfig, copied: Path
) -> tuple[Artifact, Artifact | None]:
    """Return the tokenizer's artifact at `uri`, and again if it was made just now.

    A run that was killed may have left one; the same input gives the same bytes, so it serves.
    `copied` holds the tokenizer's files.
    """
    files = {path.name: path.read_bytes() for path in sorted(copied.iterdir())}
    if not is_remote(uri) and Path(uri).exists():
        found = open_artifact(uri, kind="tokenizer")
        if {name: (found.path / name).read_bytes() for name in found.manifest.files} != files:
            raise ArtifactError(
                f"{uri} exists and holds another tokenizer",
                remedy="choose another path or remove it",
            )
        return found, None
    origin: list[Artifact | Parent] = []
    if config.path is not None and is_artifact(config.path):
        origin.append(open_artifact(config.path))
    with create_artifact(uri, kind="tokenizer", parents=origin, config=config) as draft:
        for name, content in files.items():
            (draft.path / name).write_bytes(content)
    assert draft.artifact is not None
    return draft.artifact, draft.artifact
