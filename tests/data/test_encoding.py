from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt.data.encoding import declared_encoding, decode, encodable, wide_encoding


@given(st.text().filter(lambda text: "\0" not in text and not text.startswith("\ufeff")))
def test_utf8_is_decoded_as_it_is(text: str) -> None:
    assert decode(text.encode()) == (text, "utf-8")


@given(st.binary())
def test_any_bytes_become_encodable_text(data: bytes) -> None:
    text, how = decode(data)
    text.encode()
    assert (how == "binary") == (b"\0" in data)


@pytest.mark.parametrize(
    ("data", "text", "how"),
    [
        (b"\xef\xbb\xbfmarked", "marked", "utf-8"),
        ("caf\xe9 na\xefve".encode("latin-1"), "caf\xe9 na\xefve", "windows-1252"),
        (b"\x93quoted\x94", "\u201cquoted\u201d", "windows-1252"),
        ("\xe9t\xe9 \u4e2d\u6587 \xfcber".encode() + b"\xff", None, "replaced"),
        (b"\x7fELF\0\0", "", "binary"),
    ],
)
def test_other_bytes_say_how_they_were_read(data: bytes, text: str | None, how: str) -> None:
    found = decode(data)
    assert found.how == how
    if text is not None:
        assert found.text == text
    else:
        assert found.text == "\xe9t\xe9 \u4e2d\u6587 \xfcber\ufffd"


def test_python_declarations_are_followed() -> None:
    source = "# -*- coding: koi8-r -*-\nname = '\u0438\u043c\u044f'\n"
    data = source.encode("koi8-r")
    assert declared_encoding(data) == "koi8-r"
    assert decode(data, declared="koi8-r") == (source, "declared")


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"#!/usr/bin/python\n# vim: set fileencoding=latin-1 :\n", "iso8859-1"),
        (b"x = 1\n# coding: latin-1\n", None),  # the first line is no comment
        (b"\n\n# coding: latin-1\n", None),  # the third line
        (b"# coding: no-such-codec\n", None),
        (b"", None),
    ],
)
def test_declarations_count_where_python_reads_them(head: bytes, expected: str | None) -> None:
    assert declared_encoding(head) == expected


def test_byte_order_marks_of_wide_encodings() -> None:
    assert wide_encoding("a".encode("utf-16")) == "utf-16"
    assert wide_encoding("a".encode("utf-32")) == "utf-32"
    assert wide_encoding(b"plain") is None


def test_surrogates_are_joined_or_replaced() -> None:
    assert encodable("\ud83d\ude00 \ud800!") == "\U0001f600 \ufffd!"
    plain = "unchanged"
    assert encodable(plain) is plain
