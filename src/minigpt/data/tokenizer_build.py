"""Makes tokenizers: trained on text, from tiktoken's rank files, or plain bytes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from minigpt.core.errors import DataError
from minigpt.data.tokenizer import TOKENIZER_FILE, Tokenizer, byte_alphabet

EOS = "<|endoftext|>"

# After GPT-4's (cl100k) with three changes: a contraction must end its word, as `'self'` is
# common in code and is no `'s` + `elf`; combining marks belong to their letters; numbers are
# cut after two digits, which small vocabularies learn better (nanochat measured it).
SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+(?:'(?i:[sdmt]|ll|ve|re)(?![\p{L}\p{M}]))?"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(
    batches: Iterator[Sequence[str]],
    *,
    vocab_size: int,
    pattern: str = SPLIT_PATTERN,
    show_progress: bool = False,
) -> Tokenizer:
    """Train byte-level BPE on a stream of texts.

    The memory needed grows with the number of distinct words, not with the text.

    Args:
        batches: Texts, some at a time.
        vocab_size: Most tokens, the 256 bytes and end-of-text among them; fewer come out where
            the text has too few pairs to merge.
        pattern: Regular expression (Oniguruma's syntax) whose matches no token crosses.
        show_progress: Draw the trainer's own bar on the terminal.

    Raises:
        DataError: `vocab_size` is below 257, or the pattern is no regular expression.
    """
    if vocab_size < 257:
        raise DataError(f"vocab_size = {vocab_size}: 256 bytes and {EOS} need at least 257")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer(pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=show_progress,
    )
    backend.train_from_iterator(batches, trainer)
    return _finish(backend)


def bytes_tokenizer() -> Tokenizer:
    """Return the tokenizer whose token ids 0-255 are the bytes, and 256 the end of text."""
    vocabulary = {char: byte for byte, char in enumerate(byte_alphabet())}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = _pre_tokenizer(SPLIT_PATTERN)
    return _finish(backend)


def from_tiktoken(path: str | Path, *, pattern: str = SPLIT_PATTERN) -> Tokenizer:
    """Read tiktoken's ranks: a line per token, its bytes in base64, a space and its rank.

    The ranks become merges in the order in which tiktoken would apply them, so both encode
    alike. The end of text takes the first free id.

    Args:
        path: The rank file.
        pattern: The encoding's split pattern, which the file does not hold.

    Raises:
        DataError: A malformed line, a byte without a rank, or ranks with gaps.
    """
    ranks = _read_ranks(Path(path))
    alphabet = byte_alphabet()
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(f"{path} has no rank for byte 0x{missing[0]:02x}")
    if set(ranks.values()) != set(range(len(ranks))):
        raise DataError(f"{path}: the ranks of its {len(ranks)} tokens must be 0, 1, 2, ...")

    def spell(token: bytes) -> str:
        return "".join([alphabet[byte] for byte in token])

    # tiktoken joins any two neighbours whose concatenation has a rank, lowest rank first:
    # the same as a merge for each way to cut a token into two that are tokens.
    merges: list[tuple[str, str]] = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spell(left), spell(right)) for left, right in pairs]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = _pre_tokenizer(pattern)
    return _finish(backend)


def load_file(path: str | Path, *, pattern: str = SPLIT_PATTERN) -> Tokenizer:
    """Read an existing tokenizer: a directory, a `tokenizer.json` or a tiktoken rank file.

    Raises:
        DataError: No such file, none of these, or a vocabulary that can't spell every byte.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"no tokenizer at {path}", remedy="check tokenizer.path")
    if path.is_dir():
        tokenizer = Tokenizer.load(path)
    elif path.name == TOKENIZER_FILE:
        tokenizer = Tokenizer.load(path.parent)
    elif path.suffix == ".json":
        raise DataError(f"{path} is not named {TOKENIZER_FILE}", remedy="rename it")
    else:
        tokenizer = from_tiktoken(path, pattern=pattern)
    if not tokenizer.covers_bytes():
        raise DataError(
            f"the tokenizer at {path} has no token for some bytes and would lose text",
            remedy="use a byte-level tokenizer or one with byte fallback",
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer at {path} has no end-of-text token to part documents with",
            remedy="name its eos_token in tokenizer_config.json",
        )
    return tokenizer


def check_pattern(pattern: str) -> None:
    """Compile a split pattern.

    Raises:
        DataError: It is no regular expression.
    """
    try:
        Regex(pattern)
    except Exception as error:  # the backend raises bare Exception
        message = " ".join(str(error).split())
        raise DataError(f"tokenizer.pattern {pattern!r} is no pattern: {message}") from None


def _pre_tokenizer(pattern: str) -> Any:
    check_pattern(pattern)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, bytes_of_words])


def _finish(backend: Backend) -> Tokenizer:
    """Add the end of text, which also begins each text, and the way back to bytes."""
    backend.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    eos_id = backend.token_to_id(EOS)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", pair=f"{EOS} $A {EOS} $B", special_tokens=[(EOS, eos_id)]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(backend, config)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"{path}:{number} is not a tiktoken rank: {line[:40]!r}",
                remedy="give a tokenizer.json, or a file of base64 tokens and ranks",
            ) from None
    return ranks
