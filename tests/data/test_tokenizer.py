from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from minigpt.core.errors import DataError
from minigpt.data.tokenizer import Tokenizer, byte_alphabet
from minigpt.data.tokenizer_build import EOS, bytes_tokenizer, train_bpe

GPT2 = Path(__file__).parents[2] / ".." / "shared" / "data" / "gpt2-tokenizer"
TEXT = ["def encode(self, text):\n    return [1, 2, 3]  # it's caf\u00e9 \u4e2d\u6587\n"] * 5


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe(iter([TEXT]), vocab_size=320)


@pytest.fixture(scope="module", params=["trained", "bytes"])
def tokenizer(request: pytest.FixtureRequest, trained: Tokenizer) -> Tokenizer:
    return trained if request.param == "trained" else bytes_tokenizer()


def sentencepiece_like() -> Backend:
    """A tokenizer in the form of Llama 2's: a mark for spaces, and bytes to fall back on."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "h", "i", "\u2581hi"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("\u2581", "h"), ("\u2581h", "i")]
    vocabulary["\u2581h"] = len(vocabulary)
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


@settings(deadline=None)
@given(data=st.binary())
def test_any_bytes_survive(tokenizer: Tokenizer, data: bytes) -> None:
    assert tokenizer.is_exact
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


@settings(deadline=None)
@given(text=st.text())
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer.encode_batch([text])[0] == tokenizer.encode_bytes(text.encode())
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@given(before=st.text(), after=st.text())
def test_special_tokens_in_text_are_plain_text(before: str, after: str) -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer.encode(before + EOS + after)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == before + EOS + after


def test_special_tokens_are_read_where_allowed(trained: Tokenizer) -> None:
    ids = trained.encode(f"a{EOS}b", allow_special=True)
    assert trained.eos_token_id == 0
    assert ids.count(0) == 1
    assert trained.decode(ids) == "ab"
    assert trained.token_bytes(0) == b""
    assert trained.eos_token_id not in trained.encode(f"a{EOS}b")


def test_a_text_begins_with_the_end_of_the_last(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("text")
    assert tokenizer.encode("text", bos=True) == [tokenizer.bos_token_id, *plain]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id


def test_ids_beyond_the_vocabulary_stand_for_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.decode([10**6, *tokenizer.encode("x"), -1]) == "x"


def test_lone_surrogates_become_replacement_characters(trained: Tokenizer) -> None:
    assert trained.decode(trained.encode("a\ud800b")) == "a\ufffdb"


def test_invalid_utf8_decodes_to_replacement_characters(trained: Tokenizer) -> None:
    assert trained.decode(trained.encode_bytes(b"a\xffb")) == "a\ufffdb"


def test_saved_tokenizers_are_equal_and_copies_identical(
    trained: Tokenizer, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    trained.copy_to(first)
    loaded = Tokenizer.load(first)
    loaded.copy_to(second)
    assert sorted(loaded.files()) == sorted(path.name for path in first.iterdir())
    for name in loaded.files():
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert loaded.encode(TEXT[0], bos=True) == trained.encode(TEXT[0], bos=True)
    assert (loaded.eos_token_id, loaded.vocab_size) == (0, trained.vocab_size)
    assert np.array_equal(loaded.byte_lengths(), trained.byte_lengths())


def test_transformers_reads_ours_alike(trained: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trained.copy_to(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT[0]).input_ids == trained.encode(TEXT[0], bos=True)
    assert theirs.eos_token_id == trained.eos_token_id
    assert theirs.decode(trained.encode(TEXT[0])) == TEXT[0]


@pytest.mark.skipif(not GPT2.exists(), reason="needs the shared data")
def test_gpt2s_published_files() -> None:
    gpt2 = Tokenizer.load(GPT2)
    expected = [15496, 995, 11, 428, 318, 402, 11571, 12, 17]
    assert gpt2.encode("Hello world, this is GPT-2") == expected
    assert (gpt2.vocab_size, gpt2.eos_token_id, gpt2.is_exact) == (50257, 50256, True)
    assert gpt2.decode_bytes(gpt2.encode_bytes(bytes(range(256)))) == bytes(range(256))


def test_byte_fallback_tokenizers(tmp_path: Path) -> None:
    sentencepiece_like().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eos_token_id, tokenizer.is_byte_level, tokenizer.is_exact) == (
        2,
        False,
        False,
    )
    assert tokenizer.covers_bytes()
    ids = tokenizer.encode("hi \u00e9", bos=True)
    assert ids[0] == 1
    assert tokenizer.decode(ids) == "hi \u00e9"
    assert b"".join(map(tokenizer.token_bytes, ids)) == " hi \u00e9".encode()
    assert tokenizer.encode_bytes(b"\xff") == [3 + 0xFF]


def write_files(directory: Path, **files: Any) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text)


def test_what_a_models_directory_says_about_the_end_of_text(tmp_path: Path) -> None:
    backend = sentencepiece_like()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    end = backend.token_to_id("<|im_end|>")
    write_files(tmp_path, config__json={"eos_token_id": [end, 2]})
    assert Tokenizer.load(tmp_path).eos_token_id == end
    write_files(tmp_path, tokenizer_config__json={"eos_token": {"content": "</s>"}})
    assert Tokenizer.load(tmp_path).eos_token_id == 2
    write_files(tmp_path, tokenizer_config__json={"eos_token": None})
    assert Tokenizer.load(tmp_path).eos_token_id is None


def test_chat_templates_of_every_place(tmp_path: Path) -> None:
    sentencepiece_like().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).chat_template is None
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    write_files(tmp_path, tokenizer_config__json={"chat_template": named})
    assert Tokenizer.load(tmp_path).chat_template == "yes"
    write_files(tmp_path, chat_template__jinja="{{ messages }}")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.chat_template == "{{ messages }}"
    assert "chat_template.jinja" in tokenizer.files()


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "no tokenizer.json in"),
        ({"tokenizer.model": "x"}, r"tokenizer\.model alone can't be read"),
        ({"tokenizer.json": "{}"}, r"tokenizer\.json is not a tokenizer"),
        ({"vocab.json": "[]", "merges.txt": ""}, "holds no GPT-2 tokenizer"),
        ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json is not valid JSON"),
        ({"tokenizer_config.json": "[]"}, "holds a list, not an object"),
    ],
)
def test_malformed_directories_are_named(
    tmp_path: Path, files: dict[str, str], complaint: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=complaint) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_end_of_text_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    sentencepiece_like().save(str(tmp_path / "tokenizer.json"))
    write_files(tmp_path, tokenizer_config__json={"eos_token": "<|gone|>"})
    with pytest.raises(DataError, match=r"eos_token '<\|gone\|>' is not in"):
        Tokenizer.load(tmp_path)


def test_byte_alphabet_is_gpt2s() -> None:
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert (alphabet[ord("A")], alphabet[ord(" ")], alphabet[ord("\n")]) == (
        "A",
        "\u0120",
        "\u010a",
    )
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
