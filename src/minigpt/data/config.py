"""How a dataset is made: where the text is, how it is cleaned, split, tokenized and stored."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from minigpt.core.config import Config

Packing = Literal["windows", "best-fit"]
Content = Literal["text", "chat", "preference"]
"""What a dataset's documents are: texts, conversations with their answers marked, or pairs of
neighbours, the chosen and the rejected answer to one prompt."""


class SourceConfig(Config):
    """Where the text comes from. Files are read in the order of their sorted paths."""

    kind: Literal[
        "text",
        "jsonl",
        "parquet",
        "huggingface",
        "pystdlib",
        "chat",
        "preference",
        "pydoc-chat",
        "pydoc-preference",
    ] = "text"
    """text: files of text or code. jsonl: .jsonl, .jsonl.gz, .jsonl.zst, an object a line.
    parquet: .parquet files. huggingface: a dataset saved on disk, or a name on the hub.
    pystdlib: the source files of the running Python's standard library, about 31 MB.
    chat: conversations to fine-tune on, {messages: [{role, content}, ...]} or {prompt, completion}
    a record, in .jsonl(.gz|.zst) or .parquet. preference: {prompt, chosen, rejected} likewise.
    pydoc-chat, pydoc-preference: the standard library's functions with their summaries."""
    paths: tuple[str, ...] = ()
    """Files, directories or globs, local or any fsspec URL; for huggingface one directory or
    hub name; for pystdlib and pydoc none."""
    suffixes: tuple[str, ...] = ()
    """text: read only files that end so, for example [.py, .md]; none is every file that is
    not hidden."""
    separator: str | None = None
    """text: what parts documents within a file, for example "\\n\\n"; none is a document a
    file."""
    text_field: str = "text"
    """jsonl, parquet, huggingface: the field that holds the text."""
    hub_config: str | None = None
    """huggingface: the configuration of a hub dataset that has several."""
    hub_split: str = "train"
    """huggingface: the split to read."""
    hub_revision: str | None = None
    """huggingface: a commit, tag or branch; name a commit to repeat the dataset exactly."""

    @property
    def content(self) -> Content:
        """What a document of it is."""
        named = self.kind.removeprefix("pydoc-")
        return named if named in ("chat", "preference") else "text"  # type: ignore[return-value]

    @model_validator(mode="after")
    def _check(self) -> Self:
        is_built_in = self.kind.startswith("py")
        if is_built_in and self.paths:
            raise ValueError(f"source.paths must be empty for kind {self.kind}")
        if not is_built_in and not self.paths:
            raise ValueError(f"source.paths is required for kind {self.kind}")
        if self.kind == "huggingface" and len(self.paths) != 1:
            raise ValueError("source.paths must be one directory or hub name for huggingface")
        if self.separator == "":
            raise ValueError("source.separator must not be empty")
        return self


class CleanConfig(Config):
    """What is repaired and what is dropped; every count goes into the manifest."""

    fix_mojibake: bool = True
    """Undo text decoded with the wrong encoding (ftfy's encoding fixes alone: quotes, widths
    and ligatures stay). Files known as source code are left as they are."""
    max_document_bytes: int = Field(default=1 << 20, ge=64)
    """Longer texts are cut at line ends into documents of at most this size."""
    min_characters: int = Field(default=64, ge=1)
    """Shorter documents are dropped."""
    max_duplicate_lines: float = Field(default=0.7, ge=0, le=1)
    """Documents are dropped in which a larger share of the characters lies in lines that
    appeared before in the same document; 1 drops none."""
    max_compression: float = Field(default=25.0, ge=1)
    """Documents are dropped that zlib shrinks more than this many times: loops and padding."""
    near_duplicates: float | None = Field(default=0.8, gt=0, lt=1)
    """Estimated Jaccard similarity of word 5-grams from which the later of two documents is
    dropped; null keeps near-duplicates. Exact duplicates always go."""
    permutations: int = Field(default=128, ge=16, le=1024)
    """MinHash functions a document: the estimate's standard error is about
    sqrt(s (1 - s) / permutations)."""


