"""Text to tokens and back, exactly, whatever the bytes.

One class over Hugging Face's `tokenizers`, for tokenizers trained here and for those of
downloaded models. Making new ones is `data.tokenizer_build`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from minigpt.core.errors import DataError
from minigpt.core.storage import storage_errors, write_atomic
from minigpt.data.encoding import encodable

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_OPTIONAL_FILES = (CONFIG_FILE, TEMPLATE_FILE, "special_tokens_map.json")

# The names under which model families keep their end of text, for files without a config.
_KNOWN_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_DECIDING = ("added_tokens", "normalizer", "pre_tokenizer", "model")
_INVALID_UTF8 = re.compile("([\udc80-\udcff]+)")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@lru_cache(maxsize=1)
def byte_alphabet() -> tuple[str, ...]:
    """Return the printable character that stands for each byte in byte-level BPE.

    Source: `bytes_to_unicode` of GPT-2 (https://github.com/openai/gpt-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(256, 512))
    return tuple(chr(b) if b in printable else chr(next(moved)) for b in range(256))


class Tokenizer:
    """A vocabulary with its rules, and which tokens begin and end a text.

    Text that looks like a special token is encoded as the plain text it is, unless
    `allow_special` is set. Thread-safe.
    """

    def __init__(
        self, backend: Backend, config: dict[str, Any], *, directory: Path | None = None
    ) -> None:
        """Wrap a backend.

        Args:
            backend: Vocabulary, merges and pre-tokenization.
            config: The content of `tokenizer_config.json`.
            directory: Where the files lie, or None where they were never written.

        Raises:
            DataError: The configured end-of-text token is not in the vocabulary.
        """
        self._backend = backend
        self._backend.encode_special_tokens = True
        self._config = config
        self._directory = directory
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"the tokenizer at {directory} has an empty vocabulary")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self._special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        self.eos_token_id: int | None = self._special("eos_token", vocabulary)
        self.bos_token_id: int | None = self._special("bos_token", vocabulary)
        if self.eos_token_id is None and "eos_token" not in config:
            known = (vocabulary[name] for name in _KNOWN_EOS if name in vocabulary)
            self.eos_token_id = next(known, None)
        self.chat_template: str | None = _chat_template(config)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read a tokenizer from an artifact or a Hugging Face model directory.

        Args:
            directory: Holds `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`; and
                perhaps `tokenizer_config.json` and `chat_template.jinja`.

        Raises:
            DataError: No tokenizer there, or a file of it is malformed.
        """
        directory = Path(directory)
        config = _read_json(directory / CONFIG_FILE) or {}
        for name, value in (_read_json(directory / "special_tokens_map.json") or {}).items():
            config.setdefault(name, value)
        if "eos_token" not in config:
            _adopt_model_eos(config, directory)
        template = directory / TEMPLATE_FILE
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        source = directory / TOKENIZER_FILE
        if source.is_file():
            try:
                backend = Backend.from_file(str(source))
            except Exception as error:  # the backend raises bare Exception
                raise DataError(f"{source} is not a tokenizer: {_one_line(error)}") from None
            backend.no_padding()
            backend.no_truncation()
            return cls(backend, config, directory=directory)
        if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            return cls(_read_gpt2_files(directory), config)
        found = " (tokenizer.model alone can't be read)" * (directory / "tokenizer.model").exists()
        raise DataError(
            f"no {TOKENIZER_FILE} in {directory}{found}",
            remedy="give a directory that holds tokenizer.json, or vocab.json and merges.txt",
        )

    def encode(self, text: str, *, bos: bool = False, allow_special: bool = False) -> list[int]:
        """Turn text into token ids.

        Args:
            text: Any string; lone surrogates become U+FFFD.
            bos: Begin as the tokenizer begins a text (its post-processor decides).
            allow_special: Read special tokens where the text spells them, as rendered chat
                templates need; never set it for text from outside.
        """
        backend = self._special_backend if allow_special else self._backend
        ids: list[int] = backend.encode(encodable(text), add_special_tokens=bos).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts without specials, in parallel threads. Texts must be valid Unicode."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Turn any bytes into token ids; `decode_bytes` gives back exactly `data`.

        Exact for byte-level tokenizers without a normalizer (see `is_exact`). Bytes that are
        not UTF-8 become single-byte tokens.

        Raises:
            DataError: An invalid byte, and the vocabulary has no token for it.
        """
        text = data.decode("utf-8", "surrogateescape")
        ids: list[int] = []
        for index, part in enumerate(_INVALID_UTF8.split(text)):
            if index % 2:
                ids.extend(self._byte_id(byte) for byte in part.encode("utf-8", "surrogateescape"))
            elif part:
                ids.extend(self.encode(part))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Turn token ids into text: special tokens vanish, invalid UTF-8 becomes U+FFFD."""
        if self.is_byte_level:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Concatenate the tokens' bytes; special tokens and ids beyond the vocabulary have none."""
        return b"".join([self.token_bytes(i) for i in ids])

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes one token stands for.

        b"" for special tokens and for ids beyond the vocabulary, which models with a padded
        embedding can produce.
        """
        return self._token_bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return the length in bytes of each token, (vocab_size,), specials 0."""
        return np.fromiter(map(len, self._token_bytes), np.int64, self.vocab_size)

    def special_tokens(self) -> dict[str, int]:
        """Return how each special token is spelled, as chat templates spell it, and its id."""
        added = self._backend.get_added_tokens_decoder()
        return {added[token_id].content: token_id for token_id in sorted(self._special_ids)}

    def files(self) -> tuple[str, ...]:
        """Name the files that make up this tokenizer in a directory."""
        if self._directory is None:
            return (TOKENIZER_FILE, CONFIG_FILE)
        optional = (name for name in _OPTIONAL_FILES if (self._directory / name).is_file())
        return (TOKENIZER_FILE, *optional)

    def copy_to(self, directory: str | Path) -> None:
        """Put this tokenizer's files into an existing directory, byte for byte.

        Raises:
            StorageError: They can't be written.
        """
        directory = Path(directory)
        if self._directory is not None:
            with storage_errors(f"write {directory}"):
                for name in self.files():
                    shutil.copyfile(self._directory / name, directory / name)
            return
        write_atomic(directory / TOKENIZER_FILE, self._backend.to_str(pretty=True).encode())
        config = json.dumps(self._config, indent=1, sort_keys=True, ensure_ascii=False)
        write_atomic(directory / CONFIG_FILE, config.encode())

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether tokens are spelled in the byte alphabet, so that they simply concatenate."""
        decoder = json.loads(self._backend.to_str())["decoder"] or {}
        return any(part.get("type") == "ByteLevel" for part in decoder.get("decoders", [decoder]))

    @cached_property
    def is_exact(self) -> bool:
        """Whether any bytes survive encoding and decoding unchanged."""
        if not self.is_byte_level or self._backend.normalizer is not None:
            return False
        return all(self._byte_ids[byte] is not None for byte in range(256))

    def covers_bytes(self) -> bool:
        """Tell whether every byte has a token, so that no text becomes "unknown"."""
        return all(token_id is not None for token_id in self._byte_ids)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which ids a text gets; equal for equal tokenizers."""
        tree = json.loads(self._backend.to_str())
        deciding = {name: tree[name] for name in _DECIDING}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _special_backend(self) -> Backend:
        backend = Backend.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        added = self._backend.get_added_tokens_decoder()
        byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
        for token, token_id in self._backend.get_vocab(with_added_tokens=True).items():
            if token_id in self._special_ids:
                continue
            if token_id in added:
                table[token_id] = token.encode()
            elif self.is_byte_level:
                spelled = (byte_of.get(char) for char in token)
                table[token_id] = bytes(byte for byte in spelled if byte is not None)
            elif match := _BYTE_TOKEN.fullmatch(token):
                table[token_id] = bytes([int(match[1], 16)])
            else:
                table[token_id] = token.replace("\u2581", " ").encode()
        return table

    @cached_property
    def _byte_ids(self) -> list[int | None]:
        spell = byte_alphabet().__getitem__ if self.is_byte_level else "<0x{:02X}>".format
        return [self._backend.token_to_id(spell(byte)) for byte in range(256)]

    def _byte_id(self, byte: int) -> int:
        token_id = self._byte_ids[byte]
        if token_id is None:
            raise DataError(
                f"the tokenizer has no token for byte 0x{byte:02x}",
                remedy="use a byte-level tokenizer",
            )
        return token_id

    def _special(self, role: str, vocabulary: dict[str, int]) -> int | None:
        value = self._config.get(role)
        name = value.get("content") if isinstance(value, dict) else value
        if name is None:
            return None
        if name not in vocabulary:
            raise DataError(f"{role} {name!r} is not in the tokenizer's vocabulary")
        return vocabulary[name]


def _chat_template(config: dict[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # older files name several; "default" is the one for chat
        named = {item["name"]: item["template"] for item in template}
        return named.get("default")
    return template


def _adopt_model_eos(config: dict[str, Any], directory: Path) -> None:
    """Take the end of text from the model's `config.json` where the tokenizer names none."""
    token_id = (_read_json(directory / "config.json") or {}).get("eos_token_id")
    token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
    source = _read_json(directory / TOKENIZER_FILE) if isinstance(token_id, int) else None
    for token in (source or {}).get("added_tokens", []):
        if token["id"] == token_id:
            config["eos_token"] = token["content"]


def _read_gpt2_files(directory: Path) -> Backend:
    """Build GPT-2's tokenizer from the two files it was published as."""
    try:
        model = BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    except Exception as error:  # the backend raises bare Exception
        raise DataError(f"{directory} holds no GPT-2 tokenizer: {_one_line(error)}") from None
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if (eos := _KNOWN_EOS[0]) in backend.get_vocab():
        backend.add_special_tokens([AddedToken(eos, special=True, normalized=False)])
    return backend


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not valid JSON: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path} holds a {type(tree).__name__}, not an object")
    return tree


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
