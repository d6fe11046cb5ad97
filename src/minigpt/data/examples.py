"""From conversations and preferences to token shards with their targets marked.

The middle of `data.prepare` for these contents: reading fills the spool with records as JSON,
writing renders them by the chat template. Nothing is repaired or filtered as texts are; exact
duplicates go, and what is too long meets `chat.too_long`. The split follows the prompt alone, so
that equal prompts are never in both splits, nor in different splits of a chat and a preference
dataset with the same seed and val_fraction.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.core.errors import DataError, ModelError, RequestError
from minigpt.core.storage import storage_errors
from minigpt.core.telemetry import get_logger, progress
from minigpt.data.chat_template import ChatTemplate, Example
from minigpt.data.clean import CleaningReport
from minigpt.data.config import ChatConfig, DataConfig
from minigpt.data.conversations import read_conversations
from minigpt.data.shards import (
    SPLITS,
    DatasetIndex,
    ShardWriter,
    Split,
    SplitIndex,
    targets_name,
    token_dtype,
)
from minigpt.data.spool import Spool, SpooledDocument
from minigpt.data.tokenizer import TEMPLATE_FILE, Tokenizer


def fill_examples(
    spool: Spool, config: DataConfig, report: CleaningReport, key_of: Callable[[bytes], int]
) -> str:
    """Spool the records as JSON, each with its place; return the SHA-256 of what they say.

    Args:
        spool: Takes the records.
        config: Its source is one of conversations or preferences.
        report: Receives the counts.
        key_of: The split's key of a digest.

    Raises:
        DataError: A malformed record (named with its line), or none is left.
    """
    fingerprint = hashlib.sha256()
    seen: set[bytes] = set()
    sources = [(config.source, False, config.max_bytes)]
    if config.val_source is not None:
        sources.insert(0, (config.val_source, True, None))
    for source, is_val, most in sources:
        room = math.inf if most is None else spool.bytes + most
        for where, content in read_conversations(source):
            report.count("read")
            if "chosen" in content and content["chosen"] == content["rejected"]:
                report.count("dropped_equal_answers", where)
                continue
            digest = _digest(content)
            if digest in seen:
                report.count("dropped_exact_duplicate")
                continue
            seen.add(digest)
            report.count("kept")
            fingerprint.update(digest)
            text = json.dumps(content | {"where": where}, ensure_ascii=False)
            key = key_of(_digest(_prompt_of(content)))
            spool.append(SpooledDocument(text.encode("utf-8", "replace"), key, is_val))
            if spool.bytes >= room:
                break
    if not spool.documents:
        raise DataError("the source holds no record", remedy="check source.paths")
    return fingerprint.hexdigest()


def use_template(tokenizer: Tokenizer, config: ChatConfig, directory: Path) -> None:
    """Give a tokenizer, and its files in `directory`, the configured template.

    Raises:
        StorageError: The template can't be read.
    """
    if config.template is None:
        return
    with storage_errors(f"read chat.template {config.template}"):
        tokenizer.chat_template = Path(config.template).read_text(encoding="utf-8")
    with storage_errors(f"write {directory}"):
        (directory / TEMPLATE_FILE).write_text(tokenizer.chat_template, encoding="utf-8")


def write_examples(
    directory: Path,
    config: DataConfig,
    spool: Spool,
    split_of: Callable[[SpooledDocument], Split],
    tokenizer: Tokenizer,
    report: CleaningReport,
) -> DatasetIndex:
    """Render, tokenize and store the spooled records.

    Raises:
        DataError: The template is not valid or refuses a record, an example is too long and may
            not be, or none is left; named with the record's line.
    """
    assert tokenizer.eos_token_id is not None
    dtype = token_dtype(tokenizer.vocab_size)
    renderer = _Renderer(tokenizer, config.chat, report)
    writers = {s: _ExampleWriter(directory, s, dtype, config.shard_tokens) for s in SPLITS}
    sizes: dict[Split, SplitIndex] = {}
    try:
        with progress("rendering", spool.bytes, unit="bytes") as bar:
            for document in spool:
                for example in renderer.examples(json.loads(document.text)):
                    writers[split_of(document)].append(example, renderer.num_bytes(example))
                bar.advance(len(document.text))
    finally:
        for split, writer in writers.items():
            sizes[split] = writer.close()
    _tell(report, config.chat)
    if not sizes["train"].documents:
        raise DataError(
            f"no example of the train split fits into chat.max_tokens = {config.chat.max_tokens}",
            remedy="raise it, or set chat.too_long=truncate",
        )
    return DatasetIndex(
        dtype=dtype,
        shard_tokens=config.shard_tokens,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        content=config.source.content,
        splits=sizes,
    )


class _Renderer:
    """Turns records into examples that fit, and counts what does not."""

    def __init__(self, tokenizer: Tokenizer, config: ChatConfig, report: CleaningReport) -> None:
        self._config = config
        self._report = report
        self._byte_lengths = tokenizer.byte_lengths()
        try:
            self._template = ChatTemplate(tokenizer)
        except ModelError as error:
            raise DataError(error.message, remedy="mend it, or set chat.template") from None

    def examples(self, record: Mapping[str, Any]) -> list[Example]:
        """Return a record's examples; of a preference the chosen and the rejected, or none."""
        where = record["where"]
        try:
            found = self._render(record)
        except RequestError as error:
            raise DataError(f"{where}: {error.message}") from None
        kept = [fit for example in found if (fit := self._fit(example, where)) is not None]
        if "messages" in record:
            if len(found) > 1:
                self._report.count("split_by_template")
        elif len(kept) < 2 or kept[0].tokens == kept[1].tokens:
            self._report.count("dropped_pair", where)
            return []
        return kept

    def num_bytes(self, example: Example) -> int:
        """Return how many bytes of text the targets stand for."""
        return int(self._byte_lengths[np.asarray(example.tokens)[example.is_target]].sum())

    def _render(self, record: Mapping[str, Any]) -> list[Example]:
        if "messages" in record:
            return self._template.encode_turns(record["messages"])
        answers = (
            {"role": "assistant", "content": record[name]} for name in ("chosen", "rejected")
        )
        return [self._template.encode_answer([*record["prompt"], answer]) for answer in answers]

    def _fit(self, example: Example, where: str) -> Example | None:
        """Return the example, a shorter one, or None; by the config and with a count."""
        most = self._config.max_tokens
        if len(example.tokens) <= most:
            return example
        if self._config.too_long == "refuse":
            raise DataError(
                f"{where} has {len(example.tokens)} tokens, more than chat.max_tokens = {most}",
                remedy="raise it, or set chat.too_long to drop or truncate",
            )
        if self._config.too_long == "drop" or not any(example.is_target[:most]):
            self._report.count("dropped_too_long", where)
            return None
        self._report.count("truncated", where)
        return Example(example.tokens[:most], example.is_target[:most])


class _ExampleWriter:
    """One split's token shards, and beside them which tokens are targets."""

    def __init__(self, directory: Path, split: Split, dtype: str, shard_tokens: int) -> None:
        self._shards = ShardWriter(directory, split, dtype=dtype, shard_tokens=shard_tokens)
        self._targets = (directory / targets_name(split)).open("wb")

    def append(self, example: Example, num_bytes: int) -> None:
        assert not example.is_target[0], "the first token has nothing before it"
        self._shards.append(example.tokens, num_bytes=num_bytes)
        self._targets.write(bytes(example.is_target))

    def close(self) -> SplitIndex:
        self._targets.close()
        return self._shards.close()


def _digest(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=True, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _prompt_of(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what precedes the first answer."""
    messages = content["messages"] if "messages" in content else content["prompt"]
    ends = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    prompt: list[dict[str, str]] = messages[: ends[0]] if ends else messages
    return prompt


def _tell(report: CleaningReport, config: ChatConfig) -> None:
    """Say aloud what was cut or left out for its length."""
    counts = {name: report.counts[name] for name in ("dropped_too_long", "truncated")}
    if any(counts.values()):
        get_logger("data").warning(
            "examples are longer than chat.max_tokens", max_tokens=config.max_tokens, **counts
        )