class TokenizerConfig(Config):
    """The tokenizer."""

    kind: Literal["train", "file", "bytes"] = "train"
    """train: byte-level BPE on the train split. file: an existing one. bytes: a token a
    byte."""
    vocab_size: int = Field(default=8192, ge=257, le=1 << 20)
    """train: most tokens, the 256 bytes and end-of-text among them."""
    path: str | None = None
    """file: a directory with tokenizer.json, that file, or a file of tiktoken ranks."""
    pattern: str | None = None
    """train and tiktoken ranks: the regular expression that splits text before merging; null is
    GPT-4's, adapted to code."""
    train_bytes: int = Field(default=256 << 20, ge=1)
    """train: most bytes to train on; a larger corpus is sampled by document hash."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "file") != (self.path is not None):
            raise ValueError("tokenizer.path is required for kind file, and only there")
        return self


class ChatConfig(Config):
    """How conversations become tokens; for sources of chats and preferences alone."""

    template: str | None = None
    """A Jinja2 file; null is the tokenizer's own template, or plain turns where it has none."""
    max_tokens: int = Field(default=1024, ge=2)
    """Longest example. Training keeps each whole in a row, so that it must be no longer than
    batch.sequence_length."""
    too_long: Literal["drop", "truncate", "refuse"] = "drop"
    """What becomes of longer ones. drop and truncate (at the end) are counted in the manifest; of
    a preference both answers share the fate."""


class DataConfig(Config):
    """A dataset, from raw text to token shards."""

    source: SourceConfig
    """Where the text comes from."""
    val_source: SourceConfig | None = None
    """Text for the validation split; by default a part of `source` by document hash. Read
    first, so that what duplicates it is dropped from training."""
    clean: CleanConfig = CleanConfig()
    """What is repaired and dropped."""
    val_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of documents for the validation split, at least one document unless it is 0;
    unused where `val_source` is given."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    chat: ChatConfig = ChatConfig()
    """How conversations are rendered and bounded."""
    shard_tokens: int = Field(default=1 << 26, ge=1)
    """Tokens a shard file."""
    seed: int = 0
    """Chooses which documents validate."""
    max_bytes: int | None = Field(default=None, ge=1)
    """Stop after this much cleaned text; null is all."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        content = self.source.content
        if self.val_source is not None and self.val_source.content != content:
            raise ValueError(
                f"val_source.kind = {self.val_source.kind} and source.kind = {self.source.kind} "
                "differ in what a document is"
            )
        if content == "text":
            if self.chat != ChatConfig():
                raise ValueError(f"chat is for conversations, but source.kind = {self.source.kind}")
            return self
        if self.clean != CleanConfig():
            raise ValueError(f"clean is for texts; source.kind = {self.source.kind} is kept as is")
        if self.tokenizer.kind == "train":
            raise ValueError(
                f"source.kind = {self.source.kind} takes the tokenizer of the model that it is to "
                "tune: set tokenizer.kind=file and tokenizer.path"
            )
        return self


class WeightPoint(Config):
    """A change of a source's weight."""

    at: int = Field(ge=1)
    """When: a step or a number of tokens of the run (`schedule_unit`)."""
    weight: float = Field(ge=0)
    """The weight from then on."""
    ramp: bool = False
    """Reach the weight along a straight line from the point before, instead of at once."""


class MixtureSource(Config):
    """One dataset of a mixture."""

    name: str = Field(min_length=1, pattern=r"^[^:\s]+$")
    """What reports call it; it also keys the source's shuffle."""
    dataset: str
    """Path or URL of a dataset artifact; all of a mixture have the same tokenizer."""
    weight: float = Field(default=1.0, ge=0)
    """Share of the rows, relative to the other sources, from the first step on."""
    schedule: tuple[WeightPoint, ...] = ()
    """How the weight changes, in ascending order."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        points = [point.at for point in self.schedule]
        if points != sorted(set(points)):
            raise ValueError(f"schedule of {self.name}: the points {points} must ascend")
        return self


class MixtureConfig(Config):
    """Several datasets mixed by weights."""

    mixture: tuple[MixtureSource, ...] = Field(min_length=1)
    """The sources. Each is shuffled within itself and begins anew when it is used up."""
    schedule_unit: Literal["steps", "tokens"] = "steps"
    """What the points of the schedules count."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [source.name for source in self.mixture]
        if len(set(names)) != len(names):
            raise ValueError(f"the names of a mixture's sources must differ: {', '.join(names)}")
        return self
