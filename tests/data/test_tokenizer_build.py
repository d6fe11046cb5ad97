from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from minigpt.core.errors import DataError
from minigpt.data.tokenizer_build import (
    SPLIT_PATTERN,
    bytes_tokenizer,
    from_tiktoken,
    load_file,
    train_bpe,
)

SOURCE = Path(__file__).read_text(encoding="utf-8")
CODE = "def f(self):\n        return 'self', \"d'accord\", 12345, it's  \u00e9t\u00e9\n\n\n"


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Ranks as tiktoken keeps them: the bytes, then merges in the order they were learnt."""
    trained = train_bpe(iter([[SOURCE, CODE]]), vocab_size=700)
    learnt = [trained.token_bytes(i) for i in range(257, trained.vocab_size)]
    return {token: i for i, token in enumerate([bytes([b]) for b in range(256)] + learnt)}


@pytest.fixture(scope="module")
def rank_file(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "small.tiktoken"
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def pieces(text: str) -> list[str]:
    encoding = bytes_tokenizer()._backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:stop] for _, (start, stop) in encoding]


def test_pattern_suits_code_and_prose() -> None:
    assert pieces("it's 'self'") == ["it's", " '", "self", "'"]
    assert pieces("x12345\n\n    y") == ["x", "12", "34", "5", "\n\n", "   ", " y"]
    assert pieces("e\u0301t\u00e9 \u4e2d\u6587") == ["e\u0301t\u00e9", " \u4e2d\u6587"]


@given(st.text())
def test_pattern_loses_nothing(text: str) -> None:
    assert "".join(pieces(text)) == text


def test_training_is_the_same_in_every_process() -> None:
    code = (
        "import hashlib; from pathlib import Path\n"
        "from minigpt.data.tokenizer_build import train_bpe\n"
        f"text = Path({__file__!r}).read_text()\n"
        "tokenizer = train_bpe(iter([[text]]), vocab_size=1000)\n"
        "print(hashlib.sha256(tokenizer._backend.to_str().encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_vocabulary_is_as_large_as_asked_or_as_the_text_allows() -> None:
    assert train_bpe(iter([[SOURCE]]), vocab_size=300).vocab_size == 300
    assert train_bpe(iter([["aaaa"]]), vocab_size=5000).vocab_size < 300
    with pytest.raises(DataError, match="vocab_size = 256"):
        train_bpe(iter([[SOURCE]]), vocab_size=256)


def test_bytes_tokenizer_is_the_identity() -> None:
    tokenizer = bytes_tokenizer()
    assert tokenizer.encode_bytes(bytes(range(256))) == list(range(256))
    assert (tokenizer.eos_token_id, tokenizer.vocab_size) == (256, 257)


@settings(deadline=None)
@given(text=st.one_of(st.text(), st.text("selfdr'\"\n 12\u00e9(),:"), st.just(CODE + SOURCE)))
def test_ranks_encode_as_tiktoken_does(ranks: dict[bytes, int], rank_file: Path, text: str) -> None:
    theirs = tiktoken.Encoding(
        "small", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    ours = from_tiktoken(rank_file)
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.eos_token_id == len(ranks)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("not base64!! 3\n", r"ranks:1 is not a tiktoken rank"),
        ("IQ== 0\nIg==\n", r"ranks:2 is not a tiktoken rank"),
        ("IQ== 0\n", "has no rank for byte 0x00"),
    ],
)
def test_malformed_ranks_are_named(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "ranks"
    path.write_text(content)
    with pytest.raises(DataError, match=complaint):
        from_tiktoken(path)


def test_ranks_with_gaps_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "gaps"
    lines = [f"{base64.b64encode(bytes([b])).decode()} {b * 2}" for b in range(256)]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match="ranks of its 256 tokens must be 0, 1, 2"):
        from_tiktoken(path)


def test_existing_tokenizers_by_directory_and_by_file(rank_file: Path, tmp_path: Path) -> None:
    bytes_tokenizer().copy_to(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_file(path).vocab_size == 257
    assert load_file(rank_file).encode("self") == from_tiktoken(rank_file).encode("self")
    with pytest.raises(DataError, match="no tokenizer at"):
        load_file(tmp_path / "gone")


def test_tokenizers_that_would_lose_text_are_refused(tmp_path: Path) -> None:
    words = Backend(models.WordLevel({"[UNK]": 0, "hello": 1}, unk_token="[UNK]"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="has no token for some bytes"):
        load_file(tmp_path)


def test_tokenizers_without_an_end_of_text_are_refused(tmp_path: Path) -> None:
    bytes_tokenizer().copy_to(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null}')
    with pytest.raises(DataError, match="no end-of-text token"):
        load_file(tmp_path)


def test_a_malformed_pattern_is_refused() -> None:
    with pytest.raises(DataError, match=r"tokenizer\.pattern '\(' is no pattern"):
        train_bpe(iter([[SOURCE]]), vocab_size=300, pattern="(")
